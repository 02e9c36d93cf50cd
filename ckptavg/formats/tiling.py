"""Boxes of a tensor that lie in different files, and whether they make all of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Protocol

_PAIRS = 512  # boxes that are compared each with each


class Box(Protocol):
    """A part of a tensor.

    Attributes:
        start: Index in the tensor of its first element.
        shape: Its extent.
    """

    @property
    def start(self) -> tuple[int, ...]: ...  # noqa: D102 - above

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102 - above


def tiles(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Whether boxes cover a tensor, each element once."""
    if any(len(box.start) != len(shape) or len(box.shape) != len(shape) for box in boxes):
        return False
    if not math.prod(shape):
        return not boxes
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        return False
    return _is_grid(shape, boxes, 0) or (len(boxes) <= _PAIRS and _are_apart(shape, boxes))


def _is_grid(shape: tuple[int, ...], boxes: Sequence[Box], dimension: int) -> bool:
    """Whether boxes are slabs along a dimension, each slab cut along the next one likewise."""
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
    """Whether boxes lie inside a tensor and no two share an element."""
    inside = all(
        a + n <= m for box in boxes for a, n, m in zip(box.start, box.shape, shape, strict=True)
    )
    return inside and not any(
        all(
            a < b + m and b < a + n
            for a, n, b, m in zip(one.start, one.shape, other.start, other.shape, strict=True)
        )
        for i, one in enumerate(boxes)
        for other in boxes[:i]
    )
