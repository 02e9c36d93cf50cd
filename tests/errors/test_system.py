"""Errors of the operating system: the file, what happened, and a remedy, in one line."""

from __future__ import annotations

import errno
import os

import pytest

from ckptavg.errors import CheckpointError, OutputError
from ckptavg.errors.system import guard_reads, guard_writes, unreadable, unwritable

USUAL = [
    errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS, errno.EINTR,
    errno.ENOSPC, errno.EFBIG, errno.EBUSY, errno.EINVAL,
]  # fmt: skip
numbers = pytest.mark.parametrize("number", USUAL, ids=errno.errorcode.get)


@numbers
@pytest.mark.parametrize("explain", [unreadable, unwritable])
def test_system_error_has_path_and_remedy(number, explain):
    error = explain("runs/a.pt", OSError(number, os.strerror(number)))
    assert "runs/a.pt" in error.message
    assert error.remedy.endswith(".")
    assert len(str(error).splitlines()) == 1


def test_system_error_prefers_its_own_path():
    error = OSError(errno.EIO, os.strerror(errno.EIO), b"runs/a.pt")
    assert unreadable("runs", error).message == "runs/a.pt cannot be read: Input/output error"


def test_system_error_takes_no_file_number_for_path():
    error = OSError(errno.EIO, os.strerror(errno.EIO), 7)
    assert "runs cannot be read" in unreadable("runs", error).message


@pytest.mark.parametrize(
    ("guard", "kind"), [(guard_reads, CheckpointError), (guard_writes, OutputError)]
)
def test_guards_raise_package_errors(guard, kind):
    with pytest.raises(kind, match=r"a\.pt"), guard("a.pt"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
