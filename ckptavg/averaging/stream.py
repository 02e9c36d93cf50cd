"""The stream: byte ranges × coefficients → tensors, block by block, each input byte read once.

For every block the same range is read from each checkpoint in turn and goes into every average that
takes it; ``blocks`` says what is computed. Nothing depends on where blocks begin or which thread
does them, so the bits do not either. A block is small enough for its sums to stay in the
processor's second-level cache, and for torch not to split it over threads of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from ckptavg.averaging.accumulate import StreamResult, Watcher, Worker
from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.averaging.read_groups import Group, Job, grouped, watching
from ckptavg.distributed.threads import default_threads
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.reader import boxes
from ckptavg.io.paths import is_url

BLOCK = 1 << 15  # elements; torch runs an operation on as many in the calling thread
STRIDED_BLOCK = (
    1 << 20
)  # elements of a tensor that is not one contiguous range: fewer, longer reads
TASK = 1 << 21  # elements that a thread takes at a time; tasks end at its multiples in a tensor
READ_AHEAD = 64 << 20  # bytes that are on their way; of remote files, held
_HELD = 1 << 20  # float64 that a thread holds at a time, at most
_SETTING = threading.Lock()  # of torch's number of threads

Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` in bytes of input, from the calling thread."""

Range = tuple[Group, int, int]
Parts = Mapping[tuple[str, int], tuple[int, int]]
"""First and last element, exclusive, of tensors, by name and number of elements."""


@dataclass
class Extras:
    """What a stream does beside its outputs.

    Attributes:
        order: The checkpoints in the order that all outputs share; needed where there are several.
        gram: Tensors whose sources are multiplied with each other: all of the same checkpoints.
        watched: Tensors that are shown to the watcher, each once.
        watcher: Sees their bytes.
        parts: What of each tensor is done here; all of it where one is missing.
    """

    order: Sequence[Checkpoint] = ()
    gram: Sequence[TensorPlan] = ()
    watched: Sequence[Tensor] = ()
    watcher: Watcher | None = None
    parts: Parts = field(default_factory=dict)


@dataclass
class Streamed:
    """What came of a stream beside its outputs.

    Attributes:
        results: What was noticed about each output.
        gram: Products of the first source and of the others minus the first, where asked for:
            float64, (sources, sources).
    """

    results: list[StreamResult]
    gram: torch.Tensor | None = None


def stream(
    jobs: Sequence[Job],
    extras: Extras | None = None,
    *,
    block: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Streamed:
    """Compute every tensor of some outputs and hand the blocks to their sinks.

    Args:
        jobs: The outputs.
        extras: What else is wanted of what is read.
        block: Elements a block, at most. The result does not depend on it.
        threads: How many; ``default_threads()`` where None. Nor on this.
        progress: Told about the bytes read.

    Raises:
        NonFiniteError: An average is not finite, and its job does not keep such.
        CheckpointError: A file cannot be read, or changed.
    """
    extras = extras or Extras()
    groups = grouped(jobs, extras.order, extras.gram)
    if extras.watcher is not None:
        groups = watching(groups, extras.watched)
    ranges = [(g, *extras.parts.get((g.name, g.numel), (0, g.numel))) for g in groups]
    workers = threads or default_threads()
    remote = any(is_url(piece.file) for g in groups for t in g.sources for piece in t.pieces)
    shared = _Shared(jobs, extras.watcher, READ_AHEAD // workers, remote=remote)
    report = progress or (lambda *_: None)
    total, done = sum(map(_input_bytes, ranges)), 0
    report(done, total)
    with closing(shared), start_threads(workers) as pool:
        running: deque[Future[_Done]] = deque()
        try:
            for task in _tasks(ranges, block):
                running.append(pool.submit(shared.run, task))
                if len(running) >= 4 * workers:
                    done += shared.take(running.popleft().result())
                    report(done, total)
            while running:
                done += shared.take(running.popleft().result())
                report(done, total)
        finally:
            shared.stopped.set()
            for future in running:
                future.cancel()
    return shared.streamed


@contextmanager
def start_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads whose arithmetic does not depend on the process's settings; ended on leaving."""
    pool = ThreadPoolExecutor(count, "ckptavg", _set_up_thread)
    try:
        yield pool
    finally:
        try:
            pool.shutdown()
        except BaseException:
            # A signal must not leave a thread behind that writes: the number of the file that it
            # writes to may be another file's by then.
            pool.shutdown()
            raise


def _set_up_thread() -> None:
    """Give the calling thread the arithmetic that every result has, whatever the process set."""
    # A thread begins with its parent's rounding of denormals. This sets it for this thread alone.
    torch.set_flush_denormal(False)
    _stay_alone()


def _stay_alone() -> None:
    """Keep torch from splitting the calling thread's operations over threads of its own.

    torch takes the number of threads for the one that sets it and for those that begin later; the
    latter is put back by another, so that nobody else is concerned.
    """
    with _SETTING:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        other = threading.Thread(target=torch.set_num_threads, args=(usual,))
        other.start()
        other.join()


def _input_bytes(part: Range) -> int:
    group, start, end = part
    return group.input_bytes * (end - start) // group.numel


def _tasks(ranges: Sequence[Range], block: int) -> Iterator[list[Range]]:
    """Blocks as (group, first element, count) in the order given, bundled into pieces of work."""
    task: list[Range] = []
    filled = 0
    for group, begin, end in ranges:
        cuts = [begin, *range(begin // TASK * TASK + TASK, end, TASK), end]
        for start, stop in pairwise(cuts):
            task += [(group, at, count) for at, count in _blocks(group, start, stop, block)]
            filled += stop - start
            if filled >= TASK:
                yield task
                task, filled = [], 0
    if task:
        yield task


def _blocks(group: Group, start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    held = len(group.members) + len(group.products) + 1  # float64 at a time for an element
    if not group.contiguous:
        fair = 2 * STRIDED_BLOCK // held  # and twice that where reads would be very short
        return boxes(group.shape, start, end, max(1, fair, min(block, 2 * fair)))
    size = max(1, min(block, _HELD // held))
    return ((at, min(size, end - at)) for at in range(start, end, size))


def _bundles(task: list[Range], limit: int) -> Iterator[list[Range]]:
    """Blocks that are asked for together: as many as the limit allows, in bytes of all sources."""
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
    group, _, count = block
    return group.input_bytes * count // group.numel


class _Shared:
    """What the threads of one stream have in common; each has a worker of its own."""

    def __init__(
        self, jobs: Sequence[Job], watcher: Watcher | None, ahead: int, *, remote: bool
    ) -> None:
        self.jobs = jobs
        self.watcher = watcher
        self.ahead = ahead  # bytes that are on their way to a thread before it uses them
        self.remote = remote
        self.streamed = Streamed([StreamResult() for _ in jobs])
        self.stopped = threading.Event()
        self.workers: list[Worker] = []
        self._local = threading.local()

    def close(self) -> None:
        """Close the files, once the threads have ended."""
        for worker in self.workers:
            worker.close()

    def run(self, task: list[Range]) -> _Done:
        """Do a piece of work."""
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = Worker(self.jobs, self.streamed.results, self.watcher)
            self.workers.append(worker)
        done = 0
        try:
            for block in self._prepared(worker, task):
                if self.stopped.is_set():
                    break
                worker.block(*block)
                done += _block_bytes(block)
        except BaseException:
            self.stopped.set()
            raise
        return _Done(done, worker.take_gram())

    def take(self, done: _Done) -> int:
        """Add up what a piece of work has found, in the order of the pieces; returns its bytes."""
        if done.gram is not None:
            before = self.streamed.gram
            self.streamed.gram = done.gram if before is None else before + done.gram
        return done.nbytes

    def _prepared(self, worker: Worker, task: list[Range]) -> Iterator[Range]:
        """Blocks in turn, with the next ones on their way while some are computed."""
        bundles = list(_bundles(task, self.ahead))
        for i, bundle in enumerate(bundles):
            if self.stopped.is_set():
                return
            if not self.remote:
                for soon in bundles[i and i + 1 : i + 2]:
                    worker.advise(soon)
            elif sum(map(_block_bytes, bundle)) <= self.ahead:  # else it is read by parts
                worker.fetch(bundle)
            yield from bundle


class _Done(NamedTuple):
    """A finished piece of work: bytes read, and products if any."""

    nbytes: int
    gram: torch.Tensor | None
