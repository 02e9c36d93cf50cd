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
    minima: list[int] = []
    for index, level in enumerate(levels, 1):
        if values[index - 1] > values[index] < values[index + 1]:
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
    is_top = [math.isclose(value, top, rel_tol=_SAME) for value in values]
    # A run that fits begins below the highest rate, and ends with it.
    if not after_step and (not values or is_top[0] or not is_top[-1]):
        return []
    restarts: list[int] = []
    # The first level begins a cycle, and ends none.
    for index in range(1, len(values)):
        if is_top[index]:
            restarts.append(levels[index][0])
        elif values[index - 1] < values[index]:
            return []
    if len(restarts) < _FEWEST_CYCLES:
        return []
    return restarts


def find_length(positions: Sequence[int]) -> int | None:
    """Return the common distance between positions; None if the distances differ."""
    lengths = {after - before for before, after in pairwise(positions)}
    if len(lengths) != 1:
        return None
    return lengths.pop()


def _find_levels(rates: Sequence[float]) -> list[list[int]]:
    """Group the positions of neighbours with the same rate."""
    levels: list[list[int]] = []
    for position, rate in enumerate(rates):
        if levels and math.isclose(rates[levels[-1][0]], rate, rel_tol=_SAME):
            levels[-1].append(position)
        else:
            levels.append([position])
    return levels
