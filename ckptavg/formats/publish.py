"""Outputs that appear whole or not at all.

A temporary beside the output is written, flushed to the disk and renamed. While its writer lives it
holds a lock on it, so that the next run can tell a dead run's leftover from a living one's work.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from ckptavg.errors import OutputError
from ckptavg.formats import dcp, huggingface, is_checkpoint_directory

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".ckptavg-tmp"
_REPLACED = ".ckptavg-old"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(path: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Make sure that an output may be written, before any work begins.

    Args:
        path: The output.
        overwrite: Whether an existing one may be replaced.
        inputs: Checkpoints that are being read; none of them may be touched.

    Raises:
        OutputError: It may not.
    """
    for source in inputs:
        if _is_within(source, path) or _is_within(path, source):
            raise OutputError(f"the output {path} is an input ({source})", "Choose another -o.")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"the directory {parent} does not exist", "Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the directory {parent} may not be written to", "Choose another -o.")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError(f"{path} exists already", "Pass --overwrite to replace it.")
    if path.is_dir() and not _is_only_a_model(path):
        raise OutputError(
            f"{path} holds more than a model's own files and is not replaced",
            "Choose another -o, or empty it yourself.",
        )


def check_room(path: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit on the disk that ``path`` will lie on.

    Raises:
        OutputError: They do not.
    """
    free = shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise OutputError(
            f"{path} needs {needed / 1e9:.3f} GB where {free / 1e9:.3f} GB are free",
            "Make room or choose another disk with -o.",
        )


class Publication:
    """A temporary file or directory that becomes the output when published.

    Use as a context manager: leaving it without ``publish`` removes the temporary.

    Args:
        path: The output.
        directory: Whether it is a directory.
        overwrite: Whether an existing output is replaced.

    Attributes:
        temporary: Where to write until then; it exists already.
    """

    def __init__(self, path: Path, *, directory: bool, overwrite: bool) -> None:
        self.path = path.absolute()
        self.overwrite = overwrite
        self.directory = directory
        name = f".{self.path.name}.{secrets.token_hex(4)}{_TEMPORARY}"
        self.temporary = self.path.with_name(name)
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            _clear_leftovers(self.path)
            if self.directory:
                self.temporary.mkdir()
                flags = os.O_RDONLY
            else:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            if fcntl is not None:
                self._lock = os.open(self.temporary, flags, 0o666)
                _lock(self._lock)
            elif not self.directory:
                self.temporary.touch()
        except OSError as error:
            self._discard()
            raise unwritable(self.path, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._discard()
        if isinstance(error, OSError):
            raise unwritable(self.path, error) from error

    def publish(self) -> None:
        """Flush the temporary to the disk and put it in the output's place.

        Raises:
            OutputError: Something else has appeared there meanwhile.
        """
        for file in [self.temporary, *self.temporary.rglob("*")]:
            _fsync(file)
        if self.overwrite:
            _replace(self.temporary, self.path)
        else:
            _place(self.temporary, self.path)
        _fsync(self.path.parent)

    def _discard(self) -> None:
        _remove(self.temporary)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error for an output that the system would not let us write."""
    if error.errno == errno.ENOSPC:
        return OutputError(
            f"the disk ran full while {path} was written", "Make room or choose another with -o."
        )
    return OutputError(f"{path} cannot be written: {error.strerror or error}")


def _is_within(path: Path, directory: Path) -> bool:
    """Whether a path is another one or lies below it, links resolved."""
    resolved, other = path.resolve(), directory.resolve()
    return resolved == other or other in resolved.parents


def _is_only_a_model(directory: Path) -> bool:
    """Whether a directory is empty, or a model's with nothing else in it."""
    children = list(directory.iterdir())
    belongs = dcp.belongs if dcp.is_distributed(directory) else huggingface.belongs
    own = all(child.is_file() and belongs(child.name) for child in children)
    return not children or (own and is_checkpoint_directory(directory))


def _clear_leftovers(path: Path) -> None:
    """Remove what a dead run left beside an output; put back what it had set aside."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}({_TEMPORARY}|{_REPLACED})")
    found = [(p, m[1]) for p in path.parent.iterdir() if (m := ours.fullmatch(p.name))]
    for left, kind in found:
        if kind == _REPLACED and not path.exists():
            left.rename(path)
        elif kind == _REPLACED or not _is_locked(left):
            _remove(left)


def _lock(handle: int) -> None:
    """Hold a lock, where the file system has any; without, a leftover is never cleared."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _is_locked(path: Path) -> bool:
    if fcntl is None:
        return False
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return  # another run's cleaning got there first, or will have to


def _place(temporary: Path, path: Path) -> None:
    """Rename without replacing anything."""
    try:
        if temporary.is_dir():
            if os.path.lexists(path):
                raise FileExistsError
            temporary.rename(path)
            return
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(path):
                raise FileExistsError from None
            temporary.rename(path)
    except FileExistsError as error:
        raise OutputError(
            f"{path} has appeared while it was being made", "Pass --overwrite to replace it."
        ) from error


def _replace(temporary: Path, path: Path) -> None:
    """Rename over what is there, in one step as far as the system can."""
    if not path.is_dir() and not temporary.is_dir():
        temporary.replace(path)
    elif not os.path.lexists(path):
        temporary.rename(path)
    elif _exchange(temporary, path):
        _remove(temporary)
    else:
        old = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_REPLACED}")
        path.rename(old)
        temporary.rename(path)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step; False where the system has no such call."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    result: int = rename(
        _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    )
    return result == 0


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
