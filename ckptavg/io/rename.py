"""Renames in one step: never onto another thing, or two things for each other.

Linux has both as one system call; elsewhere, and on file systems without it, there are substitutes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2


def rename_new(one: Path, other: Path) -> None:
    """Rename without replacing anything.

    Raises:
        FileExistsError: There is something under the new name.
        OSError: The system does not let us.
    """
    answer = _renameat2(one, other, _RENAME_NOREPLACE)
    if answer == errno.EEXIST:
        raise FileExistsError(answer, os.strerror(answer), os.fspath(other))
    if answer == 0 or _link_new(one, other):
        return
    if os.path.lexists(other):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(other))
    try:
        one.rename(other)
    except OSError as error:
        if os.path.lexists(other) and os.path.lexists(one):  # a directory came between
            raise FileExistsError(*error.args) from error
        raise


def exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where that cannot be done."""
    return _renameat2(one, other, _RENAME_EXCHANGE) == 0


def _link_new(one: Path, other: Path) -> bool:
    """Give a file its new name before it loses the old; False where there are no hard links."""
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
    """The system call's error number, 0 if it did its work."""
    if _SYSTEM is None:
        return errno.ENOSYS
    result: int = _SYSTEM(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag)
    return ctypes.get_errno() if result else 0


def _system_call() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


_SYSTEM = _system_call()
