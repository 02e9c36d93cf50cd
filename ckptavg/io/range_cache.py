"""Ranges of remote files, asked for together and held while they are used."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from ckptavg.io.remote import Range, read_ranges

_GAP = 1 << 16  # bytes; shorter gaps are read along: a request costs more


class Fetched:
    """What one thread has fetched of remote files: as much as it needs next, and no more."""

    def __init__(self) -> None:
        self._held: dict[str, list[tuple[int, bytes]]] = {}

    def clear(self) -> None:
        """Let go of everything."""
        self._held.clear()

    def fetch(self, wanted: Iterable[Range]) -> None:
        """Replace what is held by these ranges; neighbours are read as one."""
        self.clear()
        ranges = merged(wanted)
        for (url, start, _), content in zip(ranges, read_ranges(ranges), strict=True):
            self._held.setdefault(url, []).append((start, content))

    def hold(self, wanted: Sequence[Range]) -> None:
        """Fetch these ranges, unless they are held already."""
        if any(self._find(*part) is None for part in wanted):
            self.fetch(wanted)

    def read(self, url: str, start: int, end: int) -> bytes | memoryview:
        """Bytes out of what is held, else by a request for just these; short at a file's end."""
        found = self._find(url, start, end)
        return read_ranges([(url, start, end)])[0] if found is None else found

    def _find(self, url: str, start: int, end: int) -> memoryview | None:
        held = self._held.get(url, [])
        i = bisect_right(held, start, key=lambda part: part[0]) - 1
        first, content = held[i] if i >= 0 else (0, b"")
        inside = end <= first + len(content)
        return memoryview(content)[start - first : end - first] if inside else None


def merged(wanted: Iterable[Range]) -> list[Range]:
    """Ranges in order, without overlaps or short gaps between them."""
    found: list[Range] = []
    for url, start, end in sorted(r for r in wanted if r[1] < r[2]):
        if found and found[-1][0] == url and start <= found[-1][2] + _GAP:
            found[-1] = (url, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((url, start, end))
    return found
