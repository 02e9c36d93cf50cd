"""Information in the weights of a layer: entropy of their values, or L1 norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing

import torch

from ckptavg.averaging.schemes.grafting import Measure
from ckptavg.errors import NonFiniteError
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.reader import Reader, boxes

# Elements that are converted at a time. torch does not split operations of this size.
_BLOCK = 1 << 15
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


def measure_information(
    tensor: Tensor, owner: Checkpoint, name: str, measure: Measure, bins: int
) -> float:
    """Measure the information in a tensor, which is read once and held in memory.

    Args:
        tensor: A tensor of floats or complex numbers, not empty.
        owner: The checkpoint of the tensor, for messages.
        name: Name of the tensor, for messages.
        measure: ``entropy`` or ``l1``.
        bins: Number of bins of the entropy.

    Returns:
        The entropy in nats, or the sum of absolute values.

    Raises:
        NonFiniteError: A value is not finite.
        CheckpointError: The file cannot be read.
    """
    values = _read(tensor)
    low, high = map(float, torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteError(
            f"{name} is not finite in {owner.path}, and has no information to graft by",
            "Leave the checkpoint out, or the tensor with `exclude`.",
        )
    if measure == "l1":
        return _l1_norm(values)
    return _entropy(values, low, high, bins)


def _entropy(values: torch.Tensor, low: float, high: float, bins: int) -> float:
    """Compute −Σ p ln p of the shares p of values in equal bins (Meng et al. 2020, equation 3).

    The bins divide the range from the least to the greatest value. The last one includes its end,
    the greatest value. The published code leaves that value out.

    Args:
        values: Floats, (values,).
        low: The least value.
        high: The greatest value.
        bins: Number of bins.
    """
    width = (high - low) / bins
    edges = torch.tensor([low + width * i for i in range(1, bins)], dtype=torch.float64)
    counts = torch.zeros(bins, dtype=torch.int64)
    for block in _blocks(values):
        # An edge belongs to the bin above it.
        counts += torch.bucketize(block, edges, right=True).bincount(minlength=bins)
    shares = [count / values.numel() for count in counts.tolist() if count]
    return math.fsum(-share * math.log(share) for share in shares)


def _l1_norm(values: torch.Tensor) -> float:
    """Compute Σ |v|, the same on every processor: each block is added up by halves."""
    sums: list[float] = []
    for block in _blocks(values):
        addends = block.abs()
        while len(addends) > 1:
            half = len(addends) // 2
            rest = addends[2 * half :]
            addends = torch.cat([addends[:half] + addends[half : 2 * half], rest])
        sums.append(float(addends[0]))
    return math.fsum(sums)


def _blocks(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield values block by block, converted to float64."""
    for start in range(0, len(values), _BLOCK):
        yield values[start : start + _BLOCK].to(torch.float64)


def _read(tensor: Tensor) -> torch.Tensor:
    """Read a tensor: floats of its own type, (values,), a complex number as two."""
    raw = bytearray(tensor.nbytes)
    view = memoryview(raw)
    size = tensor.dtype.size
    with closing(Reader()) as reader:
        if tensor.contiguous:
            reader.fetch([(tensor, 0, tensor.numel)])
            reader.read(tensor, 0, tensor.numel, view)
        else:
            for start, count in boxes(tensor.shape, 0, tensor.numel, tensor.numel):
                reader.read(tensor, start, count, view[start * size :])
    return torch.frombuffer(
        raw, dtype=getattr(torch, _REAL.get(tensor.dtype.name, tensor.dtype.name))
    )
