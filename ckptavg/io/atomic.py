"""Outputs that appear whole or not at all.

A temporary beside the output is written, flushed to the disk and renamed; ``leftovers`` is about
what becomes of it if the run dies.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ckptavg.errors import OutputError
from ckptavg.errors.system import guard_writes, unwritable
from ckptavg.io import rename, temporaries
from ckptavg.io.output_paths import check_replaceable, follow

log = logging.getLogger("ckptavg")
_TRIES = 100  # of a step that only other runs at the same moment can spoil
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # of directories, on some file systems


class Publication:
    """A temporary file or directory that becomes the output when published.

    Use as a context manager: leaving it without ``publish`` removes the temporary.

    Args:
        path: The output; a link is followed.
        directory: Whether it is a directory.
        overwrite: Whether an existing output is replaced.
        replaceable: Files that may go from an existing directory beside those that are written
            anew, by their paths below it.

    Attributes:
        temporary: Where to write until then; it exists inside the context.
    """

    def __init__(
        self,
        path: Path,
        *,
        directory: bool,
        overwrite: bool,
        replaceable: Collection[str] = (),
    ) -> None:
        self.path = follow(path)
        self.overwrite = overwrite
        self.directory = directory
        self.temporary = temporaries.new_temporary(self.path)
        self._replaceable = replaceable
        self._lock = -1

    def __enter__(self) -> Publication:
        try:
            with guard_writes(self.path):
                temporaries.clear(self.path)
                self._create()
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
            OutputError: The system does not let us, or something else stands there.
        """
        with guard_writes(self.path):
            for path in [self.temporary, *self.temporary.rglob("*")]:
                _fsync(path)
            if self.overwrite:
                self._take_permissions()
                self._replace()
            else:
                self._place()
        try:
            _fsync(self.path.parent)
        except OSError as error:  # the output is there: it would be wrong to deny that
            log.warning("%s is in its place, but may not survive a power cut: %s", self.path, error)

    def _create(self) -> None:
        for _ in range(_TRIES):
            if self._create_and_lock():
                return
            self.temporary = temporaries.new_temporary(self.path)
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
            if not self.path.parent.is_dir():
                raise
            self._discard()
            return False
        held = temporaries.lock(self._lock, self.temporary)
        if held is False:
            self._discard()
        elif held is None:  # Windows has no lock either, and renames no file that is open
            self._unlock()
        return held is not False

    def _take_permissions(self) -> None:
        """Give each file the mode and the owner of the one that it replaces, as far as we may."""
        for new in [self.temporary, *self.temporary.rglob("*")]:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                old, fresh = (self.path / new.relative_to(self.temporary)).stat(), new.stat()
                if stat.S_IFMT(old.st_mode) != stat.S_IFMT(fresh.st_mode):
                    continue
                if (old.st_uid, old.st_gid) != (fresh.st_uid, fresh.st_gid):
                    os.chown(new, old.st_uid, old.st_gid)
                new.chmod(stat.S_IMODE(old.st_mode))

    def _place(self) -> None:
        """Rename without replacing anything."""
        try:
            rename.rename_new(self.temporary, self.path)
        except FileExistsError as error:
            raise OutputError(
                f"{self.path} has appeared while it was being made",
                "Pass --overwrite (in Python overwrite=True) to replace it.",
            ) from error

    def _replace(self) -> None:
        """Rename over what is there, in one step as far as the system can."""
        if not self.directory:
            self.temporary.replace(self.path)
            return
        for _ in range(_TRIES):
            if self._replace_directory():
                return
        raise OSError(errno.EBUSY, "other runs write it at the same time")

    def _replace_directory(self) -> bool:
        """Whether the temporary took the output's place; another run may come between.

        What was there stands under the temporary's name then, or is gone.
        """
        with suppress(FileExistsError):
            rename.rename_new(self.temporary, self.path)
            return True
        own = [path.relative_to(self.temporary).as_posix() for path in self.temporary.rglob("*")]
        try:
            check_replaceable(self.path, directory=True, names={*own, *self._replaceable})
        except FileNotFoundError:  # another run replaces it at this moment
            return False
        if rename.exchange(self.temporary, self.path):
            return True
        aside = temporaries.set_aside_name(self.temporary)
        try:
            self.path.rename(aside)
            rename.rename_new(self.temporary, self.path)
        except (FileExistsError, FileNotFoundError):
            if not os.path.lexists(self.temporary):
                raise
            return False
        finally:
            temporaries.settle(aside, self.path)
        return True

    def _discard(self) -> None:
        try:
            temporaries.remove(self.temporary)
        except KeyboardInterrupt:  # a second one; the first may have brought us here
            temporaries.remove(self.temporary)
            raise
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            with suppress(OSError):  # nothing was written by it
                os.close(self._lock)
            self._lock = -1


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
