"""Atomic renames, without replacing an existing path or as a swap of two paths.

Linux has a system call for both. There are substitutes for other systems, and for file systems
without support.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

# Constants of Linux, from fcntl.h and linux/fs.h: Python does not have them.
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def rename_new(one: Path, other: Path) -> None:
    """Rename a path without replacing anything.

    Raises:
        FileExistsError: The new name exists.
        OSError: The system refuses.
    """
    answer = _renameat2(one, other, _RENAME_NOREPLACE)
    if answer == errno.EEXIST:
        raise FileExistsError(answer, os.strerror(answer), os.fspath(other))
    if answer == 0 or _link_new(one, other):
        return
    # The last resort, with a gap between check and rename: a file could be replaced in it.
    if os.path.lexists(other):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(other))
    try:
        one.rename(other)
    except OSError as error:
        # A directory has appeared under the new name since the check.
        if os.path.lexists(other) and os.path.lexists(one):
            raise FileExistsError(*error.args) from error
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths atomically; return False if the system cannot."""
    return _renameat2(one, other, _RENAME_EXCHANGE) == 0


def _link_new(one: Path, other: Path) -> bool:
    """Rename a file by a hard link; return False if there are no hard links."""
    # Linking to a link differs between systems, and directories have no hard links.
    if one.is_symlink() or not one.is_file():
        return False
    try:
        other.hardlink_to(one)
    except FileExistsError:
        raise
    except OSError:
        return False
    one.unlink()
    return True


def _renameat2(one: Path, other: Path, flag: int) -> int:
    """Call ``renameat2`` of Linux; return the error number, or 0 for success."""
    if _SYSTEM is None:
        return errno.ENOSYS
    result: int = _SYSTEM(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag)
    return ctypes.get_errno() if result else 0


def _system_call() -> Any:
    """Return ``renameat2`` of the C library; None if the library or the system has none."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


_SYSTEM = _system_call()
