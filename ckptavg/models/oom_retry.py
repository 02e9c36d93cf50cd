"""How many passes over the data: groups that fit in memory, smaller ones where they do not."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ckptavg.distributed.processes import Peers
from ckptavg.errors import EvaluationError
from ckptavg.models.device import Runtime, is_out_of_memory

log = logging.getLogger("ckptavg")
T = TypeVar("T")


def say(count: int, passes: int) -> None:
    """Say into how many passes some candidates go; of one by itself there is nothing to say."""
    if count > 1:
        log.info("%d candidates, %d %s", count, passes, "pass" if passes == 1 else "passes")


class ExhaustedElsewhereError(MemoryError):
    """Memory is exhausted in another process, which this one hears when all hand something in."""


class Together:
    """Processes that start a pass again together where memory is exhausted in one of them.

    Whatever they hand in during a pass goes through here, and something at its end: ``agree``.

    Args:
        peers: The processes.

    Attributes:
        rank: This one's number, from 0.
        count: How many there are.
    """

    def __init__(self, peers: Peers) -> None:
        self.rank = peers.rank
        self.count = peers.count
        self._peers = peers

    def gather(self, value: Any) -> list[Any]:
        """What every process hands in, in their order.

        Raises:
            ExhaustedElsewhereError: One of them has no memory left.
        """
        found = self._peers.gather([False, value])
        if any(exhausted for exhausted, _ in found):
            raise ExhaustedElsewhereError
        return [given for _, given in found]

    def check(self) -> None:
        """Raise an error if another process is known to have failed."""
        self._peers.check()

    def agree(self) -> None:
        """Wait until all are where this one is."""
        self.gather(None)

    def tell(self) -> None:
        """Let the others know that memory is exhausted, when they next hand something in."""
        self._peers.gather([True, None])


def run_passes(
    groups: Iterable[Sequence[T]],
    run: Callable[[Sequence[T], int, int], None],
    runtime: Runtime,
    peers: Together,
) -> None:
    """Run a pass for each group; where memory is exhausted, for parts of half its size.

    The groups that are still to come are parted likewise, since they would not fit either.

    Args:
        groups: What goes through the data together.
        run: Called as ``run(group, number, of)``; must be able to start again after an error, and
            lets the processes agree before it ends.
        runtime: Where it runs.
        peers: The processes that do the same.

    Raises:
        EvaluationError: Memory is too small for a single one.
    """
    waiting, done = deque(groups), 0
    while waiting:
        group = waiting.popleft()
        try:
            run(group, done + 1, done + 1 + len(waiting))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not isinstance(error, ExhaustedElsewhereError):
                peers.tell()
            if len(group) == 1:
                raise _too_small(runtime) from error
        else:
            done += 1
            continue
        waiting = deque(_in_parts([group, *waiting], (len(group) + 1) // 2))
        log.info(
            "memory is too small for %d models at a time: trying fewer, in %d passes",
            len(group),
            done + len(waiting),
        )
        gc.collect()  # models that the error's frames held, if these are in a cycle


def _in_parts(groups: Iterable[Sequence[T]], size: int) -> Iterator[Sequence[T]]:
    """Groups, those of more than so many in parts."""
    for group in groups:
        yield from (group[at : at + size] for at in range(0, len(group), size))


def _too_small(runtime: Runtime) -> EvaluationError:
    return EvaluationError(
        f"the memory of {runtime.device} is too small for a single model",
        f"Lower --batch-size (now {runtime.batch_size}), or name another --device.",
    )
