"""Cycles of the learning rates that a training recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_SAME = 1e-6  # relative
_FEWEST_CYCLES = 2


def find_minima(rates: Sequence[float]) -> list[int]:
    """Return the positions of the minima, the ends included; all where the rate is constant.

    Args:
        rates: In the order of training.
    """
    levels = _find_levels(rates)
    values = [math.inf, *(rates[level[0]] for level in levels), math.inf]
    minima = []
    for level, before, value, after in zip(levels, values, values[1:], values[2:], strict=False):
        if before > value < after:
            minima += level
    return minima


def find_restarts(rates: Sequence[float], *, after_step: bool = False) -> list[int]:
    """Return the positions of cycles' ends that record the first rate of the next cycle.

    A scheduler that is stepped before a checkpoint is saved has begun a new cycle by the end of
    one. Such a run reaches the highest rate straight from each minimum and ends with it. A run
    whose rates are those that its weights were trained with begins with it instead.

    Args:
        rates: In the order of training.
        after_step: Whether it is known that the scheduler is stepped before. The run then may
            begin and end anywhere.

    Returns:
        Nothing if the rates are no such, or tell of fewer than two cycles.
    """
    levels = _find_levels(rates)
    values = [rates[level[0]] for level in levels]
    top = max(values, default=0.0)
    restarts = [n for n, value in enumerate(values) if math.isclose(value, top, rel_tol=_SAME)]
    is_such = after_step or (bool(restarts) and restarts[0] > 0 and restarts[-1] == len(values) - 1)
    restarts = [n for n in restarts if n > 0]
    if len(restarts) < _FEWEST_CYCLES or not is_such:
        return []
    for n, (before, value) in enumerate(pairwise(values), 1):
        if before < value and n not in restarts:
            return []
    return [levels[restart][0] for restart in restarts]


def find_length(positions: Sequence[int]) -> int | None:
    """Return the common distance of two positions or more; None if it differs."""
    lengths = {after - before for before, after in pairwise(positions)}
    return lengths.pop() if len(lengths) == 1 else None


def _find_levels(rates: Sequence[float]) -> list[list[int]]:
    """Return the positions of neighbours that share a rate."""
    levels: list[list[int]] = []
    for position, rate in enumerate(rates):
        if levels and math.isclose(rates[levels[-1][0]], rate, rel_tol=_SAME):
            levels[-1].append(position)
        else:
            levels.append([position])
    return levels
