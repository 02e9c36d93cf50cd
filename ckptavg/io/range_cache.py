"""Cache of ranges of remote files, which are requested together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from ckptavg.io.remote import Range, read_ranges

# In bytes. Shorter gaps between ranges are read, too: another request would take longer.
_GAP = 1 << 16


class Fetched:
    """Ranges of remote files that one thread has fetched for the next reads."""

    def __init__(self) -> None:
        self._held: dict[str, list[tuple[int, bytes]]] = {}

    def clear(self) -> None:
        """Drop all ranges."""
        self._held.clear()

    def fetch(self, wanted: Iterable[Range]) -> None:
        """Replace all held ranges by new ranges, with near ranges read as one."""
        # Before the requests: old and new ranges are never in memory together.
        self.clear()
        ranges = merged(wanted)
        for (url, start, _), content in zip(ranges, read_ranges(ranges), strict=True):
            self._held.setdefault(url, []).append((start, content))

    def hold(self, wanted: Sequence[Range]) -> None:
        """Fetch ranges, unless all ranges are held already."""
        if any(self._find(*part) is None for part in wanted):
            self.fetch(wanted)

    def read(self, url: str, start: int, end: int) -> bytes | memoryview:
        """Read a range from the held ranges, or by a request.

        Args:
            url: The file.
            start: First byte of the range.
            end: End of the range, exclusive.

        Returns:
            The bytes, fewer at the end of the file.
        """
        content = self._find(url, start, end)
        return read_ranges([(url, start, end)])[0] if content is None else content

    def _find(self, url: str, start: int, end: int) -> memoryview | None:
        """Return a range without copying; None if the range is not held as a whole."""
        ranges = self._held.get(url, [])
        i = bisect_right(ranges, start, key=lambda part: part[0]) - 1
        first, content = ranges[i] if i >= 0 else (0, b"")
        inside = end <= first + len(content)
        return memoryview(content)[start - first : end - first] if inside else None


def merged(wanted: Iterable[Range]) -> list[Range]:
    """Sort ranges, and merge ranges that overlap or have a short gap between."""
    merged_ranges: list[Range] = []
    for url, start, end in sorted(r for r in wanted if r[1] < r[2]):
        if merged_ranges and merged_ranges[-1][0] == url and start <= merged_ranges[-1][2] + _GAP:
            merged_ranges[-1] = (url, merged_ranges[-1][1], max(end, merged_ranges[-1][2]))
        else:
            merged_ranges.append((url, start, end))
    return merged_ranges
