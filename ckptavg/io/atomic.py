"""Publication of outputs that appear whole or not at all.

A temporary beside the output is written, flushed to the disk and renamed. ``temporaries`` handles
the temporaries of runs that have crashed. If several runs write the same output at once, some may
fail with an error, but the output is always whole.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from ckptavg.errors import OutputError
from ckptavg.errors.system import guard_writes, unwritable
from ckptavg.io import rename, temporaries
from ckptavg.io.output_paths import check_replaceable, follow

log = logging.getLogger("ckptavg")
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
                temporaries.remove_stale(self.path)
                self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
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
        """Create and lock the temporary.

        Raises:
            OSError: The temporary cannot be created, or another run has locked it to remove it.
        """
        if self.directory:
            self.temporary.mkdir()
            # Windows cannot open directories.
            if os.name == "nt":
                return
            self._lock = os.open(self.temporary, os.O_RDONLY)
        else:
            self._lock = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        locked = temporaries.lock(self._lock, self.temporary)
        if locked is False:
            raise OSError(errno.EBUSY, "another run writes it at the same time")
        # Where locking is not supported the file is closed: Windows does not rename open files.
        if locked is None:
            self._unlock()

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
                f"{self.path} has appeared while the output was being written",
                "Pass `overwrite=True` to replace it.",
            ) from error

    def _replace(self) -> None:
        """Rename the temporary over the output, in a single step if the system can."""
        if not self.directory:
            self.temporary.replace(self.path)
        elif os.path.lexists(self.path):
            self._replace_directory()
        else:
            self._place()

    def _replace_directory(self) -> None:
        """Replace the old directory by the temporary; the old directory is removed."""
        entries = [
            path.relative_to(self.temporary).as_posix() for path in self.temporary.rglob("*")
        ]
        check_replaceable(self.path, directory=True, names={*entries, *self._replaceable})
        if rename.exchange(self.temporary, self.path):
            return
        # No swap in one step here: for a moment there is no output, only its backup.
        backup = temporaries.backup_of(self.temporary)
        try:
            self.path.rename(backup)
            self._place()
        finally:
            temporaries.recover_previous(backup, self.path)

    def _discard(self) -> None:
        """Remove the temporary and release the lock."""
        try:
            temporaries.remove(self.temporary)
        # A second Ctrl-C must not stop the removal, which the first may have started.
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
