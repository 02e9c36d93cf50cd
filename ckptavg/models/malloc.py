"""The memory that a CPU's models run in: kept from one layer and batch to the next."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from functools import cache

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # M_... of glibc's malloc.h
_NEVER = 2**31 - 1
_MOST = 32 << 20  # what malloc raises its own threshold to; it trims at twice that
_USUAL_MAPPINGS = 65536
_ASKED = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Keep memory that is freed for what is allocated next, while models run on a CPU.

    glibc hands large blocks back when they are freed, so that every layer's output is written to
    pages that the system must first find and clear: a third to a half of a forward pass's time,
    where measured (resnet50, 16 images, 2 cores). Processes that load data do likewise if they are
    forked meanwhile. Afterwards malloc's thresholds stay where it had raised them to itself once a
    large block was freed. Elsewhere, and where the environment sets them, this does nothing. Not to
    be nested.
    """
    libc = _glibc() if device.type == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, 2 * _MOST)
        libc.mallopt(_MMAP_THRESHOLD, _MOST)
        libc.mallopt(_MMAP_MAX, _USUAL_MAPPINGS)
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is GNU's and nobody has told it already what to keep."""
    if any(name in os.environ for name in _ASKED):
        return None
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
