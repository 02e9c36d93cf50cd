"""A few elements of tensors, read while an average is planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice

import torch

from ckptavg.formats.checkpoint import Tensor
from ckptavg.formats.reader import Reader, boxes

_STRETCH = 1 << 12  # elements
_STRETCHES = 3  # the beginning, the middle and the end
# Elements. A strided tensor is read by rows at least, and longer ones would not be a sample.
_LONGEST_ROW = 1 << 16


def sample(tensor: Tensor) -> torch.Tensor:
    """Read elements from the beginning, the middle and the end of a tensor.

    Args:
        tensor: A tensor of a type of whole bytes.

    Returns:
        At most ``_STRETCHES`` concatenated stretches, 1-d, in the tensor's type; all elements of a
        small tensor, none of an empty one.

    Raises:
        CheckpointError: The file cannot be read, or has become shorter.
    """
    with closing(Reader()) as reader:
        stretches = [_read(reader, tensor, start, count) for start, count in _stretches(tensor)]
    if not stretches:
        return torch.empty(0, dtype=getattr(torch, tensor.dtype.name), device="cpu")
    return torch.cat(stretches)


def read_first_values(tensors: Sequence[Tensor]) -> list[float]:
    """Read the first element of each tensor. No tensor may be empty.

    Raises:
        CheckpointError: A file cannot be read, or has become shorter.
    """
    with closing(Reader()) as reader:
        # Elements of remote files are requested together, not one request after another.
        reader.fetch((tensor, 0, 1) for tensor in tensors)
        return [float(_read(reader, tensor, 0, 1)[0]) for tensor in tensors]


def _stretches(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Choose the stretches to read, each as the first element's index and the number."""
    if not tensor.contiguous:
        row = (1, *tensor.shape)[-1]
        if row <= _LONGEST_ROW:
            yield from islice(boxes(tensor.shape, 0, tensor.numel, max(row, _STRETCH)), _STRETCHES)
        return
    if tensor.numel <= _STRETCHES * _STRETCH:
        if tensor.numel:
            yield 0, tensor.numel
        return
    last = tensor.numel - _STRETCH
    for number in range(_STRETCHES):
        yield last * number // (_STRETCHES - 1), _STRETCH


def _read(reader: Reader, tensor: Tensor, start: int, count: int) -> torch.Tensor:
    raw = bytearray(count * tensor.dtype.size)
    reader.read(tensor, start, count, memoryview(raw))
    return torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype.name))
