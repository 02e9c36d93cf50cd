"""Stamps of files, which detect changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptavg.errors import CheckpointError
from ckptavg.io import paths
from ckptavg.io.paths import Location


def changed(path: object) -> CheckpointError:
    """Make the error for an input that has changed since the opening."""
    return CheckpointError(
        f"{path} changed while it was being read",
        "Wait until the training run has finished writing it, then try again.",
    )


@dataclass(frozen=True, slots=True)
class FileStamp:
    """State of a file on opening, to be compared with the state after reading.

    The fields after ``path`` are the fields of ``paths.Stat``.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int = 0
    token: str = ""
    ctime_ns: int = 0
    status: tuple[int, ...] = ()

    @classmethod
    def of(cls, path: str | Location) -> FileStamp:
        """Stamp a file in the present state.

        Raises:
            CheckpointError: The file does not exist, may not be read, or is not a regular file: a
                pipe may never end.
        """
        return cls(str(path), *paths.stat(path))

    @property
    def identity(self) -> tuple[object, ...]:
        """Key that is equal for two paths of the same file."""
        if paths.is_url(self.path):
            return (self.path,)
        return (self.device, self.inode)

    def verify(self) -> None:
        """Check that the file has not changed since the stamp was made.

        Raises:
            CheckpointError: The file has changed or was removed.
        """
        now = FileStamp.of(self.path)
        # The token is more reliable than the time, which stores round in different ways.
        if self.token:
            now = replace(now, mtime_ns=self.mtime_ns)
        # A trainer may link the newest checkpoint as the last, which does not change the contents.
        if now.status != self.status:
            now = replace(now, status=self.status, ctime_ns=self.ctime_ns)
        if now != self:
            raise changed(self.path)
