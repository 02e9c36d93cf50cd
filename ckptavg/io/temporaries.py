"""Temporaries beside an output, and the removal of temporaries that a crashed run has left.

The temporary holds the new output. A lock on the temporary tells whether its run still works: the
system releases the lock when the process ends. If two paths cannot be swapped in one step, the old
output is set aside under a name that matches the name of the temporary. An output that is set aside
is complete as long as it has that name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ckptavg.io.rename import rename_new

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("ckptavg")
_TEMPORARY = ".ckptavg-tmp"
_SET_ASIDE = ".ckptavg-old"
_LONGEST_NAME = 255  # bytes, if the file system does not say
_REMOVALS = 3  # attempts


def new_temporary(path: Path) -> Path:
    """Return a new random path for a temporary beside an output."""
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{_TEMPORARY}")


def set_aside_name(temporary: Path) -> Path:
    """Return the path at which the old output is set aside during a replacement."""
    return temporary.with_name(temporary.name.removesuffix(_TEMPORARY) + _SET_ASIDE)


def lock(handle: int, path: Path) -> bool | None:
    """Take the lock of an open temporary without waiting.

    Between creation and lock, another run may take the temporary for a leftover of a crashed run. A
    run that removes a temporary holds the lock meanwhile. So a lock is valid if the path still
    leads to the locked file.

    Returns:
        True if the lock is taken. False if another process has the lock or has removed the
        temporary. None if the file system has no locks.

    Raises:
        OSError: The temporary cannot be inspected.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Network file systems refuse locks with numbers of many kinds: ENOLCK, EPERM, EIO, EBADF, ...
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def clear(path: Path) -> None:
    """Remove the leftovers of crashed runs beside an output, and put back an output set aside.

    Temporaries of runs that still work stay. In doubt, temporaries stay, too, with a note.
    """
    ours = re.compile(rf"({re.escape(_stem(path))}\.[0-9a-f]{{8}})({_TEMPORARY}|{_SET_ASIDE})")
    try:
        matches = [ours.fullmatch(entry.name) for entry in path.parent.iterdir()]
    # A directory may be writable, but not readable.
    except PermissionError:
        return
    for stem in sorted({match[1] for match in matches if match}):
        temporary = path.with_name(stem + _TEMPORARY)
        with _claim(temporary) as dead:
            if dead is not False:
                settle(set_aside_name(temporary), path)
            if dead:
                remove(temporary)
            elif dead is None:
                log.info("%s may be of a run that died: remove it if none is at work", temporary)


def settle(aside: Path, path: Path) -> None:
    """Put back an output that was set aside, or remove the old output if a new output exists."""
    if not os.path.lexists(aside):
        return
    # Another run may do the same at this moment.
    with suppress(FileNotFoundError):
        try:
            rename_new(aside, path)
        except FileExistsError:
            # Renamed first: the name of an output set aside promises that it is complete.
            garbage = new_temporary(path)
            aside.rename(garbage)
            remove(garbage)


def remove(path: Path) -> None:
    """Remove a file or a directory, with tolerance for concurrent removals.

    A path that cannot be removed causes a warning, never an error: the work before has succeeded,
    or has failed with an error that matters more.
    """
    for _ in range(_REMOVALS):
        with suppress(OSError):
            try:
                path.unlink()
            except FileNotFoundError:
                return
            # Some systems raise ``PermissionError`` for a directory.
            except (IsADirectoryError, PermissionError):
                shutil.rmtree(path)
            return
    log.warning("%s could not be removed: remove it yourself", path)


def _stem(path: Path) -> str:
    """Return the beginning of the names beside an output: the output's name, shortened if long."""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    # Windows has no ``pathconf``; the directory may not exist, or the system not know the limit.
    except (AttributeError, OSError, ValueError):
        longest = _LONGEST_NAME
    name = os.fsencode(path.name)
    room = longest - len(f"..12345678{_TEMPORARY}")
    if len(name) <= room:
        return f".{path.name}"
    # Different long names must not share the names of their temporaries.
    digest = hashlib.sha256(name).hexdigest()[:8]
    return f".{name[: room - 1 - len(digest)].decode(errors='ignore')}~{digest}"


@contextmanager
def _claim(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a temporary that a crashed run may have left.

    Yields:
        True if no other process can have the lock, False if another process has it, None if
        unknown.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield None
        return
    if fcntl is None or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        yield None
        return
    try:
        handle = os.open(path, os.O_RDONLY if stat.S_ISDIR(mode) else os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    except OSError:
        yield None
        return
    try:
        yield _lock_or_doubt(handle, path)
    finally:
        with suppress(OSError):
            os.close(handle)


def _lock_or_doubt(handle: int, path: Path) -> bool | None:
    """Take the lock of a temporary; return None if unknown, even for a system error."""
    try:
        return lock(handle, path)
    except OSError:
        return None
