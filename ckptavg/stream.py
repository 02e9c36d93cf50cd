"""The stream: byte ranges × coefficients → tensors, block by block.

For every block of an output tensor the same range is read from each checkpoint in turn, widened to
float64, multiplied by its coefficient and added up; each product and each sum is rounded on its
own. One division by the sum of the coefficients and one conversion to the output's type follow.
Nothing depends on where blocks begin or which thread does them, so the bits do not either. A block
is small enough for its accumulator to stay in the processor's second-level cache, and for torch not
to split it over threads of its own.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field

import torch

from ckptavg.errors import NonFiniteError
from ckptavg.formats.reading import Reader, boxes
from ckptavg.formats.storage import is_url
from ckptavg.formats.table import DType, Piece, Tensor
from ckptavg.formats.writing import Sink
from ckptavg.plan import TensorPlan

BLOCK = 1 << 15  # elements; torch runs an operation on as many in the calling thread
STRIDED_BLOCK = (
    1 << 20
)  # elements of a tensor that is not one contiguous range: fewer, longer reads
TASK = 1 << 21  # elements that a thread takes at a time
READ_AHEAD = 64 << 20  # bytes of remote files that all threads together hold

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` in bytes of input, from the calling thread."""


@dataclass
class StreamResult:
    """What the stream noticed.

    Attributes:
        differing: Integer tensors that are not the same in every checkpoint.
        nonfinite: Tensors whose average is not finite where the inputs do not agree on that.
    """

    differing: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)


def stream(
    tensors: Sequence[TensorPlan],
    sink: Sink,
    *,
    keep_nonfinite: bool = False,
    block: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> StreamResult:
    """Compute every tensor of a plan and hand the blocks to a sink.

    Args:
        tensors: What to compute; tied ones are computed once, under their first name.
        sink: Takes the blocks, from several threads and in any order.
        keep_nonfinite: Write an average that is not finite as it is.
        block: Elements a block. The result does not depend on it.
        threads: How many; as many as processors, 4 at most, where None. Nor on this.
        progress: Told about the bytes read.

    Raises:
        NonFiniteError: An average is not finite, and ``keep_nonfinite`` is false.
        CheckpointError: A file cannot be read, or changed.
    """
    own = [tensor for tensor in tensors if tensor.tied_to is None and tensor.output.numel]
    total = sum(tensor.input_bytes for tensor in own)
    workers = threads or min(4, os.cpu_count() or 1)
    remote = any(is_url(piece.file) for piece in _pieces(own))
    shared = _Shared(sink, keep_nonfinite, READ_AHEAD // workers if remote else 0)
    report = progress or (lambda *_: None)
    done = 0
    report(done, total)
    with closing(shared), ThreadPoolExecutor(workers, "ckptavg") as pool:
        running: set[Future[int]] = set()
        try:
            for task in _tasks(own, block):
                running.add(pool.submit(shared.run, task))
                if len(running) >= 4 * workers:
                    ready, running = wait(running, return_when=FIRST_COMPLETED)
                    done += sum(future.result() for future in ready)
                    report(done, total)
            while running:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                done += sum(future.result() for future in ready)
                report(done, total)
        finally:
            shared.stopped.set()
            for future in running:
                future.cancel()
    return shared.result


Range = tuple[TensorPlan, int, int]


def _tasks(tensors: Sequence[TensorPlan], block: int) -> Iterator[list[Range]]:
    """Blocks in the order of the output, bundled into pieces of work."""
    task: list[Range] = []
    filled = 0
    for tensor in tensors:
        for start, count in _blocks(tensor, block):
            task.append((tensor, start, count))
            filled += count
            if filled >= TASK:
                yield task
                task, filled = [], 0
    if task:
        yield task


def _pieces(tensors: Sequence[TensorPlan]) -> Iterator[Piece]:
    for tensor in tensors:
        for source in (*tensor.sources, *tensor.compared):
            yield from source.pieces


def _blocks(tensor: TensorPlan, block: int) -> Iterator[tuple[int, int]]:
    numel = tensor.output.numel
    if all(source.contiguous for source in (*tensor.sources, *tensor.compared)):
        yield from ((start, min(block, numel - start)) for start in range(0, numel, block))
    else:
        yield from boxes(tensor.shape, max(block, STRIDED_BLOCK))


def _bundles(task: list[Range], limit: int) -> Iterator[list[Range]]:
    """Blocks that are fetched together: as many as the limit allows, in bytes of all sources."""
    bundle: list[Range] = []
    filled = 0
    for block in task:
        nbytes = _block_bytes(block)
        if bundle and filled + nbytes > limit:
            yield bundle
            bundle, filled = [], 0
        bundle.append(block)
        filled += nbytes
    yield bundle


def _block_bytes(block: Range) -> int:
    tensor, _, count = block
    return tensor.input_bytes * count // tensor.output.numel


class _Shared:
    """What the threads of one stream have in common; each has a worker of its own."""

    def __init__(self, sink: Sink, keep_nonfinite: bool, ahead: int) -> None:
        self.sink = sink
        self.ahead = ahead  # bytes that a thread may fetch before it uses them
        self.keep_nonfinite = keep_nonfinite
        self.result = StreamResult()
        self.stopped = threading.Event()
        self.workers: list[_Worker] = []
        self._local = threading.local()

    def close(self) -> None:
        """Close the files, once the threads have ended."""
        for worker in self.workers:
            worker.reader.close()

    def run(self, task: list[Range]) -> int:
        """Do a piece of work and return the bytes that were read for it."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self)
            self.workers.append(worker)
        done = 0
        for bundle in _bundles(task, self.ahead) if self.ahead else [task]:
            if self.ahead and not self.stopped.is_set():
                worker.fetch(bundle)
            for tensor, start, count in bundle:
                if self.stopped.is_set():
                    break
                done += worker.block(tensor, start, count)
        return done


class _Worker:
    """One thread's reader and buffers."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared
        self.reader = Reader()
        self._buffers: dict[str, bytearray] = {}

    def block(self, tensor: TensorPlan, start: int, count: int) -> int:
        """Compute one block and hand it to the sink; returns the bytes read."""
        compute = self._average if tensor.averaged else self._copy
        out = compute(tensor, start, count)
        self.shared.sink.write(tensor.name, start * tensor.dtype.size, out)
        return _block_bytes((tensor, start, count))

    def fetch(self, bundle: list[Range]) -> None:
        """Ask for some blocks of remote files at once; one that is too large is read by parts."""
        if sum(map(_block_bytes, bundle)) <= self.shared.ahead:
            self.reader.fetch(
                (source, start, count)
                for tensor, start, count in bundle
                for source in (*tensor.sources, *tensor.compared)
            )

    def _average(self, tensor: TensorPlan, start: int, count: int) -> memoryview:
        floats = count * (2 if tensor.dtype.kind == "complex" else 1)
        total, term = self._doubles("total", floats), self._doubles("term", floats)
        for i, (source, coefficient) in enumerate(
            zip(tensor.sources, tensor.coefficients, strict=True)
        ):
            values = self._read_values(source, start, count)
            target = term if i else total
            target.copy_(values)
            if coefficient != 1.0:
                target.mul_(coefficient)
            if i:
                total.add_(term)
        divisor = math.fsum(tensor.coefficients) if tensor.divisor is None else tensor.divisor
        if divisor != 1.0:
            total.div_(divisor)
        raw = self._bytes("out", count * tensor.dtype.size)
        out = _view(raw, tensor.dtype)
        out.copy_(total)
        if not _is_finite(out):
            self._handle_nonfinite(tensor, start, count, out)
        return raw

    def _copy(self, tensor: TensorPlan, start: int, count: int) -> memoryview:
        """The bytes of the only source; notes whether the other checkpoints' differ."""
        nbytes = count * tensor.dtype.size
        raw = self._bytes("in", nbytes)
        self.reader.read(tensor.sources[0], start, count, raw)
        for source in tensor.compared:
            other = self._bytes("other", count * source.dtype.size)
            self.reader.read(source, start, count, other)
            mine, theirs = _view(raw, tensor.dtype), _view(other, source.dtype)
            if not torch.equal(mine.to(torch.int64), theirs.to(torch.int64)):
                self.shared.result.differing.add(tensor.name)
        return raw

    def _handle_nonfinite(
        self, tensor: TensorPlan, start: int, count: int, out: torch.Tensor
    ) -> None:
        """Accept what is not finite and the same everywhere; say where the rest is from."""
        suspect = ~torch.isfinite(out)
        agreed = suspect.clone()
        first: torch.Tensor | None = None
        for source in tensor.sources:
            values = self._read_values(source, start, count).to(torch.float64, copy=True)
            first = values if first is None else first
            agreed &= ~torch.isfinite(values)
            agreed &= (values == first) | (values.isnan() & first.isnan())
        if first is not None:
            out[agreed] = first[agreed].to(out.dtype)
        if bool((suspect & ~agreed).any()):
            self._refuse(tensor, start, count, suspect & ~agreed)

    def _refuse(self, tensor: TensorPlan, start: int, count: int, wrong: torch.Tensor) -> None:
        if self.shared.keep_nonfinite:
            self.shared.result.nonfinite.add(tensor.name)
            return
        for source, owner in zip(tensor.sources, tensor.owners, strict=True):
            values = self._read_values(source, start, count)
            if bool((wrong & ~torch.isfinite(values)).any()):
                kind = "NaN" if bool((wrong & values.isnan()).any()) else "infinite"
                raise NonFiniteError(
                    f"{tensor.name} is {kind} in {owner.path}",
                    "Leave the checkpoint out, or pass --on-nonfinite keep.",
                )
        raise NonFiniteError(
            f"the average of {tensor.name} is too large for {tensor.dtype.name}",
            "Write a wider type with --dtype float32 or float64.",
        )

    def _read_values(self, source: Tensor, start: int, count: int) -> torch.Tensor:
        """A block of a source as floats, a complex number as two; valid until the next one."""
        raw = self._bytes("in", count * source.dtype.size)
        self.reader.read(source, start, count, raw)
        return _view(raw, source.dtype)

    def _doubles(self, name: str, count: int) -> torch.Tensor:
        return torch.frombuffer(self._bytes(name, count * 8), dtype=torch.float64)

    def _bytes(self, name: str, size: int) -> memoryview:
        """The beginning of a buffer that grows as needed and is used again and again."""
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = bytearray(size)
        return memoryview(buffer)[:size]


_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


def _view(raw: memoryview, dtype: DType) -> torch.Tensor:
    return torch.frombuffer(raw, dtype=getattr(torch, _REAL.get(dtype.name, dtype.name)))


def _is_finite(values: torch.Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN shows in both
    return math.isfinite(low) and math.isfinite(high)
