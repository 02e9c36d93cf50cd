"""Division of outputs among several processes, and assembly of the parts.

The concatenated bytes of all files of an output are cut at page borders into parts of equal size,
one per process. So two hosts seldom write to the same page. The exceptions are: an element across a
border, which only distributed checkpoints have; the bytes between tensors, which the first process
writes; borders between leaves that are hashed; and outputs after the first.

Nothing is read from an output, so no host writes back a stale copy of bytes that another host has
written. The bits of the output do not depend on the cuts.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from ckptavg._version import __version__
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import Progress, StreamOutcome, StreamRequests, stream
from ckptavg.distributed.threads import default_threads
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import OutputError, PeerError, ProcessesError
from ckptavg.errors.system import unwritable
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.io.stamp import FileStamp
from ckptavg.outputs.digests import LEAF, Leaves
from ckptavg.outputs.sinks import FileSink
from ckptavg.outputs.target import Target
from ckptavg.outputs.writing import OpenTargets, open_targets

log = logging.getLogger("ckptavg")
PAGE = 4096  # bytes
T = TypeVar("T", TensorPlan, OutputTensor)


def byte_ranges(sizes: Sequence[int], rank: int, count: int) -> list[tuple[int, int]]:
    """Compute the part of each file that a process writes.

    Args:
        sizes: Size of each file in bytes.
        rank: Rank of the process, from 0.
        count: Number of processes.

    Returns:
        First byte and end (exclusive) of the part of each file. The parts of all processes cover
        each byte once, in the order of the ranks. Borders within a file are multiples of ``PAGE``.
    """
    total = sum(sizes)
    part_begin, part_end = total * rank // count, total * (rank + 1) // count
    ranges, file_begin = [], 0
    for size in sizes:
        begin = _aligned(part_begin - file_begin, size)
        end = _aligned(part_end - file_begin, size)
        ranges.append((begin, end))
        file_begin += size
    return ranges


def _aligned(border: int, size: int) -> int:
    """Move a border down to a border of pages, or into the file if it is outside."""
    if border >= size:
        return size
    return max(0, border // PAGE * PAGE)


def element_ranges(
    layout: Layout, tensors: Iterable[OutputTensor], rank: int, count: int, grain: int = 1
) -> dict[tuple[str, int], tuple[int, int]]:
    """Compute the part of each tensor that a process computes.

    An element belongs to the part in which the element's first byte is.

    Args:
        layout: Layout of the output.
        tensors: Tensors of the output.
        rank: Rank of the process, from 0.
        count: Number of processes.
        grain: Number of elements that are not split, counted from the first element of a tensor.

    Returns:
        Name and number of elements of each tensor with a place in the layout → first element and
        end (exclusive).
    """
    ranges = byte_ranges([file.size for file in layout.files], rank, count)
    # Name → begin and end of the part of the tensor's file, in bytes from the tensor's first byte.
    borders: dict[str, tuple[int, int]] = {}
    for file, (begin, end) in zip(layout.files, ranges, strict=True):
        for name, offset in file.offsets.items():
            borders[name] = begin - offset, end - offset
    parts: dict[tuple[str, int], tuple[int, int]] = {}
    for tensor in tensors:
        if tensor.name in borders and tensor.numel:
            begin, end = borders[tensor.name]
            first = _first_element(tensor, begin, grain)
            parts[tensor.name, tensor.numel] = first, _first_element(tensor, end, grain)
    return parts


def _first_element(tensor: OutputTensor, border: int, grain: int) -> int:
    """Compute the first element behind a border in bytes, rounded up to the grain."""
    # Rounded up: an element across a border belongs to the part before.
    grains = -(-border // (tensor.dtype.size * grain))
    return min(tensor.numel, max(0, grains * grain))


def expand_ties(tensors: Iterable[T], layout: Layout) -> list[T]:
    """Remove the ties of tensors that have separate places in a layout.

    The places of tied tensors may be in the parts of several processes. Each process then computes
    the elements of its own part.
    """
    placed: set[str] = set()
    for file in layout.files:
        placed.update(file.offsets)
    expanded: list[T] = []
    for tensor in tensors:
        untied = tensor.name in placed and tensor.tied_to is not None
        expanded.append(replace(tensor, tied_to=None) if untied else tensor)
    return expanded


@dataclass(frozen=True)
class ShardedWrite:
    """Outputs that several processes make together.

    Args:
        processes: The processes.
        targets: The outputs.
        plans: Plan of each output.
    """

    processes: TorchrunGroup
    targets: Sequence[Target]
    plans: Sequence[Plan]

    @property
    def grain(self) -> int:
        """Number of elements of a tensor that are not split.

        Where it is not 1, borders are only near page borders.
        """
        # A leaf is hashed by a single process.
        if any(target.provenance.digest is not None for target in self.targets):
            return LEAF
        return 1

    @property
    def tensors(self) -> list[list[TensorPlan]]:
        """Plans of each output's tensors, without ties where tied names have separate places."""
        expanded: list[list[TensorPlan]] = []
        for plan, target in zip(self.plans, self.targets, strict=True):
            expanded.append(expand_ties(plan.tensors, target.layout))
        return expanded

    @property
    def parts(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Part of each tensor that this process computes.

        One read serves all outputs, so that a tensor has the same part in every output. The first
        output with a place for the tensor decides the part.
        """
        parts: dict[tuple[str, int], tuple[int, int]] = {}
        # Reversed, since later entries replace earlier ones: the first output decides.
        for target in reversed(self.targets):
            share = self.processes.rank, self.processes.world_size, self.grain
            parts |= element_ranges(target.layout, target.tensors, *share)
        return parts

    @contextmanager
    def open(self) -> Iterator[OpenTargets]:
        """Open the outputs for this process's parts, and publish them once all parts are written.

        Raises:
            ProcessesError: The processes have different inputs or outputs, or another process has
                failed.
            OutputError: An output cannot be written. Nothing is published then.
        """
        self._agree()
        with self._create() if self.processes.rank == 0 else self._join() as outputs:
            yield outputs
            self._gather_leaves(outputs.leaves)
        try:
            self.processes.gather("published")
        except PeerError as error:
            # Process 0 has published by then. The others do not know whether it did.
            if self.processes.rank:
                raise
            log.warning("%s, but only after the output was whole", error)

    def stream(
        self, jobs: Sequence[Job], requests: StreamRequests, *, progress: Progress | None
    ) -> StreamOutcome:
        """Compute this process's part of the outputs, and gather the results of all processes.

        Args:
            jobs: The outputs.
            requests: Further work on the tensors that are read.
            progress: Called with the bytes read and the total of bytes to read, both estimated for
                all processes together.

        Returns:
            The results of all processes together.

        Raises:
            ProcessesError: Another process has failed.
            CkptavgError: As for ``ckptavg.averaging.stream.stream``.
        """

        def look(done: int, total: int) -> None:
            """Notice a failed process during the work, and report progress."""
            self.processes.check()
            if progress is not None:
                # The parts are equal, so that this process's pace is about that of all.
                progress(done * self.processes.world_size, total * self.processes.world_size)

        requests = replace(requests, parts=self._parts_beside(requests) | self.parts)
        # The processes of one host share its processors.
        threads = default_threads(self.processes.neighbours)
        outcome = stream(jobs, requests, threads=threads, progress=look)
        names: list[list[list[str]]] = []
        for result in outcome.results:
            names.append([sorted(result.differing), sorted(result.nonfinite)])
        # As lists of numbers: messages are JSON, which keeps all digits of a float.
        gram = None if outcome.gram is None else outcome.gram.tolist()
        # Summed anew in the order of the ranks, so that all processes get the same bits.
        outcome.gram = None
        for rank_names, rank_gram in self.processes.gather([names, gram]):
            for result, (differing, nonfinite) in zip(outcome.results, rank_names, strict=True):
                result.differing.update(differing)
                result.nonfinite.update(nonfinite)
            if rank_gram is not None:
                summand = torch.tensor(rank_gram, dtype=torch.float64)
                outcome.gram = summand if outcome.gram is None else outcome.gram + summand
        return outcome

    def _gather_leaves(self, leaves: Sequence[Leaves]) -> None:
        """Merge the digests of leaves that all processes have hashed of the same tensors."""
        if not leaves:
            return
        messages = [_pack_leaves(digests) for digests in leaves]
        for gathered in self.processes.gather(messages):
            for digests, message in zip(leaves, gathered, strict=True):
                digests.merge(_unpack_leaves(message))

    def _parts_beside(self, requests: StreamRequests) -> dict[tuple[str, int], tuple[int, int]]:
        """Assign tensors that are read but have no place in an output to the first process."""
        numels: list[tuple[str, int]] = []
        for plan in requests.gram:
            numels.append((plan.name, plan.output.numel))
        for tensor in requests.observed:
            # Tensors that only the observer needs are in groups without a name, see add_observed.
            numels.append(("", tensor.numel))
        parts: dict[tuple[str, int], tuple[int, int]] = {}
        for name, numel in numels:
            end = numel
            if self.processes.rank:
                end = 0
            parts[name, numel] = 0, end
        return parts

    @contextmanager
    def _create(self) -> Iterator[OpenTargets]:
        """Create the files as the first process, and publish them after all processes are done."""
        with open_targets(self.targets, self._written_tensors()) as outputs:
            files = [writer.files for writer in outputs.writers]
            # On network file systems, other hosts see the files only once they are flushed.
            for sink in files:
                sink.flush()
            self.processes.gather([str(sink.root) for sink in files])
            yield outputs
            for rank_checksums in self.processes.gather([])[1:]:
                for sink, checksums in zip(files, rank_checksums, strict=True):
                    sink.take_checksums(checksums)

    @contextmanager
    def _join(self) -> Iterator[OpenTargets]:
        """Open the files that the first process has created, and write this process's parts."""
        roots = self.processes.gather([])[0]
        with ExitStack() as open_files, _as_output_errors(self.targets):
            files: list[FileSink] = []
            tensors = self._written_tensors()
            for target, root, names in zip(self.targets, roots, tensors, strict=True):
                sink = FileSink(target.layout, Path(root), names, path=target.path, join=True)
                files.append(open_files.enter_context(sink))
            yield OpenTargets.of(self.targets, files)
            for sink in files:
                sink.flush()
            self.processes.gather([sink.checksums() for sink in files])

    def _written_tensors(self) -> list[list[OutputTensor]]:
        return [expand_ties(target.tensors, target.layout) for target in self.targets]

    def _agree(self) -> None:
        """Make sure that all processes have the same inputs, plans and outputs.

        Raises:
            ProcessesError: Two processes differ.
        """
        # Digests, since the names of a large model's tensors would make long messages.
        digests: dict[str, str] = {}
        for subject, values in self._shared_values().items():
            digests[subject] = _digest(values)
        first, *following = self.processes.gather(digests)
        for rank, gathered in enumerate(following, 1):
            for subject, digest in first.items():
                if gathered[subject] != digest:
                    raise ProcessesError(
                        f"processes 0 and {rank} do not have the same {subject}",
                        "Start all with the same command, on hosts that see the same files.",
                    )

    def _shared_values(self) -> dict[str, Iterable[object]]:
        """Return the values that must be the same in all processes, by a name for messages."""
        selection: list[str] = []
        coefficients: list[tuple[float, ...]] = []
        for plan in self.plans:
            selection += [str(checkpoint.path) for checkpoint in plan.checkpoints]
            coefficients.append(plan.coefficients)
        return {
            "version of ckptavg": [__version__],
            "input files": self._input_values(),
            "selection": selection,
            "coefficients": coefficients,
            "tensors": self._tensor_values(),
            "outputs": self._file_values(),
        }

    def _input_values(self) -> Iterator[object]:
        stamps: dict[str, FileStamp] = {}
        for plan in self.plans:
            for checkpoint in plan.files:
                for stamp in checkpoint.files:
                    stamps[stamp.path] = stamp
        for path, stamp in stamps.items():
            yield path, stamp.size, stamp.mtime_ns, stamp.token

    def _tensor_values(self) -> Iterator[object]:
        for plan in self.plans:
            for t in plan.tensors:
                yield t.name, t.shape, t.dtype.name, t.averaged, t.coefficients, t.tied_to

    def _file_values(self) -> Iterator[object]:
        for target in self.targets:
            for file in target.layout.files:
                yield target.path, file.name, file.size, file.offsets


def _pack_leaves(leaves: Leaves) -> dict[int, str]:
    """Make a message of the digests of leaves, by tensor."""
    message: dict[int, str] = {}
    for number, digests in leaves.done.items():
        # Compressed, since the leaves of other processes are zeros. Messages are text.
        message[number] = b64encode(zlib.compress(digests)).decode()
    return message


def _unpack_leaves(message: Mapping[str, str]) -> dict[int, bytes]:
    """Read the digests of leaves from another process's message."""
    leaves: dict[int, bytes] = {}
    for number, text in message.items():
        # Keys of JSON are text.
        leaves[int(number)] = zlib.decompress(b64decode(text))
    return leaves


def _digest(values: Iterable[object]) -> str:
    hasher = hashlib.sha256()
    for value in values:
        # Paths that are not valid UTF-8 hold surrogates, which UTF-8 refuses.
        hasher.update(repr(value).encode("utf-8", "backslashreplace"))
    return hasher.hexdigest()


@contextmanager
def _as_output_errors(targets: Sequence[Target]) -> Iterator[None]:
    """Convert the system's errors about an output's files into ``OutputError``."""
    path = targets[0].path
    try:
        yield
    except FileNotFoundError as error:
        raise OutputError(
            f"this host does not see {path} as process 0 created it",
            "Choose another `out`, on a file system that all hosts share.",
        ) from error
    except OSError as error:
        raise unwritable(path, error) from error
