"""Levels of contours, close above the minimum and capped (Garipov et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Bands between levels, as in the published code.
BANDS = 7
# The cap is this many times as far above the minimum as the highest mark.
_ABOVE_MARKS = 3.0
# Bounds of the first band's share of the range. All bands can be told apart, and each is at least
# as wide as the one below it.
_THINNEST, _THICKEST = 1 / 500, 1 / 2 ** (BANDS - 1)
# Share of the surface in the first band, if the bounds admit it.
_INNERMOST = 0.05


@dataclass(frozen=True)
class Levels:
    """Levels of contours.

    Attributes:
        values: The levels in rising order; the first is the lowest value.
        capped: True if values above the last level exist.
    """

    values: tuple[float, ...]
    capped: bool


def log_levels(low: float, cap: float, log_alpha: float, count: int = BANDS) -> list[float]:
    """Space levels logarithmically above a minimum.

    lₖ = low + exp(α + k·γ), γ = (ln(cap − low) − α)/count, with l₀ = low: the levels of the code
    that Garipov et al. 2018 published with "Loss Surfaces, Mode Connectivity, and Fast Ensembling
    of DNNs" (``plane_plot.py``).

    Args:
        low: The minimum.
        cap: The last level, above the minimum.
        log_alpha: α, the logarithm of the height below which all is one band; below ln(cap − low).
        count: Number of bands.

    Returns:
        count + 1 levels.
    """
    gamma = (math.log(cap - low) - log_alpha) / count
    levels = [low]
    for number in range(1, count):
        levels.append(low + math.exp(log_alpha + gamma * number))
    return [*levels, cap]


def choose_levels(
    values: Sequence[float], marks: Sequence[float], resolution: float = 0.0
) -> Levels:
    """Choose levels that resolve the surroundings of the marked points.

    The cap is three times as far above the minimum as the highest mark, or at the surface's lower
    quartile if that is higher, and at most the maximum. The first band takes in a twentieth of
    the surface.

    Args:
        values: Finite values of the surface, at least one.
        marks: Finite values at marked points.
        resolution: Smallest difference that values can have, which no band is thinner than.

    Returns:
        The levels; a single one for a flat surface.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    # Below this, differences are rounding errors.
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return Levels((low,), capped=False)
    cap = high
    if marks:
        quartile = ordered[len(ordered) // 4]
        cap = max(low + _ABOVE_MARKS * (max(marks) - low), quartile)
    # A cap near the top, or none above the bottom, would leave bands without any width.
    if not low < cap < low + 0.9 * (high - low):
        cap = high
    span = cap - low
    first = ordered[int(_INNERMOST * len(ordered))] - low
    first = min(max(first, _THINNEST * span, resolution), _THICKEST * span)
    # The published formula puts the first level at exp(α + γ).
    log_alpha = (BANDS * math.log(first) - math.log(span)) / (BANDS - 1)
    return Levels(tuple(log_levels(low, cap, log_alpha)), capped=cap < high)
