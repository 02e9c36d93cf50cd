"""Grids over an area of a plane, from coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ckptavg.errors import UsageError

_FEWEST = 2


@dataclass(frozen=True)
class Grid:
    """Points at equal distances along both axes.

    Attributes:
        x: Coordinates of the columns, rising.
        y: Coordinates of the rows, rising.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    @classmethod
    def around(cls, positions: Sequence[tuple[float, float]], points: int, margin: float) -> Grid:
        """Lay a grid around some positions.

        Args:
            positions: (x, y) of at least two positions that differ along both axes.
            points: Number of points along each axis.
            margin: Width of the area beyond the outermost positions on each side, as a share of
                their extent.
        """
        columns, rows = zip(*positions, strict=True)
        return cls(_spaced(columns, points, margin), _spaced(rows, points, margin))

    def coarse_to_fine(self) -> Iterator[tuple[float, float]]:
        """Yield (x, y) of all points: first 3 × 3 over the whole area, then 5 × 5, and so on.

        Each level has the points between those of the level before, row by row.
        """
        seen: set[tuple[int, int]] = set()
        for rows, columns in zip(_levels(len(self.y)), _levels(len(self.x)), strict=True):
            for row in rows:
                for column in columns:
                    if (row, column) not in seen:
                        seen.add((row, column))
                        yield self.x[column], self.y[row]

    def by_rows(self) -> Iterator[tuple[float, float]]:
        """Yield (x, y) of all points, row by row."""
        for y in self.y:
            for x in self.x:
                yield x, y


def check_grid(points: int, margin: float) -> None:
    """Refuse numbers that make no grid.

    Raises:
        UsageError: There are too few points along an axis, or the margin cannot be meant.
    """
    if type(points) is not int or points < _FEWEST:
        raise UsageError(
            f"`points` along each axis are expected to be a whole number from {_FEWEST} on but got "
            f"{points!r}"
        )
    if not (isinstance(margin, (int, float)) and 0 <= margin < math.inf):
        raise UsageError(f"`margin` is expected to be a number from 0 on but got {margin!r}")


def _spaced(values: Sequence[float], points: int, margin: float) -> tuple[float, ...]:
    """Return coordinates at equal distances over the range of some values, and a margin."""
    low, high = min(values), max(values)
    beyond = margin * (high - low)
    low, high = low - beyond, high + beyond
    coordinates: list[float] = []
    for number in range(points):
        share = number / (points - 1)
        coordinates.append((1 - share) * low + share * high)
    return tuple(coordinates)


def _levels(count: int) -> Iterator[list[int]]:
    """Yield positions along an axis: 3 of them, then 5, 9 and so on, up to all.

    Each level has the positions of the level before.
    """
    parts = 2
    while parts < count - 1:
        # Halves of an odd distance are rounded; nested levels stay nested.
        yield sorted({number * (count - 1) // parts for number in range(parts + 1)})
        parts *= 2
    yield list(range(count))
