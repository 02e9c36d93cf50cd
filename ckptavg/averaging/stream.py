"""The stream: computes averages block by block and reads each input byte once.

For every block, the same range is read from each checkpoint in turn, and is added to every average
that the checkpoint contributes to. ``accumulate`` has the arithmetic. The bits of the result depend
neither on the borders of blocks nor on the threads. A block is small enough for its sums to stay in
the processor's second-level cache, and for torch not to split an operation over several threads.
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

from ckptavg.averaging.accumulate import Observer, StreamResult, Worker
from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.averaging.read_groups import Group, Job, add_observed, group_reads
from ckptavg.distributed.threads import default_threads
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.reader import boxes
from ckptavg.io.paths import is_url

# Elements. torch runs operations of this size in the calling thread alone.
BLOCK = 1 << 15
# Elements, for tensors that are not one contiguous range. Larger, for fewer and longer reads.
STRIDED_BLOCK = 1 << 20
# Elements of a task, the work that a thread takes at a time. A task ends at multiples of this,
# counted from the start of a tensor.
TASK = 1 << 21
# Bytes that are read ahead by all threads together. Those of remote files are held in memory.
READ_AHEAD = 64 << 20
# Largest number of float64 that a thread holds at a time, to bound its memory.
_HELD = 1 << 20
# Guards torch's number of threads.
_SETTING = threading.Lock()

Progress = Callable[[int, int], None]
"""Function called as ``progress(done, total)`` in bytes of input, from the calling thread."""

Range = tuple[Group, int, int]
"""Group, index of the first element, end (exclusive)."""

Block = tuple[Group, int, int]
"""Group, index of the first element, number of elements."""

Parts = Mapping[tuple[str, int], tuple[int, int]]
"""Name and number of elements of a tensor → first element and end (exclusive)."""


@dataclass
class StreamRequests:
    """Further work of a stream besides the outputs.

    Attributes:
        order: The checkpoints in an order that agrees with every output's order; needed for
            several outputs.
        gram: Tensors whose sources are multiplied with each other: all of the same checkpoints.
        observed: Tensors whose bytes the observer receives, each once.
        observer: Receives the bytes of the observed tensors.
        parts: Part of each tensor that this stream computes. A tensor without an entry is computed
            as a whole.
    """

    order: Sequence[Checkpoint] = ()
    gram: Sequence[TensorPlan] = ()
    observed: Sequence[Tensor] = ()
    observer: Observer | None = None
    parts: Parts = field(default_factory=dict)


@dataclass
class StreamOutcome:
    """Results of a stream besides the outputs.

    Attributes:
        results: Result of each output: names of tensors that the user should know about.
        gram: Products of the first source, and of each further source minus the first: float64,
            (sources, sources). None where no products were requested.
    """

    results: list[StreamResult]
    gram: torch.Tensor | None = None


def stream(
    jobs: Sequence[Job],
    requests: StreamRequests | None = None,
    *,
    block: int = BLOCK,
    threads: int | None = None,
    progress: Progress | None = None,
) -> StreamOutcome:
    """Compute every tensor of several outputs, and write the blocks to the outputs' sinks.

    Args:
        jobs: The outputs.
        requests: Further work on the tensors that are read.
        block: Largest number of elements per block. The result does not depend on the number.
        threads: Number of threads; ``default_threads()`` where None. The result does not depend on
            the number.
        progress: Called with the bytes read and the total of bytes to read.

    Returns:
        The results besides the outputs.

    Raises:
        NonFiniteError: An average is not finite, and the job does not keep such averages.
        CheckpointError: A file cannot be read, or has changed.
    """
    requests = requests or StreamRequests()
    groups = group_reads(jobs, requests.order, requests.gram)
    if requests.observer is not None:
        groups = add_observed(groups, requests.observed)
    ranges = _choose_ranges(groups, requests.parts)
    workers = threads or default_threads()
    remote = any(map(_is_remote, groups))
    shared = _Shared(jobs, requests.observer, READ_AHEAD // workers, remote=remote)
    report = progress or _report_nothing
    total, bytes_done = sum(map(_input_bytes, ranges)), 0
    report(bytes_done, total)
    with closing(shared), start_threads(workers) as pool:
        running: deque[Future[_Done]] = deque()
        try:
            for task in _tasks(ranges, block):
                running.append(pool.submit(shared.run, task))
                # The queue is bounded, so that tasks of a large run do not fill the memory. Results
                # are taken in the order of the tasks, on which the bits of the products depend.
                if len(running) >= 4 * workers:
                    bytes_done += shared.take(running.popleft().result())
                    report(bytes_done, total)
            while running:
                bytes_done += shared.take(running.popleft().result())
                report(bytes_done, total)
        finally:
            # After an error or Ctrl-C, running tasks stop at their next block and no other begins.
            shared.stopped.set()
            for future in running:
                future.cancel()
    return shared.outcome


@contextmanager
def start_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads whose arithmetic does not depend on the process's settings.

    The threads end when the context manager is left.
    """
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
    """Set up the calling thread's arithmetic, independent of the process's settings."""
    # A thread begins with its parent's rounding of denormals. This sets it for this thread alone.
    torch.set_flush_denormal(False)
    _keep_to_one_thread()


def _keep_to_one_thread() -> None:
    """Keep torch from splitting operations of the calling thread over several threads.

    torch applies a number of threads to the thread that sets it, and to threads that start later.
    So another thread restores the number for later threads, and no other code is affected.
    """
    with _SETTING:
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        thread = threading.Thread(target=torch.set_num_threads, args=(count,))
        thread.start()
        thread.join()


def _report_nothing(_done: int, _total: int) -> None:
    """Ignore the progress."""


def _choose_ranges(groups: Sequence[Group], parts: Parts) -> list[Range]:
    """Return the elements of each group that the stream computes."""
    ranges: list[Range] = []
    for group in groups:
        start, end = parts.get((group.name, group.numel), (0, group.numel))
        ranges.append((group, start, end))
    return ranges


def _is_remote(group: Group) -> bool:
    """Tell whether bytes of a group are read from a URL."""
    return any(is_url(piece.file) for source in group.sources for piece in source.pieces)


def _input_bytes(part: Range) -> int:
    group, start, end = part
    return group.input_bytes * (end - start) // group.numel


def _tasks(ranges: Sequence[Range], block: int) -> Iterator[list[Block]]:
    """Cut ranges into blocks, and collect the blocks into tasks.

    Args:
        ranges: Group, first element and end (exclusive) of each range.
        block: Largest number of elements per block.

    Yields:
        Lists of blocks as (group, first element, count), in the order of the ranges.
    """
    task: list[Block] = []
    filled = 0
    for group, begin, end in ranges:
        # Tasks end at multiples of TASK, so that a thread has whole leaves of the digests.
        cuts = [begin, *range(begin // TASK * TASK + TASK, end, TASK), end]
        for start, stop in pairwise(cuts):
            task += _blocks(group, start, stop, block)
            filled += stop - start
            if filled >= TASK:
                yield task
                task, filled = [], 0
    if task:
        yield task


def _blocks(group: Group, start: int, end: int, block: int) -> Iterator[Block]:
    """Cut a range of a group into blocks.

    Args:
        group: The tensors.
        start: Index of the first element.
        end: Index after the last element.
        block: Largest number of elements per block.

    Yields:
        Each block as (group, first element, count).
    """
    # Number of float64 per element that a thread holds at a time.
    doubles = len(group.outputs) + len(group.products) + len(group.spread) + 1
    if not group.contiguous:
        # Up to twice this, where reads would be very short otherwise.
        fair = 2 * STRIDED_BLOCK // doubles
        size = max(1, fair, min(block, 2 * fair))
        for first, count in boxes(group.shape, start, end, size):
            yield group, first, count
        return
    size = max(1, min(block, _HELD // doubles))
    for first in range(start, end, size):
        yield group, first, min(size, end - first)


def _bundles(task: list[Block], limit: int) -> Iterator[list[Block]]:
    """Bundle the blocks of a task that are requested together.

    Args:
        task: The blocks.
        limit: Largest number of bytes per bundle, over all sources. A larger block is a bundle of
            its own.
    """
    bundle: list[Block] = []
    filled = 0
    for block in task:
        nbytes = _block_bytes(block)
        if bundle and filled + nbytes > limit:
            yield bundle
            bundle, filled = [], 0
        bundle.append(block)
        filled += nbytes
    yield bundle


def _block_bytes(block: Block) -> int:
    group, _, count = block
    return group.input_bytes * count // group.numel


class _Shared:
    """State that the threads of a stream share. Each thread has a separate worker."""

    def __init__(
        self, jobs: Sequence[Job], observer: Observer | None, ahead: int, *, remote: bool
    ) -> None:
        self.jobs = jobs
        self.observer = observer
        # Bytes that are read ahead for each thread.
        self.ahead = ahead
        self.remote = remote
        self.outcome = StreamOutcome([StreamResult() for _ in jobs])
        self.stopped = threading.Event()
        self.workers: list[Worker] = []
        self._local = threading.local()

    def close(self) -> None:
        """Close the files, once the threads have ended."""
        for worker in self.workers:
            worker.close()

    def run(self, task: list[Block]) -> _Done:
        """Compute the blocks of a task.

        Raises:
            NonFiniteError: An average is not finite, and the job does not keep such averages.
            CheckpointError: A file cannot be read.
        """
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = Worker(self.jobs, self.outcome.results, self.observer)
            self.workers.append(worker)
        bytes_done = 0
        try:
            for block in self._read_ahead(worker, task):
                if self.stopped.is_set():
                    break
                worker.block(*block)
                bytes_done += _block_bytes(block)
        except BaseException:
            # The output is dropped after an error, so other threads need not finish their tasks.
            self.stopped.set()
            raise
        return _Done(bytes_done, worker.take_gram())

    def take(self, done: _Done) -> int:
        """Add the products of a finished task to the total, and return the task's bytes.

        Tasks have to be taken in order, since the bits of a sum depend on the order.
        """
        if done.gram is not None:
            if self.outcome.gram is None:
                self.outcome.gram = done.gram
            else:
                self.outcome.gram = self.outcome.gram + done.gram
        return done.nbytes

    def _read_ahead(self, worker: Worker, task: list[Block]) -> Iterator[Block]:
        """Yield the blocks of a task in order, while the next blocks are read ahead."""
        bundles = list(_bundles(task, self.ahead))
        for i, bundle in enumerate(bundles):
            if self.stopped.is_set():
                return
            if not self.remote:
                # At first the present bundle and the next, then always the next one.
                for soon in bundles[i and i + 1 : i + 2]:
                    worker.advise(soon)
            # A bundle that is too large to be held is read in parts, as the blocks need them.
            elif sum(map(_block_bytes, bundle)) <= self.ahead:
                worker.fetch(bundle)
            yield from bundle


class _Done(NamedTuple):
    """Result of a finished task: the bytes read, and the products where requested."""

    nbytes: int
    gram: torch.Tensor | None
