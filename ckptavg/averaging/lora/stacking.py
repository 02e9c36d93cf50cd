"""Stacks of factors: each adapter's factor has a slot, and is zero elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptavg.formats.checkpoint import Piece, Tensor


def assign_slots(coefficients: Sequence[float]) -> list[int]:
    """Return the index of each adapter's slot.

    An adapter with coefficient 0 shares the slot of the next adapter, as it adds nothing.
    """
    slots: list[int] = []
    used = 0
    for coefficient in coefficients:
        slots.append(used)
        if coefficient != 0:
            used += 1
    return slots


def place_factor(tensor: Tensor, dim: int, groups: int, slot: int, count: int) -> Tensor:
    """Put a tensor into a slot of a stack, with zeros in all other slots.

    Args:
        tensor: A factor.
        dim: The factor's dimension that is the rank, along which the stack grows.
        groups: Number of groups that the dimension is divided into, as by grouped convolutions.
            Each group has the slots.
        slot: Index of the slot.
        count: Number of slots.
    """
    extent = tensor.shape[dim] // groups
    pieces: list[Piece] = []
    for group in range(groups):
        # A grouped convolution needs the rows of a group together, so that each group has its
        # own slots.
        low, target = group * extent, (group * count + slot) * extent
        for piece in tensor.pieces:
            pieces += _cut(piece, dim, low, extent, target, tensor.dtype.size)
    shape = (*tensor.shape[:dim], tensor.shape[dim] * count, *tensor.shape[dim + 1 :])
    return Tensor(tensor.dtype, shape, tuple(pieces))


def _cut(piece: Piece, dim: int, low: int, extent: int, target: int, size: int) -> list[Piece]:
    """Cut an interval along a dimension out of a piece, and shift the interval into the stack.

    Args:
        piece: A piece of a tensor.
        dim: The dimension.
        low: Index at which the interval begins.
        extent: The interval's extent.
        target: Index at which the interval begins in the stack.
        size: Bytes per element.

    Returns:
        The shifted piece; none where the piece is outside the interval.
    """
    begin = max(low, piece.start[dim])
    end = min(low + extent, piece.start[dim] + piece.shape[dim])
    if begin >= end:
        return []
    skipped = (begin - piece.start[dim]) * piece.stride[dim] * size
    shape, start = list(piece.shape), list(piece.start)
    shape[dim], start[dim] = end - begin, target + begin - low
    offset = piece.offset + skipped
    return [replace(piece, offset=offset, shape=tuple(shape), start=tuple(start))]
