"""Requests for ranges of files to the remote file systems of fsspec.

Errors are converted to ckptavg errors. fsspec is imported only when a URL is given. No more is read
than was requested, however much a server sends.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, BinaryIO, cast

from ckptavg.errors import CheckpointError, CkptavgError, UsageError

# In bytes: the size of the pieces in which headers are read. Headers are small, requests slow.
HEAD = 1 << 18
_MOST_PIECES = 64  # pieces per file
# Attempts at a request, if the file system does not retry by itself.
_TRIES = 3
# Statuses of HTTP.
_OK, _NOT_FOUND, _BEYOND_THE_END = 200, 404, 416
# Requests to web servers at a time.
_MOST_AT_ONCE = 64

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
    members: list[Range] = []
    positions_of: dict[Any, list[int]] = {}
    for i, (url, start, end) in enumerate(ranges):
        system, path = file_system(url)
        members.append((path, start, end))
        positions_of.setdefault(system, []).append(i)
    contents: list[Any] = [None] * len(ranges)
    for system, positions in positions_of.items():
        answers = _fetch_patiently(system, [members[i] for i in positions])
        for i, answer in zip(positions, answers, strict=True):
            contents[i] = answer
    for (url, start, end), content in zip(ranges, contents, strict=True):
        if not isinstance(content, bytes):
            raise unreadable(url, content) from content
        if len(content) > end - start:
            raise CheckpointError(
                f"{url} cannot be read by ranges: its server sends the whole file",
                "Download it first.",
            )
    return contents


def open_ranges(url: str, size: int, token: str) -> BinaryIO:
    """Open a remote file to read headers.

    If the file has a token, pieces that were read are kept for the next opening.

    Args:
        url: The file.
        size: Size of the file in bytes.
        token: Version or checksum of the file; empty if unknown.
    """
    pieces = _shared_pieces(url, size, token) if token else {}
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

    def __init__(self, url: str, size: int, pieces: dict[int, bytes]) -> None:
        self._url = url
        self._size = size
        self._pieces = pieces
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
        start = self._start_of_piece(self._at)
        if start is None:
            start = self._request_piece(self._at, count)
        part = self._pieces[start][self._at - start :][:count]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _start_of_piece(self, offset: int) -> int | None:
        """Return the start of the piece with a byte; None if no piece has the byte."""
        for start, content in self._pieces.items():
            if start <= offset < start + len(content):
                return start
        return None

    def _request_piece(self, offset: int, count: int) -> int:
        """Request the piece with ``count`` bytes from an offset, and return the piece's start."""
        # Aligned pieces, the last up to the end: a zip directory there takes one request.
        start = min(offset - offset % HEAD, max(self._size - HEAD, 0))
        end = min(max(offset + count, start + HEAD), self._size)
        self._pieces[start] = read_ranges([(self._url, start, end)])[0]
        # The oldest piece goes first.
        if len(self._pieces) > _MOST_PIECES:
            del self._pieces[next(iter(self._pieces))]
        return start


@lru_cache(maxsize=4)
def _shared_pieces(url: str, size: int, token: str) -> dict[int, bytes]:  # noqa: ARG001
    """Return the pieces of a version of a file by their offsets, for several openings in a row."""
    # The arguments are the key of the cache.
    return {}


def _fetch_patiently(system: Any, ranges: Sequence[Range]) -> list[Any]:
    """Request ranges, and failed ranges again if the file system does not retry by itself."""
    answers = _fetch(system, ranges)
    if hasattr(system, "retries"):
        return answers
    for attempt in range(1, _TRIES):
        failed = [i for i, answer in enumerate(answers) if _is_passing(answer)]
        if not failed:
            break
        # One second before the second attempt, then two.
        time.sleep(attempt)
        for i, answer in zip(failed, _fetch(system, [ranges[i] for i in failed]), strict=True):
            answers[i] = answer
    return answers


def _fetch(system: Any, ranges: Sequence[Range]) -> list[Any]:
    """Request ranges of a file system once.

    Args:
        system: The file system.
        ranges: The ranges, with paths in the file system.

    Returns:
        The bytes of each range; an exception in place of each failed answer.
    """
    # Imported here: fsspec is optional, and only URLs need it.
    from fsspec.asyn import sync  # noqa: PLC0415

    try:
        answers: list[Any]
        if _is_http(system):
            answers = sync(system.loop, _read_http, system, ranges)
        else:
            paths, starts, ends = zip(*ranges, strict=True)
            answers = system.cat_ranges([*paths], [*starts], [*ends], on_error="return")
    except Exception as error:
        return [error] * len(ranges)
    return answers


def _is_passing(answer: Any) -> bool:
    """Return True if a request failed, and another attempt may succeed."""
    return not isinstance(answer, (bytes, FileNotFoundError, PermissionError, CkptavgError))


def _is_http(system: Any) -> bool:
    """Return True if a file system of fsspec reads from web servers."""
    # A text or several: fsspec allows both.
    protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    return "http" in protocols


async def _read_http(system: Any, ranges: Sequence[Range]) -> list[Any]:
    """Read ranges of files at web servers concurrently, with a limit on the open requests.

    fsspec itself reads an answer to the end, however much a server sends.

    Returns:
        The bytes of each range, fewer if the file ends before the range. For a failed request, the
        exception stands in place of the bytes.
    """
    turns = asyncio.Semaphore(_MOST_AT_ONCE)

    async def read_in_turn(url: str, start: int, end: int) -> bytes:
        """Read a range once a request may be opened."""
        async with turns:
            return await _read_http_range(system, url, start, end)

    reads = [read_in_turn(url, start, end) for url, start, end in ranges]
    return await asyncio.gather(*reads, return_exceptions=True)


async def _read_http_range(system: Any, url: str, start: int, end: int) -> bytes:
    """Read a range of a file.

    Raises:
        CheckpointError: The server ignores ranges; the rest of the answer is not read.
        FileNotFoundError: There is no such file.
    """
    options = dict(system.kwargs)
    headers = {
        **options.pop("headers", {}),
        "Range": f"bytes={start}-{end - 1}",
        # Ranges of a compressed answer would count compressed bytes.
        "Accept-Encoding": "identity",
    }
    session = await system.set_session()
    async with session.get(system.encode_url(url), headers=headers, **options) as answer:
        if answer.status == _BEYOND_THE_END:
            return b""
        if answer.status == _NOT_FOUND:
            raise FileNotFoundError(url)
        answer.raise_for_status()
        content = bytearray()
        # From a server that ignores ranges, the whole file is right for a range from 0 to the end.
        if start == 0 or answer.status != _OK:
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > end - start:
                    break
        if len(content) > end - start or (start > 0 and answer.status == _OK):
            answer.close()
            raise CheckpointError(
                f"{url} cannot be read by ranges: its server sends the whole file",
                "Download it first.",
            )
        return bytes(content)
