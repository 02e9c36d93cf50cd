"""The test that boxes from several files make up a whole tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Protocol

# Most boxes that are compared in pairs, which takes quadratic time. More boxes must make a grid.
_MOST_COMPARED = 512


class Box(Protocol):
    """A box of a tensor's elements."""

    @property
    def start(self) -> tuple[int, ...]:
        """Index in the tensor of the box's first element."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Extent of the box along each dimension, in elements."""


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Return True if boxes cover each element of a tensor once.

    Args:
        shape: The tensor's shape.
        boxes: The boxes, in any order. An empty tensor has none.
    """
    if any(len(box.start) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return False
    if not math.prod(shape):
        return not boxes
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        return False
    # The counts are equal: boxes inside the tensor and without overlap cover every element.
    return _is_grid(shape, boxes, 0) or (len(boxes) <= _MOST_COMPARED and _are_apart(shape, boxes))


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box], dimension: int) -> bool:
    """Return True if boxes make slabs along a dimension, and each slab a grid along the next.

    Args:
        shape: The tensor's shape.
        boxes: The boxes of one slab along the dimensions before.
        dimension: The dimension to cut along.
    """
    if dimension == len(shape):
        return len(boxes) == 1

    def extent_of(box: Box) -> tuple[int, int]:
        """Return the start and the extent of a box along the dimension."""
        return box.start[dimension], box.shape[dimension]

    # Sorted, not hashed: an untrusted file can choose pairs with equal hashes.
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
    """Return True if all boxes are inside a tensor and no two share an element."""
    for box in boxes:
        bounds = zip(box.start, box.shape, shape, strict=True)
        if any(start + extent > end for start, extent, end in bounds):
            return False
    return not any(_overlap(*pair) for pair in combinations(boxes, 2))


def _overlap(first: Box, second: Box) -> bool:
    """Return True if two boxes share an element: the intervals meet in each dimension."""
    return all(
        a < b + m and b < a + n
        for a, n, b, m in zip(first.start, first.shape, second.start, second.shape, strict=True)
    )
