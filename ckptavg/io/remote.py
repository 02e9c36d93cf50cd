"""Requests for ranges of files to the remote file systems of fsspec.

Errors are converted to ckptavg errors. fsspec is imported only when a URL is given.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, BinaryIO, cast

from ckptavg.errors import CheckpointError, CkptavgError, UsageError
from ckptavg.io import http

# In bytes: the size of the pieces in which headers are read. Headers are small, requests slow.
HEAD = 1 << 18
_MOST_HELD = 64  # pieces per file
# Attempts at a request, if the file system does not retry by itself.
_TRIES = 3

Range = tuple[str, int, int]
"""URL of a file, first byte of a range, and end of the range (exclusive)."""


def file_system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path of the URL in that file system.

    Raises:
        UsageError: fsspec has no file system for the URL.
        CkptavgError: A package is missing.
    """
    s3 = url.startswith(("s3://", "s3a://"))
    try:
        # Imported here: fsspec is optional, and only URLs need it.
        from fsspec.core import url_to_fs  # noqa: PLC0415
    except ImportError as error:
        install = "pip install s3fs" if s3 else "pip install fsspec"
        raise CkptavgError(f"reading {url} needs fsspec", f"Install it with {install}.") from error
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        install = "Install it with pip install s3fs." if s3 else f"{error}."
        raise CkptavgError(f"reading {url} needs one more package", install) from error
    except ValueError as error:
        raise UsageError(f"{url} cannot be read: {error}") from error
    except Exception as error:
        raise unreadable(url, error) from error
    return system, path


def read_ranges(ranges: Sequence[Range]) -> list[bytes]:
    """Read ranges of remote files, with concurrent requests per file system.

    A range that ends beyond the end of the file is shortened.

    Returns:
        The bytes of each range, in the order of the ranges.

    Raises:
        CheckpointError: A range cannot be read.
    """
    contents: list[Any] = [None] * len(ranges)
    systems: dict[int, tuple[Any, list[tuple[int, str]]]] = {}
    for i, (url, _, _) in enumerate(ranges):
        system, path = file_system(url)
        systems.setdefault(id(system), (system, []))[1].append((i, path))
    for system, members in systems.values():
        waiting = members
        for attempt in range(1 if hasattr(system, "retries") else _TRIES):
            # No pause before the first attempt, one second before the second, then two.
            time.sleep(attempt)
            _fetch(system, waiting, ranges, contents)
            waiting = [(i, path) for i, path in waiting if _is_passing(contents[i])]
            if not waiting:
                break
    for (url, start, end), content in zip(ranges, contents, strict=True):
        if not isinstance(content, bytes):
            raise unreadable(url, content) from content
        if len(content) > end - start:
            raise CheckpointError(f"{url} cannot be read by ranges: its server sends all of it")
    return contents


def open_ranges(url: str, size: int, token: str) -> BinaryIO:
    """Open a remote file to read headers.

    If the file has a token, pieces that were read are kept for the next opening.

    Args:
        url: The file.
        size: Size of the file in bytes.
        token: Version or checksum of the file; empty if unknown.
    """
    pieces = _held(url, size, token) if token else {}
    return cast("BinaryIO", io.BufferedReader(_RangeFile(url, size, pieces)))


def unreadable(url: str, error: Exception) -> CkptavgError:
    """Make the error for the failure of a file system at a URL."""
    if isinstance(error, CkptavgError):
        return error
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{url} is not there")
    denied = isinstance(error, PermissionError) or getattr(error, "status", 0) in (401, 403)
    # By the name of the class: the packages of the stores need not be installed.
    if denied or "redential" in type(error).__name__:
        return CheckpointError(
            f"{url} may not be read: {reason or 'access is denied'}",
            "Give credentials where the store's own tools look for them, in the environment or "
            "their files (FSSPEC_S3_ANON=true for a public bucket).",
        )
    return CheckpointError(
        f"{url} cannot be read: {reason or type(error).__name__}",
        "Check the URL and the connection, then try again.",
    )


class _RangeFile(io.RawIOBase):
    """Remote file that is read by ranges, which readers of the same version share."""

    def __init__(self, url: str, size: int, held: dict[int, bytes]) -> None:
        self._url = url
        self._size = size
        self._held = held
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset without a request, and return the new position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("a negative position")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read bytes of a single piece into a buffer, and return the number of bytes."""
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        starts = (s for s, raw in self._held.items() if s <= self._at < s + len(raw))
        start = next(starts, None)
        if start is None:
            # Aligned pieces, the last up to the end: a zip directory there takes one request.
            start = min(self._at - self._at % HEAD, max(self._size - HEAD, 0))
            end = min(max(self._at + count, start + HEAD), self._size)
            self._held[start] = read_ranges([(self._url, start, end)])[0]
            # The oldest piece goes first.
            if len(self._held) > _MOST_HELD:
                del self._held[next(iter(self._held))]
        part = self._held[start][self._at - start :][:count]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


@lru_cache(maxsize=4)
def _held(url: str, size: int, token: str) -> dict[int, bytes]:  # noqa: ARG001
    """Return the pieces of a version of a file by their offsets, for several openings in a row."""
    # The arguments are the key of the cache.
    return {}


def _fetch(
    system: Any, members: list[tuple[int, str]], ranges: Sequence[Range], found: list[Any]
) -> None:
    """Request ranges once, and put an exception in place of each failed answer."""
    wanted = [(path, *ranges[i][1:]) for i, path in members]
    try:
        if http.is_http(system):
            answers = http.read_ranges(system, wanted)
        else:
            answers = system.cat_ranges(*map(list, zip(*wanted, strict=True)), on_error="return")
    except Exception as error:
        answers = [error] * len(members)
    for (i, _), answer in zip(members, answers, strict=True):
        found[i] = answer


def _is_passing(answer: Any) -> bool:
    """Return True if a request failed, and another attempt may succeed."""
    return not isinstance(answer, (bytes, FileNotFoundError, PermissionError, CkptavgError))
