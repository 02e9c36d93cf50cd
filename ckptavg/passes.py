"""How many passes over the data: groups that fit in memory, smaller ones where they do not."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ckptavg.errors import EvaluationError
from ckptavg.processes import Peers
from ckptavg.runtime import Runtime, is_out_of_memory

log = logging.getLogger("ckptavg")
T = TypeVar("T")


def say(count: int, passes: int) -> None:
    """Say into how many passes some candidates go; of one by itself there is nothing to say."""
    if count > 1:
        log.info("%d candidates, %d %s", count, passes, "pass" if passes == 1 else "passes")


def run_passes(
    groups: Iterable[Sequence[T]],
    run: Callable[[Sequence[T], int, int], None],
    runtime: Runtime,
    peers: Peers,
) -> None:
    """Run a pass for each group; where memory is exhausted, one for each half of it.

    Args:
        groups: What goes through the data together.
        run: Called as ``run(group, number, of)``; must be able to start again after an error.
        runtime: Where it runs.
        peers: The processes that do the same; with several, groups stay as they are.

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
            if len(group) == 1 or peers.count > 1:
                raise _too_small(len(group), runtime) from error
            log.info("memory is too small for %d models at a time: trying fewer", len(group))
            half = len(group) // 2
            waiting.extendleft([group[half:], group[:half]])
        else:
            done += 1


def _too_small(count: int, runtime: Runtime) -> EvaluationError:
    models = "a single model" if count == 1 else f"{count} models at a time"
    return EvaluationError(
        f"the memory of {runtime.device} is too small for {models}",
        f"Lower --batch-size (now {runtime.batch_size}), or name another --device.",
    )
