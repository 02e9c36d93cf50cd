"""Noise on the averages of one block."""

from __future__ import annotations

import math

import torch

from ckptavg.averaging.read_groups import Group, OutputTerm


def compute_deviations(group: Group, rows: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Compute the standard deviation of the sources of each output with noise.

    Args:
        group: The tensors.
        rows: float64, (sources, floats): a block of the sources of ``group.spread``.

    Returns:
        Positions of an output's sources → float64, (floats,). Outputs of the same sources share it.
    """
    row_of = dict(zip(group.spread, range(len(rows)), strict=True))
    deviations: dict[tuple[int, ...], torch.Tensor] = {}
    for output in group.outputs:
        noise, positions = output.plan.noise, output.source_indices
        if noise is not None and positions not in deviations:
            own_rows = [row_of[position] for position in positions]
            deviations[positions] = noise.deviation(rows, own_rows)
    return deviations


def add_noise(
    total: torch.Tensor, output: OutputTerm, deviation: torch.Tensor, start: int, count: int
) -> None:
    """Add noise to a block of an average.

    Args:
        total: float64, (floats,), changed in place.
        output: The tensor.
        deviation: float64, (floats,): standard deviation of the tensor's sources.
        start: Index of the block's first element.
        count: Number of elements in the block.
    """
    noise = output.plan.noise
    if noise is None:
        return
    # A complex number has noise on both of its floats.
    per_element = len(total) // count
    numel = math.prod(output.plan.shape) * per_element
    numbers = noise.draw(start * per_element, len(total), numel)
    total.add_(numbers.mul_(deviation).mul_(noise.factor))
