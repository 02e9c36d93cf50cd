"""Reuse of freed memory by models on a CPU, between layers and batches."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from functools import cache

import torch

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
# The highest value to which malloc raises its mmap threshold. It trims at twice that value.
_MOST = 32 << 20
# glibc's default limit on the number of mappings.
_USUAL_MAPPINGS = 65536
_ASKED = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


@contextlib.contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Keep freed memory for the next allocations while models run on a CPU.

    glibc returns large blocks to the system when the blocks are freed. Every layer's output is then
    written to pages that the system must first find and clear. That takes a third to a half of the
    time of a forward pass (measured with resnet50, 16 images, 2 cores).

    Processes that load data inherit the setting if they are forked meanwhile. Afterwards malloc's
    thresholds have the values to which malloc itself raises them once a large block is freed. On
    other devices, with another C library, or where the environment sets the thresholds, nothing is
    changed. Calls must not be nested.
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
    """Return glibc, or None for another C library or if the environment sets the thresholds."""
    if any(name in os.environ for name in _ASKED):
        return None
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
