"""Outputs that appear whole or not at all.

A temporary beside the output is written, flushed to the disk and renamed; ``leftovers`` is about
what becomes of it if the run dies.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ckptavg.errors import OutputError
from ckptavg.formats import dcp, huggingface, is_checkpoint_directory, leftovers, renaming
from ckptavg.system_errors import unwritable

log = logging.getLogger("ckptavg")
_TRIES = 100  # of a step that only other runs at the same moment can spoil
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of directories, on some file systems


def check_target(path: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Make sure that an output may be written, before any work begins.

    What dead runs have left of it is cleared first: it takes room, or is the output itself.

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
    try:
        leftovers.clear(path.absolute())
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists already", "Pass --overwrite to replace it.")
        _refuse_more_than_a_model(path)
    except OSError as error:
        raise unwritable(path, error) from error


def check_room(path: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit on the disk that ``path`` will lie on.

    Raises:
        OutputError: They do not.
    """
    try:
        free = shutil.disk_usage(path.absolute().parent).free
    except OSError as error:
        raise unwritable(path, error) from error
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
        temporary: Where to write until then; it exists inside the context.
    """

    def __init__(self, path: Path, *, directory: bool, overwrite: bool) -> None:
        self.path = path.absolute()
        self.overwrite = overwrite
        self.directory = directory
        self.temporary = leftovers.new_temporary(self.path)
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            leftovers.clear(self.path)
            self._create()
        except OSError as error:
            self._discard()
            raise unwritable(self.path, error) from error
        except BaseException:
            self._discard()
            raise
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
        try:
            _fsync(self.path.parent)
        except OSError as error:  # the output is there: it would be wrong to deny that
            log.warning("%s is in its place, but may not survive a power cut: %s", self.path, error)

    def _create(self) -> None:
        for _ in range(_TRIES):
            if self._create_and_lock():
                return
            self.temporary = leftovers.new_temporary(self.path)
        raise OSError(errno.EBUSY, "other runs remove its temporary again and again")

    def _create_and_lock(self) -> bool:
        """Whether the temporary is ours, and not taken or removed as a dead run's meanwhile."""
        flags = os.O_RDONLY if self.directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            if self.directory:
                self.temporary.mkdir()
                if os.name == "nt":  # where a directory cannot be opened
                    return True
            self._lock = os.open(self.temporary, flags, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if self.path.parent.is_dir():
                return False
            raise
        held = leftovers.lock(self._lock, self.temporary)
        if not held:  # Windows has no lock either, and renames no file that is open
            self._unlock()
        return held is not False

    def _discard(self) -> None:
        try:
            leftovers.remove(self.temporary)
        except KeyboardInterrupt:  # a second one; the first may have brought us here
            leftovers.remove(self.temporary)
            raise
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _is_within(path: Path, directory: Path) -> bool:
    """Whether a path is another one or lies below it, links resolved."""
    resolved, other = path.resolve(), directory.resolve()
    return resolved == other or other in resolved.parents


def _refuse_more_than_a_model(path: Path) -> None:
    """Make sure that nothing is replaced but links, files, and directories of a model alone."""
    for _ in range(_TRIES):
        looked_at = _identity(path)
        with suppress(FileNotFoundError):
            if not path.is_dir() or _is_only_a_model(path):
                return
        if looked_at == _identity(path):  # else another run has replaced it meanwhile
            break
    raise OutputError(
        f"{path} holds more than a model's own files and is not replaced",
        "Choose another -o, or empty it yourself.",
    )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a path's directory from another that takes its place."""
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _is_only_a_model(directory: Path) -> bool:
    """Whether a directory is empty, or a model's with nothing else in it."""
    children = list(directory.iterdir())
    belongs = dcp.belongs if dcp.is_distributed(directory) else huggingface.belongs
    own = all(child.is_file() and belongs(child.name) for child in children)
    return not children or (own and is_checkpoint_directory(directory))


def _place(temporary: Path, path: Path) -> None:
    """Rename without replacing anything."""
    try:
        renaming.rename_new(temporary, path)
    except FileExistsError as error:
        raise OutputError(
            f"{path} has appeared while it was being made", "Pass --overwrite to replace it."
        ) from error


def _replace(temporary: Path, path: Path) -> None:
    """Rename over what is there, in one step as far as the system can."""
    if not path.is_dir() and not temporary.is_dir():
        temporary.replace(path)
        return
    for _ in range(_TRIES):
        if _replaced(temporary, path):
            return
    raise OSError(errno.EBUSY, "other runs write it at the same time")


def _replaced(temporary: Path, path: Path) -> bool:
    """Whether a directory took a path's place, or a path that of one; another run may hinder it.

    What was there stands under the temporary's name then, or is gone.
    """
    with suppress(FileExistsError):
        renaming.rename_new(temporary, path)
        return True
    _refuse_more_than_a_model(path)
    if renaming.exchange(temporary, path):
        return True
    aside = leftovers.set_aside_name(temporary)
    try:
        path.rename(aside)
        renaming.rename_new(temporary, path)
    except (FileExistsError, FileNotFoundError):
        if not os.path.lexists(temporary):
            raise
        return False
    finally:
        leftovers.settle(aside, path)
    return True


def _fsync(path: Path) -> None:
    directory = path.is_dir()
    if os.name == "nt" and directory:
        return
    handle = os.open(path, os.O_RDONLY if directory else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not directory or error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(handle)
