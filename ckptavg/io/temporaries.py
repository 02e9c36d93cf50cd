"""Temporaries beside an output, and the removal of temporaries that a crashed run has left.

The temporary holds the new output. A lock on the temporary tells whether its run still works: the
system releases the lock when the process ends. If two paths cannot be swapped in one step, the old
output becomes a backup, with a name that matches the name of the temporary. A backup is complete as
long as it has that name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
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
_BACKUP = ".ckptavg-old"
# Attempts to remove a path. A disk that fails once may succeed the next time.
_REMOVALS = 3
_LONGEST_NAME = 255  # bytes, if the file system does not say


def new_temporary(path: Path) -> Path:
    """Return a new random path for a temporary beside an output."""
    return path.with_name(f"{_stem(path)}.{secrets.token_hex(4)}{_TEMPORARY}")


def backup_of(temporary: Path) -> Path:
    """Return the path at which the old output is kept while a temporary takes its place."""
    return temporary.with_name(temporary.name.removesuffix(_TEMPORARY) + _BACKUP)


def lock(handle: int, path: Path) -> bool | None:
    """Take the lock of an open temporary without waiting.

    Between creation and lock, another run may take the temporary for a leftover of a crashed run. A
    run that removes a temporary holds the lock meanwhile. So a lock is valid if the path still
    leads to the locked file.

    Args:
        handle: Descriptor of the open temporary.
        path: Path of the temporary.

    Returns:
        True if the lock is taken. False if another process has the lock or has removed the
        temporary. None if the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Network file systems refuse locks with various errors: ENOLCK, EPERM, EIO, EBADF, ...
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except OSError:
        return False


def remove_stale(path: Path) -> None:
    """Remove what crashed runs have left beside an output, and recover an output from its backup.

    Temporaries of runs that still work stay. In doubt, temporaries stay, too, with a note.

    Args:
        path: The output.
    """
    name = re.compile(rf"({re.escape(_stem(path))}\.[0-9a-f]{{8}})({_TEMPORARY}|{_BACKUP})")
    stems: set[str] = set()
    try:
        for entry in path.parent.iterdir():
            if match := name.fullmatch(entry.name):
                stems.add(match[1])
    # A directory may be writable, but not readable.
    except PermissionError:
        return
    for stem in sorted(stems):
        temporary = path.with_name(stem + _TEMPORARY)
        with _lock_if_stale(temporary) as stale:
            if stale is not False:
                recover_previous(backup_of(temporary), path)
            if stale:
                remove(temporary)
            elif stale is None:
                log.info("%s may be from a crashed run: remove it if no run is at work", temporary)


def recover_previous(backup: Path, path: Path) -> None:
    """Rename the backup of an output to the output, or remove the backup if there is an output.

    Args:
        backup: The backup, which need not exist.
        path: The output.
    """
    if not os.path.lexists(backup):
        return
    # Another run may do the same at this moment.
    with suppress(FileNotFoundError):
        try:
            rename_new(backup, path)
        except FileExistsError:
            # Renamed first: the name of a backup promises that it is complete.
            garbage = new_temporary(path)
            backup.rename(garbage)
            remove(garbage)


def remove(path: Path) -> None:
    """Remove a file or a directory, which another run may remove at the same time.

    A path that cannot be removed causes a warning, never an error: the work before has succeeded,
    or has failed with an error that matters more.
    """
    for _ in range(_REMOVALS):
        try:
            path.unlink()
        # The path is a directory (systems raise different errors), or exists no longer.
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
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
def _lock_if_stale(temporary: Path) -> Iterator[bool | None]:
    """Hold the lock of a temporary that a crashed run may have left.

    Yields:
        True if no other run uses the temporary, False if another run does, None if unknown.
    """
    try:
        # Network file systems lock only files open for writing; directories open only for reading.
        handle = os.open(temporary, os.O_RDONLY if temporary.is_dir() else os.O_RDWR)
    # Only the backup is left.
    except FileNotFoundError:
        yield True
        return
    except OSError:
        yield None
        return
    try:
        yield lock(handle, temporary)
    finally:
        os.close(handle)
