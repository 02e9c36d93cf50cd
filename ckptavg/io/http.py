"""Reader of byte ranges of files at web servers.

No more is read than was requested, however much a server sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ckptavg.errors import CheckpointError

_OK, _NOT_FOUND, _BEYOND_THE_END = 200, 404, 416  # statuses of HTTP
_MOST_AT_ONCE = 64  # requests


def is_http(system: Any) -> bool:
    """Return True if a file system of fsspec reads from web servers."""
    # A text or several: fsspec allows both.
    protocol = system.protocol
    return "http" in ((protocol,) if isinstance(protocol, str) else protocol)


def read_ranges(system: Any, ranges: Sequence[tuple[str, int, int]]) -> list[Any]:
    """Read ranges of files concurrently.

    Args:
        system: fsspec's file system of web servers.
        ranges: URL, first byte and end of each range; ends are exclusive.

    Returns:
        The bytes of each range, fewer if the file ends before the range. For a failed request, the
        exception stands in place of the bytes.
    """
    # Imported here: fsspec is optional, and only URLs need it.
    from fsspec.asyn import sync  # noqa: PLC0415

    answers: list[Any] = sync(system.loop, _read_all, system, ranges)
    return answers


async def _read_all(system: Any, ranges: Sequence[tuple[str, int, int]]) -> list[Any]:
    """Read ranges concurrently, with a limit on the open requests."""
    turns = asyncio.Semaphore(_MOST_AT_ONCE)

    async def read_in_turn(url: str, start: int, end: int) -> bytes:
        """Read a range once a request may be opened."""
        async with turns:
            return await _read(system, url, start, end)

    reads = [read_in_turn(url, start, end) for url, start, end in ranges]
    return await asyncio.gather(*reads, return_exceptions=True)


async def _read(system: Any, url: str, start: int, end: int) -> bytes:
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
        # The whole file, from a server that ignores ranges, answers a range from 0 to the end.
        if start == 0 or answer.status != _OK:
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > end - start:
                    break
        if len(content) > end - start or (start > 0 and answer.status == _OK):
            answer.close()
            raise CheckpointError(f"{url} cannot be read by ranges: its server sends all of it")
        return bytes(content)
