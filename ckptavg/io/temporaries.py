"""What stands beside an output while it is made, and what a dead run leaves of it.

The temporary holds the new output; a lock on it, which the system lets go when the run dies, tells
a dead run's from a living one's. Where two things cannot be swapped in one step, the old output is
set aside under a name that goes with the temporary's; it is whole as long as it bears that name.
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
_LONGEST_NAME = 255  # bytes, where the file system does not tell
_REMOVALS = 3  # attempts


def new_temporary(path: Path) -> Path:
    """A name beside an output that nothing else has."""
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{_TEMPORARY}")


def set_aside_name(temporary: Path) -> Path:
    """The name of the old output for the moment in which a temporary takes its place."""
    return temporary.with_name(temporary.name.removesuffix(_TEMPORARY) + _SET_ASIDE)


def lock(handle: int, path: Path) -> bool | None:
    """Take the lock of an open temporary, without waiting.

    Between making a temporary and locking it, another run may take it for a dead one's. Who removes
    one holds its lock meanwhile, so a lock on what the path still leads to is a good one.

    Returns:
        True if it is held, False if another has it or has removed the temporary, None if the file
        system has no locks.

    Raises:
        OSError: The temporary cannot be looked at.
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
    """Remove what dead runs left beside an output; put back what one had set aside.

    What a living run has there stays, and so does what cannot be told from it, with a note.
    """
    ours = re.compile(rf"({re.escape(_stem(path))}\.[0-9a-f]{{8}})({_TEMPORARY}|{_SET_ASIDE})")
    try:
        beside = [ours.fullmatch(other.name) for other in path.parent.iterdir()]
    except PermissionError:  # a directory that takes files and does not show them
        return
    for stem in sorted({match[1] for match in beside if match}):
        temporary = path.with_name(stem + _TEMPORARY)
        with _claim(temporary) as dead:
            if dead is not False:
                settle(set_aside_name(temporary), path)
            if dead:
                remove(temporary)
            elif dead is None:
                log.info("%s may be of a run that died: remove it if none is at work", temporary)


def settle(aside: Path, path: Path) -> None:
    """Put back what was set aside, or remove it if the output's place is taken."""
    if not os.path.lexists(aside):
        return
    with suppress(FileNotFoundError):  # another run did it
        try:
            rename_new(aside, path)
        except FileExistsError:
            garbage = new_temporary(path)  # half removed, it must not be taken for whole
            aside.rename(garbage)
            remove(garbage)


def remove(path: Path) -> None:
    """Remove a file or a directory, even if others remove it, too; what stays is told.

    It never fails: what it is called for has succeeded, or failed for a reason that is to be told.
    """
    for _ in range(_REMOVALS):
        with suppress(OSError):
            try:
                path.unlink()
            except FileNotFoundError:
                return
            except (IsADirectoryError, PermissionError):  # of a directory; not all systems say so
                shutil.rmtree(path)
            return
    log.warning("%s could not be removed: remove it yourself", path)


def _stem(path: Path) -> str:
    """The beginning of the names beside an output: its own, shortened where that is long."""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows; no such directory; no such question
        longest = _LONGEST_NAME
    name = os.fsencode(path.name)
    room = longest - len(f"..12345678{_TEMPORARY}")
    if len(name) <= room:
        return f".{path.name}"
    digest = hashlib.sha256(name).hexdigest()[:8]
    return f".{name[: room - 1 - len(digest)].decode(errors='ignore')}~{digest}"


@contextmanager
def _claim(path: Path) -> Iterator[bool | None]:
    """Hold the lock of a temporary that may be a dead run's.

    Gives True if nobody else can have it now, False if somebody does, None if that cannot be told.
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
    try:
        return lock(handle, path)
    except OSError:
        return None
