"""Cache of ranges of remote files, which are requested together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from ckptavg.io.remote import Range, read_ranges

# In bytes. Shorter gaps between ranges are read, too: another request would take longer.
_GAP = 1 << 16


class RangeCache:
    """Ranges of remote files that one thread has fetched for the next reads."""

    def __init__(self) -> None:
        self._contents: dict[str, list[tuple[int, bytes]]] = {}

    def clear(self) -> None:
        """Drop all ranges."""
        self._contents.clear()

    def fetch(self, wanted: Iterable[Range]) -> None:
        """Replace all cached ranges by new ranges, with near ranges read as one."""
        # Before the requests: old and new ranges are never in memory together.
        self.clear()
        ranges = merge_ranges(wanted)
        for (url, start, _), content in zip(ranges, read_ranges(ranges), strict=True):
            self._contents.setdefault(url, []).append((start, content))

    def fetch_missing(self, wanted: Sequence[Range]) -> None:
        """Fetch ranges, unless all ranges are cached already."""
        if any(self._find(*part) is None for part in wanted):
            self.fetch(wanted)

    def read(self, url: str, start: int, end: int) -> bytes | memoryview:
        """Read a range from the cached ranges, or by a request.

        Args:
            url: The file.
            start: First byte of the range.
            end: End of the range, exclusive.

        Returns:
            The bytes, fewer at the end of the file.
        """
        content = self._find(url, start, end)
        if content is None:
            return read_ranges([(url, start, end)])[0]
        return content

    def _find(self, url: str, start: int, end: int) -> memoryview | None:
        """Return a range without copying; None if the range is not cached as a whole."""
        ranges = self._contents.get(url, [])
        i = bisect_right(ranges, start, key=lambda part: part[0]) - 1
        if i < 0:
            return None
        first, content = ranges[i]
        if end > first + len(content):
            return None
        return memoryview(content)[start - first : end - first]


def merge_ranges(wanted: Iterable[Range]) -> list[Range]:
    """Sort ranges, and merge ranges that overlap or have a short gap between.

    fsspec's own function, in versions that we support, shortens a range that contains another.
    """
    ranges: list[Range] = []
    for url, start, end in sorted(wanted):
        if start >= end:
            continue
        if ranges and ranges[-1][0] == url and start <= ranges[-1][2] + _GAP:
            ranges[-1] = (url, ranges[-1][1], max(end, ranges[-1][2]))
        else:
            ranges.append((url, start, end))
    return ranges
