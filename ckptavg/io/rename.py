"""Renames without replacing an existing path, and the swap of two paths in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

# Constants of Linux, from fcntl.h and linux/fs.h: Python does not have them.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def rename_new(old: Path, new: Path) -> None:
    """Rename a path without replacing a file, or a directory that is not empty.

    Raises:
        FileExistsError: The new name exists.
        OSError: The system refuses.
    """
    if not old.is_dir() and _link_new(old, new):
        return
    # Without hard links, a file that appears between the check and the rename is replaced.
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(new))
    try:
        old.rename(new)
    except OSError as error:
        # A directory has appeared under the new name since the check.
        if os.path.lexists(new) and os.path.lexists(old):
            raise FileExistsError(*error.args) from error
        raise


def exchange(path: Path, other: Path) -> bool:
    """Swap two paths in one step; return False if the system or the file system cannot."""
    if _RENAMEAT2 is None:
        return False
    names = os.fsencode(path), os.fsencode(other)
    failed = _RENAMEAT2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return not failed


def _link_new(old: Path, new: Path) -> bool:
    """Rename a file by a hard link; return False if there are no hard links.

    Raises:
        FileExistsError: The new name exists.
    """
    try:
        new.hardlink_to(old)
    except FileExistsError:
        raise
    except OSError:
        return False
    # The file has its new name by now. An old name that stays is removed later, as a leftover.
    with suppress(OSError):
        old.unlink()
    return True


def _system_call() -> Any:
    """Return ``renameat2`` of the C library of Linux; None if there is none."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "renameat2", None)


_RENAMEAT2 = _system_call()
