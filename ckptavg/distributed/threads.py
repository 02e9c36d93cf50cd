"""Number of processor threads for computing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# More threads do not make an average faster.
_MOST = 4
_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def limit_threads(count: int) -> Iterator[None]:
    """Limit the threads of torch and of averages inside a context.

    Args:
        count: Number of threads, at least 1.
    """
    before = torch.get_num_threads()
    token = _limit.set(count)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _limit.reset(token)


def default_threads(sharing: int = 1) -> int:
    """Return the number of threads for an average: one per processor, but at most 4.

    The number is never greater than the limit of ``limit_threads``.

    Args:
        sharing: Number of processes that share the processors.
    """
    threads = max(1, min(_MOST, (os.cpu_count() or 1) // sharing))
    return min(threads, _limit.get() or threads)
