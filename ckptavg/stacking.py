"""Factors of several adapters at their places in one stack."""

from __future__ import annotations

from dataclasses import replace

from ckptavg.formats.table import Piece, Tensor


def placed(tensor: Tensor, dim: int, groups: int, place: int, count: int) -> Tensor:
    """A tensor at one of ``count`` places along a dimension, in each of its groups."""
    extent = tensor.shape[dim] // groups
    pieces = [
        moved
        for group in range(groups)
        for piece in tensor.pieces
        for moved in _moved(
            piece, dim, group * extent, extent, (group * count + place) * extent, tensor.dtype.size
        )
    ]
    shape = (*tensor.shape[:dim], tensor.shape[dim] * count, *tensor.shape[dim + 1 :])
    return Tensor(tensor.dtype, shape, tuple(pieces))


def _moved(piece: Piece, dim: int, low: int, extent: int, to: int, size: int) -> list[Piece]:
    """The part of a piece from ``low`` on along a dimension, at ``to`` instead."""
    begin = max(low, piece.start[dim])
    end = min(low + extent, piece.start[dim] + piece.shape[dim])
    if begin >= end:
        return []
    skipped = (begin - piece.start[dim]) * piece.stride[dim] * size
    shape, start = list(piece.shape), list(piece.start)
    shape[dim], start[dim] = end - begin, to + begin - low
    offset = piece.offset + skipped
    return [replace(piece, offset=offset, shape=tuple(shape), start=tuple(start))]
