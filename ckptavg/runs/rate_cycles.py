"""Cycles of the recorded learning rates of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

# Relative difference up to which two rates count as equal.
_SAME = 1e-6
_FEWEST_CYCLES = 2


def find_minima(rates: Sequence[float]) -> list[int]:
    """Return the positions of the minima, the ends included.

    With a constant rate, all positions are minima.

    Args:
        rates: Learning rates in the order of training.
    """
    levels = _find_levels(rates)
    # Infinity beside both ends, so that the ends count as minima too.
    values = [math.inf, *(rates[level[0]] for level in levels), math.inf]
    minima = []
    for level, before, value, after in zip(levels, values, values[1:], values[2:], strict=False):
        if before > value < after:
            minima += level
    return minima


def find_restarts(rates: Sequence[float], *, after_step: bool = False) -> list[int]:
    """Return the positions of cycles' ends that record the first rate of the next cycle.

    Some trainings step the scheduler before they save a checkpoint. At the end of a cycle, the
    scheduler has then begun the next cycle. The rates of such a run rise straight from each minimum
    to the highest rate, and the run ends with the highest rate. If the recorded rates are those
    that the weights were trained with, the run begins with the highest rate instead.

    Args:
        rates: Learning rates in the order of training.
        after_step: True if the scheduler is known to be stepped before the save. The run then may
            begin and end anywhere in a cycle.

    Returns:
        The positions; empty if the rates do not fit, or show fewer than two cycles.
    """
    levels = _find_levels(rates)
    values = [rates[level[0]] for level in levels]
    top = max(values, default=0.0)
    restarts = [n for n, value in enumerate(values) if math.isclose(value, top, rel_tol=_SAME)]
    is_such = after_step or (bool(restarts) and restarts[0] > 0 and restarts[-1] == len(values) - 1)
    # The first level begins a cycle, and ends none.
    restarts = [n for n in restarts if n > 0]
    if len(restarts) < _FEWEST_CYCLES or not is_such:
        return []
    for n, (before, value) in enumerate(pairwise(values), 1):
        if before < value and n not in restarts:
            return []
    return [levels[restart][0] for restart in restarts]


def find_length(positions: Sequence[int]) -> int | None:
    """Return the common distance between positions; None if the distances differ."""
    lengths = {after - before for before, after in pairwise(positions)}
    return lengths.pop() if len(lengths) == 1 else None


def _find_levels(rates: Sequence[float]) -> list[list[int]]:
    """Group the positions of neighbours with the same rate."""
    levels: list[list[int]] = []
    for position, rate in enumerate(rates):
        if levels and math.isclose(rates[levels[-1][0]], rate, rel_tol=_SAME):
            levels[-1].append(position)
        else:
            levels.append([position])
    return levels
