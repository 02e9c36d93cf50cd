"""Checkpoints to test with, and averages by hand to test against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckptavg.formats import Checkpoint, open_checkpoint, reader

State = Mapping[str, torch.Tensor]


def save(path: Path, state: State, **beside: Any) -> Path:
    """Write a checkpoint by its suffix; what stands beside the weights as training would put it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(state), path, metadata={k: str(v) for k, v in beside.items()})
    else:
        torch.save({"state_dict": dict(state), **beside} if beside else dict(state), path)
    return path


def save_states(directory: Path, states: Sequence[State], suffix: str = ".pt") -> list[Path]:
    """Write a run of bare state dicts, numbered in their order."""
    return [save(directory / f"epoch_{i}{suffix}", state) for i, state in enumerate(states, 1)]


def save_weight(path: Path, value: float = 0.0, **beside: Any) -> Path:
    """Write a checkpoint whose only weight says which one it is."""
    return save(path, {"w": torch.tensor([value])}, **beside)


def opened(directory: Path, states: Sequence[State], suffix: str = ".pt") -> list[Checkpoint]:
    """A run of these states, written and opened, in their order."""
    return [open_checkpoint(path) for path in save_states(directory, states, suffix)]


def names(run: Any) -> list[str]:
    """File names of the checkpoints of a run, in order."""
    return [checkpoint.path.name for checkpoint in run]


def listing(directory: Path) -> list[str]:
    """Everything below a directory, hidden files too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def counted_reads(monkeypatch: Any) -> Counter[str]:
    """Counts the bytes that are read of each file from now on."""
    read: Counter[str] = Counter()
    read_at = reader._read_at

    def counted(file: Any, out: memoryview, offset: int) -> int:
        got = read_at(file, out, offset)
        read.update({file.name: got})
        return got

    monkeypatch.setattr(reader, "_read_at", counted)
    return read


def average_by_hand(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """Σ aᵢ·wᵢ / Σ aᵢ in Python floats: one element at a time, in order, rounded at every step.

    Terms with a coefficient of 0 are left out; integers are the last tensor's.
    """
    if not (tensors[-1].is_floating_point() or tensors[-1].is_complex()):
        return tensors[-1]
    used = [(a, _doubles(t)) for a, t in zip(coefficients, tensors, strict=True) if a != 0]
    divisor = math.fsum(a for a, _ in used)
    means = []
    for i in range(len(used[0][1])):
        total = used[0][0] * used[0][1][i]
        for coefficient, values in used[1:]:
            total += coefficient * values[i]
        means.append(total / divisor)
    mean = torch.tensor(means, dtype=torch.float64)
    if dtype.is_complex:
        return torch.view_as_complex(mean.to(dtype.to_real()).view(-1, 2)).view(tensors[0].shape)
    return mean.to(dtype).view(tensors[0].shape)


def _doubles(tensor: torch.Tensor) -> list[float]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128).contiguous())
    return tensor.double().flatten().tolist()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same to the last bit, the signs of zeros too; any NaN is one."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if not one.is_floating_point():
        return torch.equal(one, other)
    nan = one.isnan()
    return torch.equal(nan, other.isnan()) and torch.equal(_raw(one, nan), _raw(other, nan))


def _raw(tensor: torch.Tensor, nan: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(nan, 0).contiguous().view(-1).view(torch.uint8)
