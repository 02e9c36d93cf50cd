"""Conversion of operating system errors into ckptavg errors with a path and a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ckptavg.errors import CheckpointError, OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM)
_REMEDIES = {
    errno.EMFILE: "Let more files be open: ulimit -n 4096.",
    errno.ENFILE: "Close other programs: too many files are open on this machine.",
    errno.ENOMEM: "Free memory, then try again.",
    errno.EIO: "Check the disk and the connection to it, then try again.",
    errno.ESTALE: "Mount the network file system anew if trying again does not help.",
    errno.ETIMEDOUT: "Check the connection to the file system, then try again.",
    errno.EINTR: "Try again.",
    errno.EAGAIN: "Try again.",
    errno.ELOOP: "Mend the symbolic links: they lead to each other.",
    errno.ENAMETOOLONG: "Choose a shorter name: this file system has no room for it.",
    errno.ENOTDIR: "Check its path: a part of it is a file, not a directory.",
    errno.EROFS: "Choose another disk: this one is mounted for reading alone.",
}
_OF_READING = {
    errno.ENOENT: "Make sure that it is there, and that nothing moves or removes it meanwhile.",
    errno.EISDIR: "Name a file: this is a directory.",
    **dict.fromkeys(_DENIED, "Ask its owner for the right to read it (ls -l shows who has it)."),
}
_OF_WRITING = {
    errno.EISDIR: "Choose another name: a directory stands there.",
    **dict.fromkeys(_DENIED, "Choose a directory that you may write to."),
}
_ANY_READING = "Make sure that it is there and its disk is well, then try again."
_ANY_WRITING = "Choose another place for it, or try again."


def unreadable(path: object, error: OSError) -> CheckpointError:
    """Make the error for a path that the system does not let us read, list or inspect.

    Args:
        path: The path to name if the system's error names none.
        error: The system's error.
    """
    # The name is a number where the error is about an open file.
    if isinstance(error.filename, (str, bytes)):
        path = os.fsdecode(error.filename)
    remedy = (_REMEDIES | _OF_READING).get(error.errno or 0, _ANY_READING)
    return CheckpointError(f"{path} cannot be read: {error.strerror or error}", remedy)


def unwritable(path: object, error: OSError) -> OutputError:
    """Make the error for an output that the system does not let us write.

    Args:
        path: The output, even if the error is about its temporary.
        error: The system's error.
    """
    if error.errno in _FULL:
        return OutputError(
            f"the disk ran full while {path} was written",
            "Make room (there may be a quota, too) or choose another disk.",
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{path} is larger than its file system, or ulimit -f, lets a file be",
            "Choose another disk, or raise the limit.",
        )
    if error.errno == errno.ENOENT:
        return OutputError(
            f"{path} cannot be written: its directory or its temporary was removed meanwhile",
            "Start again once nothing removes them.",
        )
    remedy = (_REMEDIES | _OF_WRITING).get(error.errno or 0, _ANY_WRITING)
    return OutputError(f"{path} cannot be written: {error.strerror or error}", remedy)


@contextmanager
def guard_reads(path: object) -> Iterator[None]:
    """Convert system errors into ckptavg errors while a path, or anything below, is read.

    Raises:
        CheckpointError: The system does not let us read.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def guard_writes(path: object) -> Iterator[None]:
    """Convert system errors into ckptavg errors while an output is written.

    Raises:
        OutputError: The system does not let us write.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error
