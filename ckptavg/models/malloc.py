"""Reuse of freed memory by models on a CPU, between layers and batches."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import threading
from collections.abc import Iterator

import torch

# M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
# The highest value to which malloc raises its mmap threshold: the largest mapping below 32 MiB.
# Free memory above twice that value goes back to the system.
_HIGHEST = (32 << 20) - mmap.PAGESIZE
# glibc's default limit on the number of mappings.
_DEFAULT_MAPPINGS = 65536
_VARIABLES = (
    "GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_",
)  # fmt: skip
# Flag of a block with a mapping of its own, in the size that malloc stores before the block.
_MAPPED = 2


@contextlib.contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[None]:
    """Keep freed memory for the next allocations while models run on a CPU.

    glibc returns large blocks to the system when the blocks are freed. Every layer's output is then
    written to pages that the system must first find and clear. That takes a third to a half of the
    time of a forward pass (measured with resnet50, 16 images, 2 cores).

    Several threads may be in this context at once. At the end of the last use, the memory is
    returned, and malloc's thresholds have the values that malloc itself gives them once a block of
    almost 32 MiB is freed. Processes that load data inherit the setting if they are forked
    meanwhile. On other devices, with another C library, or where the environment or the program
    has set the thresholds, nothing is changed.
    """
    if device.type != "cpu" or not _thresholds.acquire():
        yield
        return
    try:
        yield
    finally:
        _thresholds.release()


class _Thresholds:
    """Thresholds of the process's malloc, changed as long as there are users."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._libc: ctypes.CDLL | None = None

    def acquire(self) -> bool:
        """Let malloc keep freed memory; return False if the thresholds must stay."""
        with self._lock:
            if self._libc is None:
                self._libc = _adjustable_glibc()
            if self._libc is None:
                return False
            if self._users == 0:
                self._libc.mallopt(_TRIM_THRESHOLD, _NEVER)
                self._libc.mallopt(_MMAP_MAX, 0)
            self._users += 1
            return True

    def release(self) -> None:
        """Restore the thresholds and return the free memory after the last use."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._libc is not None:
                self._libc.mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST)
                self._libc.mallopt(_MMAP_THRESHOLD, _HIGHEST)
                self._libc.mallopt(_MMAP_MAX, _DEFAULT_MAPPINGS)
                self._libc.malloc_trim(0)


_thresholds = _Thresholds()


def _adjustable_glibc() -> ctypes.CDLL | None:
    """Return glibc if its malloc adjusts the thresholds itself; otherwise None.

    malloc raises the mmap threshold to the size of the largest mapped block that was freed, up to
    almost 32 MiB. A fixed threshold of that size therefore has the same effect as the highest
    threshold of malloc's own, so that the thresholds can be restored. Thresholds that the program
    has set cannot be read. They show in the blocks that get a mapping.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _VARIABLES):
        return None
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    # malloc's own sizes are a part of the mapping, too.
    _gets_mapping(libc, _HIGHEST - mmap.PAGESIZE // 2)
    if _gets_mapping(libc, _HIGHEST - (1 << 20)):
        return None
    # A free part of the heap that is larger than the block would be used without a mapping.
    libc.malloc_trim(0)
    return libc if _gets_mapping(libc, _HIGHEST + (1 << 20)) else None


def _gets_mapping(libc: ctypes.CDLL, size: int) -> bool:
    """Allocate and free a block; return True if it had a mapping of its own."""
    block = libc.malloc(size)
    if block is None:
        return False
    stored_size = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    libc.free(block)
    return bool(stored_size & _MAPPED)
