"""Confidence intervals of metrics, for the error from scoring a sample of all possible data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ckptavg.tasks.base import Samples

Interval = tuple[float, float]
"""Lower and upper end of a 95 % interval."""

# Half-width of a normal distribution's central 95 % in standard deviations.
_Z = 1.959963984540054


def wilson_interval(right: float, count: int) -> Interval:
    """Compute the 95 % interval of a proportion (Wilson 1927).

    Brown, Cai & DasGupta (2001, Statistical Science 16, 101–133) recommend the interval over
    p ± z·√(p(1−p)/n), which is too narrow near 0 and 1.

    Args:
        right: Number of samples that are right.
        count: Number of all samples, at least 1.

    Returns:
        Fractions between 0 and 1.
    """
    share = right / count
    widening = _Z**2 / count
    centre = (share + widening / 2) / (1 + widening)
    reach = _Z * math.sqrt((share * (1 - share) + widening / 4) / count) / (1 + widening)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def mean_interval(total: float, squares: float, count: int) -> Interval | None:
    """Compute the 95 % interval of a mean, mean ± z·s/√n, from sums.

    Args:
        total: Sum of the values.
        squares: Sum of the squared values.
        count: Number of values.

    Returns:
        The ends; None for a single value, or values that are not finite.
    """
    if count < 2 or not math.isfinite(squares):
        return None
    mean = total / count
    # Rounding may leave a variance of 0 a little below 0.
    variance = max(0.0, squares - count * mean**2) / (count - 1)
    reach = _Z * math.sqrt(variance / count)
    return mean - reach, mean + reach


def samples_interval(samples: Samples) -> Interval | None:
    """Compute the 95 % interval of ``values.sum() / weights.sum()``, times the scale.

    Right or wrong (values of 0 and 1 without weights) has the interval of Wilson. Other values have
    that of a normal distribution. Weighted values are a ratio of two means, R = Σy/Σw, with the
    variance n/(n−1) · Σ(y − R·w)² / (Σw)² (Cochran 1977, Sampling Techniques, 6.4): the tokens of a
    text depend on each other, so texts count as the samples, not tokens.

    Args:
        samples: Values of the samples, on any device.

    Returns:
        The ends in the metric's unit; None for a single sample, or values that are not finite.
    """
    values = samples.values.cpu().double()
    if values.dim() != 1:
        return None
    if samples.weights is None:
        if len(values) and bool(((values == 0) | (values == 1)).all()):
            return _scale(wilson_interval(float(values.sum()), len(values)), samples.scale)
        weights = torch.ones_like(values)
    else:
        weights = samples.weights.cpu().double()
    # A text of a single token has no token to predict and a weight of 0.
    values, weights = values[weights > 0], weights[weights > 0]
    count, divisor = len(values), float(weights.sum())
    if count < 2 or not bool(torch.isfinite(values).all()):
        return None
    ratio = float(values.sum()) / divisor
    variance = float((values - ratio * weights).square().sum()) * count / (count - 1)
    reach = _Z * math.sqrt(variance) / divisor
    return _scale((ratio - reach, ratio + reach), samples.scale)


def _scale(interval: Interval, factor: float) -> Interval:
    low, high = interval
    return factor * low, factor * high
