"""Publication of outputs that appear whole or not at all.

A temporary beside the output is written, flushed to the disk and renamed. ``temporaries`` handles
the temporaries of runs that have crashed.
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
# Attempts at a step that fails only if other runs work on the same output at the same moment.
_TRIES = 100
# Some file systems cannot flush directories.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


class Publication:
    """Temporary file or directory that becomes the output when published.

    Use the publication as a context manager: leaving the context without ``publish`` removes the
    temporary.

    Args:
        path: The output; a link is followed.
        directory: True if the output is a directory.
        overwrite: True to replace an existing output.
        replaceable: Files of an existing directory that may be removed, besides the files that are
            written anew. They are given by paths relative to the directory.

    Attributes:
        temporary: Path to write to before ``publish``; it exists inside the context.
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
        """Flush the temporary to the disk and rename the temporary to the output.

        Raises:
            OutputError: The system refuses, or the output exists and must not be replaced.
        """
        with guard_writes(self.path):
            # Before the rename: a power cut must not leave a complete name with half the contents.
            for path in [self.temporary, *self.temporary.rglob("*")]:
                _fsync(path)
            if self.overwrite:
                self._take_permissions()
                self._replace()
            else:
                self._place()
        try:
            _fsync(self.path.parent)
        # A note, not an error: the output is in its place already.
        except OSError as error:
            log.warning("%s is in its place, but may not survive a power cut: %s", self.path, error)

    def _create(self) -> None:
        """Create and lock the temporary, under new names until this succeeds.

        Raises:
            OSError: The temporary cannot be created.
        """
        for _ in range(_TRIES):
            if self._create_and_lock():
                return
            self.temporary = temporaries.new_temporary(self.path)
        raise OSError(errno.EBUSY, "other runs remove its temporary again and again")

    def _create_and_lock(self) -> bool:
        """Create and lock the temporary; return False if another run interferes.

        Before the lock is taken, another run may remove the temporary as a leftover of a crash.
        """
        flags = os.O_RDONLY if self.directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            if self.directory:
                self.temporary.mkdir()
                # Windows cannot open directories.
                if os.name == "nt":
                    return True
            self._lock = os.open(self.temporary, flags, 0o666)
        except FileExistsError:
            return False
        # Another run removed the new directory, unless the output's own directory is gone.
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise
            self._discard()
            return False
        locked = temporaries.lock(self._lock, self.temporary)
        if locked is False:
            self._discard()
        # Without a lock there is no use for an open file, which Windows would not rename.
        elif locked is None:
            self._unlock()
        return locked is not False

    def _take_permissions(self) -> None:
        """Copy the mode and the owner of each replaced file to the new file, if permitted."""
        for new in [self.temporary, *self.temporary.rglob("*")]:
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                old, fresh = (self.path / new.relative_to(self.temporary)).stat(), new.stat()
                if stat.S_IFMT(old.st_mode) != stat.S_IFMT(fresh.st_mode):
                    continue
                # The owner first: a change of owner clears some bits of the mode.
                if (old.st_uid, old.st_gid) != (fresh.st_uid, fresh.st_gid):
                    os.chown(new, old.st_uid, old.st_gid)
                new.chmod(stat.S_IMODE(old.st_mode))

    def _place(self) -> None:
        """Rename the temporary to the output without replacing anything."""
        try:
            rename.rename_new(self.temporary, self.path)
        except FileExistsError as error:
            raise OutputError(
                f"{self.path} has appeared while it was being made",
                "Pass --overwrite (in Python overwrite=True) to replace it.",
            ) from error

    def _replace(self) -> None:
        """Rename the temporary over the output, in a single step if the system can."""
        if not self.directory:
            self.temporary.replace(self.path)
            return
        for _ in range(_TRIES):
            if self._replace_directory():
                return
        raise OSError(errno.EBUSY, "other runs write it at the same time")

    def _replace_directory(self) -> bool:
        """Replace a directory by the temporary; return False if another run came between.

        The old directory then has the name of the temporary, or is removed.
        """
        # There may be no output, or no longer: a rename is enough then.
        with suppress(FileExistsError):
            rename.rename_new(self.temporary, self.path)
            return True
        entries = [
            path.relative_to(self.temporary).as_posix() for path in self.temporary.rglob("*")
        ]
        try:
            check_replaceable(self.path, directory=True, names={*entries, *self._replaceable})
        # Another run replaces the output at this moment.
        except FileNotFoundError:
            return False
        if rename.exchange(self.temporary, self.path):
            return True
        # No swap in one step here: for a moment there is no output, only the old one set aside.
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
        """Remove the temporary and release the lock."""
        try:
            temporaries.remove(self.temporary)
        # A second Ctrl-C; the first may have been the reason for the removal.
        except KeyboardInterrupt:
            temporaries.remove(self.temporary)
            raise
        finally:
            self._unlock()

    def _unlock(self) -> None:
        """Close the file that holds the lock, if any."""
        if self._lock >= 0:
            # Nothing was written through this handle: no data can be lost.
            with suppress(OSError):
                os.close(self._lock)
            self._lock = -1


def _fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
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
