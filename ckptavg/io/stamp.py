"""Stamps of files, which tell a file from a changed one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ckptavg.errors import CheckpointError
from ckptavg.io import paths
from ckptavg.io.paths import Location


def changed(path: object) -> CheckpointError:
    """The error for an input that is not what it was when it was opened."""
    return CheckpointError(
        f"{path} changed while it was being read",
        "Wait until the training run has finished writing it, then try again.",
    )


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from a changed one: looked at on opening and again after reading.

    The fields are those of ``storage.Stat``.
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
        """Stamp of a file as it is now.

        Raises:
            CheckpointError: It is not there, may not be read, or is no regular file: a pipe may
                never end.
        """
        return cls(str(path), *paths.stat(path))

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for two paths of the same file."""
        return (self.path,) if paths.is_url(self.path) else (self.device, self.inode)

    def verify(self) -> None:
        """Make sure that the file is still the one that was opened.

        Raises:
            CheckpointError: It changed or went away.
        """
        now = FileStamp.of(self.path)
        if self.token:  # says more than the time, which stores round as they like
            now = replace(now, mtime_ns=self.mtime_ns)
        # A trainer that links its newest checkpoint as the last one changes nothing in it.
        if now.status != self.status:
            now = replace(now, status=self.status, ctime_ns=self.ctime_ns)
        if now != self:
            raise changed(self.path)
