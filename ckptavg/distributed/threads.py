"""The number of processor threads that compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_MOST = 4  # that an average is faster with
_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Let torch and averages compute by some threads only; afterwards all is as before.

    Args:
        count: Threads, at least 1.
    """
    usual = torch.get_num_threads()
    token = _limit.set(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
        _limit.reset(token)


def default_threads(sharing: int = 1) -> int:
    """As many threads for an average as processors, 4 at most, and no more than the limit.

    Args:
        sharing: Processes that share the processors.
    """
    usual = max(1, min(_MOST, (os.cpu_count() or 1) // sharing))
    return min(usual, _limit.get() or usual)
