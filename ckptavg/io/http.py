"""Ranges of files at web servers: no more is read than was asked for, whatever is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ckptavg.errors import CheckpointError

_OK, _NOT_FOUND, _BEYOND_THE_END = 200, 404, 416  # statuses of HTTP
_MOST_AT_ONCE = 64  # requests


def is_http(system: Any) -> bool:
    """Tell fsspec's file system of web servers from its others."""
    protocol = system.protocol
    return "http" in ((protocol,) if isinstance(protocol, str) else protocol)


def read_ranges(system: Any, ranges: Sequence[tuple[str, int, int]]) -> list[Any]:
    """Read ranges of files at once.

    Args:
        system: fsspec's file system of web servers.
        ranges: URL, first byte and end of each.

    Returns:
        The bytes of each range, as many as there are; or the exception that it ended in.
    """
    from fsspec.asyn import sync  # noqa: PLC0415 - only URLs need it

    answers: list[Any] = sync(system.loop, _read_all, system, ranges)
    return answers


async def _read_all(system: Any, ranges: Sequence[tuple[str, int, int]]) -> list[Any]:
    turns = asyncio.Semaphore(_MOST_AT_ONCE)

    async def read_in_turn(url: str, start: int, end: int) -> bytes:
        async with turns:
            return await _read(system, url, start, end)

    reads = [read_in_turn(*each) for each in ranges]
    return await asyncio.gather(*reads, return_exceptions=True)


async def _read(system: Any, url: str, start: int, end: int) -> bytes:
    """Read a range.

    Raises:
        CheckpointError: The server does not heed ranges. Its answer is not read on.
        FileNotFoundError: There is no such file.
    """
    options = dict(system.kwargs)
    headers = {
        **options.pop("headers", {}),
        "Range": f"bytes={start}-{end - 1}",
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
        # A server that heeds no ranges sends all of the file, which begins with a range from 0.
        if start == 0 or answer.status != _OK:
            async for chunk in answer.content.iter_any():
                content += chunk
                if len(content) > end - start:
                    break
        if len(content) > end - start or (start > 0 and answer.status == _OK):
            answer.close()
            raise CheckpointError(f"{url} cannot be read by ranges: its server sends all of it")
        return bytes(content)
