"""Passes over the data for groups of models, with smaller groups after running out of memory."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.models.runtime import Runtime, is_out_of_memory

log = logging.getLogger("ckptavg")
T = TypeVar("T")


def log_pass_count(count: int, passes: int) -> None:
    """Log the number of passes over the data if there are several candidates."""
    if count > 1:
        noun = "passes"
        if passes == 1:
            noun = "pass"
        log.info("%d candidates, %d %s", count, passes, noun)


class ExhaustedElsewhereError(MemoryError):
    """An error of this process after another process ran out of memory.

    The error is raised when the processes exchange values.
    """


class OomSynchronizedPeers:
    """Processes that restart a pass together if any process runs out of memory.

    All exchanges of a pass go through this class. A pass ends with a call of ``agree``, so that
    each process learns of a failure before the next pass.

    Args:
        peers: The processes.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    def __init__(self, peers: Peers) -> None:
        self.rank = peers.rank
        self.world_size = peers.world_size
        self._peers = peers

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from every process, in the order of ranks.

        Raises:
            ExhaustedElsewhereError: Another process has run out of memory.
        """
        values: list[Any] = []
        for is_exhausted, peer_value in self._peers.gather([False, value]):
            if is_exhausted:
                raise ExhaustedElsewhereError
            values.append(peer_value)
        return values

    def check(self) -> None:
        """Raise an error if another process is known to have failed."""
        self._peers.check()

    def agree(self) -> None:
        """Wait until all processes reach this point."""
        self.gather(None)

    def report_oom(self) -> None:
        """Report to all processes, in the next exchange, that this process ran out of memory."""
        self._peers.gather([True, None])


def run_in_groups_that_fit(
    groups: Iterable[Sequence[T]],
    run: Callable[[Sequence[T], int, int], None],
    runtime: Runtime,
    peers: OomSynchronizedPeers,
) -> None:
    """Run a pass for each group, and halve all remaining groups after running out of memory.

    Args:
        groups: Groups of candidates that share a pass over the data.
        run: Called as ``run(group, number, of)``, pass ``number`` of ``of``. It must be able to
            start again after an error, and must call ``agree`` on the processes before it returns.
        runtime: Device and batch size of the pass, for the error message.
        peers: The processes that run the same passes.

    Raises:
        EvaluationError: Memory is too small for a single candidate.
    """
    waiting, passes_done = deque(groups), 0
    while waiting:
        group = waiting.popleft()
        try:
            run(group, passes_done + 1, passes_done + 1 + len(waiting))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # All processes already know of an error of another process.
            if not isinstance(error, ExhaustedElsewhereError):
                peers.report_oom()
            if len(group) == 1:
                raise _too_small(runtime) from error
        else:
            passes_done += 1
            continue
        waiting = deque(_in_parts([group, *waiting], (len(group) + 1) // 2))
        log.info(
            "memory is too small for %d models at a time: trying fewer, in %d passes",
            len(group),
            passes_done + len(waiting),
        )
        # Free the models that the error's frames held, in case the frames are in a cycle.
        gc.collect()


def _in_parts(groups: Iterable[Sequence[T]], size: int) -> Iterator[Sequence[T]]:
    """Split groups into parts of at most a given size."""
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _too_small(runtime: Runtime) -> EvaluationError:
    """Build the error for a device whose memory is too small for a single model."""
    return EvaluationError(
        f"the memory of {runtime.device} is too small for a single model",
        f"Lower `batch_size` (now {runtime.batch_size}), or name another `device`.",
    )
