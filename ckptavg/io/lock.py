"""Lock for processes that read a file, change the contents and replace the file."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptavg.io import temporaries

log = logging.getLogger("ckptavg")
_LOCK = ".ckptavg-lock"
# In seconds; a process holds the lock for milliseconds. Many that wait on a slow disk hold the lock
# in turn, so only the time in which the lock does not change hands counts.
_PATIENCE = 20.0
_PAUSE = 0.01  # seconds between two attempts


@contextmanager
def lock_beside(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which need not exist.

    The lock is on an empty side file, which is removed with the lock. A lock on the file itself
    would be lost when the file is replaced. The work is done without a lock if there are no locks
    (Windows, some network file systems), or, with a note, if another process does not release the
    lock within 20 seconds.

    Args:
        path: The file.
    """
    side = path.with_name(f".{path.name}{_LOCK}")
    try:
        handle = _acquire(side)
    # Ctrl-C may come between creating and locking the side file.
    except BaseException:
        _remove_unlocked(side)
        raise
    try:
        yield
    finally:
        if handle is not None:
            # Removed while locked: a process that waits then sees that the path has another file.
            temporaries.remove(side)
            _release(handle)


def _remove_unlocked(side: Path) -> None:
    """Remove a side file unless another process holds the lock."""
    with suppress(OSError):
        handle = os.open(side, os.O_RDWR)
        try:
            if temporaries.lock(handle, side) is not False:
                temporaries.remove(side)
        finally:
            _release(handle)


def _release(handle: int) -> None:
    """Close a side file and so release the lock, even if closing reports an error."""
    with suppress(OSError):
        os.close(handle)


def _acquire(side: Path) -> int | None:
    """Open and lock a side file; return None if there is no lock to be had."""
    holder: tuple[int, int] | None = None
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            handle = os.open(side, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        locked: bool | None = False
        current: tuple[int, int] | None = None
        try:
            locked = temporaries.lock(handle, side)
            if locked is False:
                current = _identify(handle)
        finally:
            if not locked:
                _release(handle)
        if locked:
            return handle
        # Without locks, a side file would only be left over.
        if locked is None:
            temporaries.remove(side)
            return None
        if holder != current:
            holder = current
            deadline = time.monotonic() + _PATIENCE
        time.sleep(_PAUSE)
    log.warning(
        "another process has held %s for %g seconds: going on without waiting", side, _PATIENCE
    )
    return None


def _identify(handle: int) -> tuple[int, int] | None:
    """Return what tells one holder's side file from the next one's; None where it is not known.

    Each holder removes the side file, so the next one has another, or at least a later one.
    """
    try:
        info = os.fstat(handle)
    except OSError:
        return None
    return info.st_ino, info.st_ctime_ns
