"""The test that a tensor's boxes, which lie in different files, make the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Protocol

# Boxes that are compared each with each, which takes quadratic time. More must make a grid.
_MOST_COMPARED = 512


class Box(Protocol):
    """A box of a tensor's elements."""

    @property
    def start(self) -> tuple[int, ...]:
        """Index of its first element in the tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its extents."""


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Tell whether boxes cover a tensor, each element once.

    Args:
        shape: The tensor's shape.
        boxes: The boxes, in any order.
    """
    if any(len(box.start) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return False
    if not math.prod(shape):
        return not boxes
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        return False
    # As many elements as the tensor, all inside it and none twice, are all of it.
    return _is_grid(shape, boxes, 0) or (len(boxes) <= _MOST_COMPARED and _are_apart(shape, boxes))


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box], dimension: int) -> bool:
    """Tell whether boxes make slabs along a dimension, each cut likewise along the next one.

    Args:
        shape: The tensor's shape.
        boxes: The boxes of one slab along the dimensions before.
        dimension: The dimension to cut along.
    """
    if dimension == len(shape):
        return len(boxes) == 1

    def extent_of(box: Box) -> tuple[int, int]:
        return box.start[dimension], box.shape[dimension]

    # Sorted, not hashed: such pairs can be made to have one hash.
    position = 0
    slabs: list[list[Box]] = []
    for (start, extent), slab in groupby(sorted(boxes, key=extent_of), key=extent_of):
        if start != position:
            return False
        position += extent
        slabs.append(list(slab))
    return position == shape[dimension] and all(
        _is_grid(shape, slab, dimension + 1) for slab in slabs
    )


def _are_apart(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Tell whether boxes lie inside a tensor and no two share an element."""
    for box in boxes:
        bounds = zip(box.start, box.shape, shape, strict=True)
        if any(start + extent > end for start, extent, end in bounds):
            return False
    return not any(_overlap(*pair) for pair in combinations(boxes, 2))


def _overlap(first: Box, second: Box) -> bool:
    """Tell whether two boxes share an element: whether their intervals meet in each dimension."""
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(first.start, first.shape, second.start, second.shape, strict=True)
    )
