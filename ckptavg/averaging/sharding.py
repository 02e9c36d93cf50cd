"""An output that several processes make: whose part is which, and how the parts become one.

The bytes of all files of an output, one after another, are cut into parts of equal size at page
borders, so that hosts seldom write one page: at an element across a border, which only distributed
checkpoints have, at what the first process writes between tensors, at borders between leaves that
are hashed, and in outputs beside the first. Nothing is read of an output, so no host puts back what
another has written. The bits do not depend on the cuts.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from ckptavg._version import __version__
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import Extras, Progress, Streamed, stream
from ckptavg.distributed.processes import Processes
from ckptavg.distributed.threads import default_threads
from ckptavg.errors import OutputError, PeerError, ProcessesError
from ckptavg.errors.system import unwritable
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.outputs import target as outputs
from ckptavg.outputs.digests import Leaves
from ckptavg.outputs.sinks import FileSink
from ckptavg.outputs.target import Target

log = logging.getLogger("ckptavg")
PAGE = 4096  # bytes
T = TypeVar("T", TensorPlan, OutputTensor)


def byte_ranges(sizes: Sequence[int], rank: int, count: int) -> list[tuple[int, int]]:
    """One process's part of some files.

    Args:
        sizes: Of the files, in bytes.
        rank: The process, from 0.
        count: How many processes there are.

    Returns:
        First byte and end of its part of each file. The parts of all processes cover each byte
        once, in their order; borders within a file are multiples of ``PAGE``.
    """
    total = sum(sizes)
    found, before = [], 0
    for size in sizes:
        begin, end = (_aligned(total * k // count - before, size) for k in (rank, rank + 1))
        found.append((begin, end))
        before += size
    return found


def _aligned(border: int, size: int) -> int:
    return size if border >= size else max(0, border // PAGE * PAGE)


def element_ranges(
    layout: Layout, tensors: Iterable[OutputTensor], rank: int, count: int, grain: int = 1
) -> dict[tuple[str, int], tuple[int, int]]:
    """One process's part of the tensors of an output; an element belongs where it begins.

    Args:
        layout: Of the output.
        tensors: What is in it.
        rank: The process, from 0.
        count: How many processes there are.
        grain: Elements that stay together, counted from a tensor's first.

    Returns:
        First element and end by name and number of elements of each tensor that has a place.
    """
    ranges = byte_ranges([file.size for file in layout.files], rank, count)
    places = {
        name: (offset, *borders)
        for file, borders in zip(layout.files, ranges, strict=True)
        for name, offset in file.offsets.items()
    }
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for tensor in tensors:
        if tensor.name in places and tensor.numel:
            offset, begin, end = places[tensor.name]
            first, stop = (
                min(
                    tensor.numel,
                    max(0, -((offset - border) // (tensor.dtype.size * grain)) * grain),
                )
                for border in (begin, end)
            )
            found[tensor.name, tensor.numel] = (first, stop)
    return found


def untied(tensors: Iterable[T], layout: Layout) -> list[T]:
    """Tensors that each stand for themselves wherever the layout has a place for each of them.

    The places of tied tensors may be parts of several processes, each of which makes its own.
    """
    placed = {name for file in layout.files for name in file.offsets}
    return [
        replace(tensor, tied_to=None) if tensor.name in placed else tensor for tensor in tensors
    ]


@dataclass(frozen=True)
class Split:
    """Some outputs that several processes make.

    Args:
        processes: Who makes them.
        targets: The outputs.
        plans: How they come about.
        grain: Elements of a tensor that are not split; where it is not 1, borders are not quite
            those of pages.
    """

    processes: Processes
    targets: Sequence[Target]
    plans: Sequence[Plan]
    grain: int = 1

    @property
    def tensors(self) -> list[list[TensorPlan]]:
        """What is computed for each output."""
        both = zip(self.plans, self.targets, strict=True)
        return [untied(plan.tensors, target.layout) for plan, target in both]

    @property
    def parts(self) -> dict[tuple[str, int], tuple[int, int]]:
        """What of it this process makes; several outputs are cut as the first of them."""
        found: dict[tuple[str, int], tuple[int, int]] = {}
        for target in reversed(self.targets):
            own = self.processes.rank, self.processes.count, self.grain
            found |= element_ranges(target.layout, target.tensors, *own)
        return found

    @contextmanager
    def opened(self) -> Iterator[list[FileSink]]:
        """Sinks for this process's parts, published once every process has filled its own.

        Raises:
            ProcessesError: The processes are not about to do the same, or another one has failed.
            OutputError: An output cannot be written; nothing is published then.
        """
        self._agree()
        targets = [
            replace(target, tensors=untied(target.tensors, target.layout))
            for target in self.targets
        ]
        with self._first(targets) if self.processes.rank == 0 else self._other(targets) as sinks:
            yield sinks
        try:
            self.processes.gather("published")
        except PeerError as error:
            if self.processes.rank:
                raise
            log.warning("%s, but only after the output was whole", error)

    def stream(self, jobs: Sequence[Job], extras: Extras, *, progress: Progress | None) -> Streamed:
        """Compute this process's part; returns what has come of all processes' parts together."""

        def look(done: int, total: int) -> None:
            self.processes.check()
            if progress is not None:  # by this one's pace, which is that of the others
                progress(done * self.processes.count, total * self.processes.count)

        extras = replace(extras, parts=self._parts_beside(extras) | self.parts)
        threads = default_threads(self.processes.neighbours)
        streamed = stream(jobs, extras, threads=threads, progress=look)
        mine = {
            "results": [[sorted(r.differing), sorted(r.nonfinite)] for r in streamed.results],
            "gram": None if streamed.gram is None else streamed.gram.tolist(),
        }
        streamed.gram = None
        for theirs in self.processes.gather(mine):
            for result, (differing, nonfinite) in zip(
                streamed.results, theirs["results"], strict=True
            ):
                result.differing.update(differing)
                result.nonfinite.update(nonfinite)
            if theirs["gram"] is not None:
                gram = torch.tensor(theirs["gram"], dtype=torch.float64)
                streamed.gram = gram if streamed.gram is None else streamed.gram + gram
        return streamed

    def unite(self, leaves: Sequence[Leaves]) -> None:
        """Put together what all processes have hashed of the same tensors."""
        mine = [
            {number: b64encode(zlib.compress(done)).decode() for number, done in one.done.items()}
            for one in leaves
        ]
        for theirs in self.processes.gather(mine):
            for one, done in zip(leaves, theirs, strict=True):
                one.merge({int(n): zlib.decompress(b64decode(text)) for n, text in done.items()})

    def _parts_beside(self, extras: Extras) -> dict[tuple[str, int], tuple[int, int]]:
        """Of tensors that are read and have no place in an output, the first process does all."""
        keys = {(plan.name, plan.output.numel) for plan in extras.gram}
        keys |= {("", tensor.numel) for tensor in extras.watched}
        return {key: (0, 0 if self.processes.rank else key[1]) for key in keys}

    @contextmanager
    def _first(self, targets: Sequence[Target]) -> Iterator[list[FileSink]]:
        """What the first process does: it makes the files, and publishes them in the end."""
        with outputs.opened(targets) as sinks:
            for sink in sinks:
                sink.flush()
            self.processes.gather([str(sink.root) for sink in sinks])
            yield sinks
            for theirs in self.processes.gather([])[1:]:
                for sink, checksums in zip(sinks, theirs, strict=True):
                    sink.take_checksums(checksums)

    @contextmanager
    def _other(self, targets: Sequence[Target]) -> Iterator[list[FileSink]]:
        """What the others do: they fill the files in."""
        roots = map(Path, self.processes.gather([])[0])
        with ExitStack() as files, _as_output_errors(targets):
            sinks = [
                files.enter_context(
                    FileSink(target.layout, root, target.tensors, path=target.path, made=True)
                )
                for target, root in zip(targets, roots, strict=True)
            ]
            yield sinks
            for sink in sinks:
                sink.flush()
            self.processes.gather([sink.checksums() for sink in sinks])

    def _agree(self) -> None:
        """Make sure that all processes see the same files and have the same in mind."""
        mine = {what: _digest(seen) for what, seen in self._account().items()}
        first, *others = self.processes.gather(mine)
        for rank, theirs in enumerate(others, 1):
            differing = [what for what in first if theirs[what] != first[what]]
            if differing:
                raise ProcessesError(
                    f"processes 0 and {rank} do not have the same {differing[0]}",
                    "Start all with the same command, on hosts that see the same files.",
                )

    def _account(self) -> dict[str, Iterable[object]]:
        """What has to be the same for all processes, by what a person would call it."""
        stamps = {s.path: s for plan in self.plans for c in plan.files for s in c.files}
        files = ((t.path, f.name, f.size, f.offsets) for t in self.targets for f in t.layout.files)
        return {
            "version of ckptavg": [__version__],
            "input files": ((s.path, s.size, s.mtime_ns, s.token) for s in stamps.values()),
            "selection": (str(c.path) for plan in self.plans for c in plan.checkpoints),
            "coefficients": (plan.coefficients for plan in self.plans),
            "tensors": (
                (t.name, t.shape, t.dtype.name, t.averaged, t.coefficients, t.tied_to)
                for plan in self.plans
                for t in plan.tensors
            ),
            "outputs": files,
        }


def _digest(values: Iterable[object]) -> str:
    found = hashlib.sha256()
    for value in values:
        found.update(repr(value).encode("utf-8", "backslashreplace"))
    return found.hexdigest()


@contextmanager
def _as_output_errors(targets: Sequence[Target]) -> Iterator[None]:
    """Turn the system's errors about an output's files into ours."""
    path = targets[0].path
    try:
        yield
    except FileNotFoundError as error:
        raise OutputError(
            f"this host does not see {path} as process 0 has begun it",
            "Choose another -o, on a file system that all hosts share.",
        ) from error
    except OSError as error:
        raise unwritable(path, error) from error
