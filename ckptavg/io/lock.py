"""A lock for those who read a file, change it and put a new one in its place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptavg.io import temporaries

_LOCK = ".ckptavg-lock"
_PATIENCE = 20.0  # seconds; whoever has the lock needs it for milliseconds
_PAUSE = 0.01  # seconds between two tries


@contextmanager
def lock_beside(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which need not exist.

    It is on an empty file beside it, which goes with the lock: the file itself is replaced, and a
    lock on it with it. Where there are no locks (Windows, some network file systems), or somebody
    never lets go, the work is done without.

    Args:
        path: The file.
    """
    side = path.with_name(f".{path.name}{_LOCK}")
    try:
        handle = _acquire(side)
    except BaseException:  # such as Ctrl-C
        _remove_unlocked(side)
        raise
    try:
        yield
    finally:
        if handle is not None:
            # Removed while it is locked: who waits for it sees that it is another's by then.
            temporaries.remove(side)
            _release(handle)


def _remove_unlocked(side: Path) -> None:
    """Remove a side file that nobody has the lock of."""
    with suppress(OSError):
        handle = os.open(side, os.O_RDWR)
        try:
            if temporaries.lock(handle, side) is not False:
                temporaries.remove(side)
        finally:
            os.close(handle)


def _acquire(side: Path) -> int | None:
    """Open and lock a side file; None where that cannot be done."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            handle = os.open(side, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        locked: bool | None = False
        try:
            locked = temporaries.lock(handle, side)
        except OSError:
            locked = None
        finally:
            if not locked:
                _release(handle)
        if locked:
            return handle
        if locked is None:
            temporaries.remove(side)
            return None
        time.sleep(_PAUSE)
    return None


def _release(handle: int) -> None:
    with suppress(OSError):
        os.close(handle)
