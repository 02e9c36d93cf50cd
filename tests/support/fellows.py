"""Processes that share data, played by threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Echo:
    """One of several processes, the others of which hand in what it does."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank = rank
        self.world_size = count

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def check(self) -> None:
        pass


class Fellow:
    """One of several threads that gather as processes do: by JSON, and each waits for all."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.world_size = len(values)
        self._values = values
        self._barrier = barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = json.dumps(value)
        self._barrier.wait(60)
        found = [json.loads(text) for text in self._values]
        self._barrier.wait(60)
        return found

    def check(self) -> None:
        pass


def together(count: int, work: Callable[[Fellow], T]) -> Sequence[T]:
    """What each of so many fellows' work gives; an error of one is an error of all."""
    barrier, values = threading.Barrier(count), [None] * count

    def one(rank: int) -> T:
        try:
            return work(Fellow(rank, values, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(one, rank) for rank in range(count)]
    errors = [future.exception() for future in running if future.exception() is not None]
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return [future.result() for future in running]
