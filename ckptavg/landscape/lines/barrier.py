"""Barriers on the straight line between two points of weight space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptavg.landscape.landscape import Point
from ckptavg.tasks import Metric

# Relative error of a height that rounding alone can cause.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Barrier:
    """Height of a barrier between two points of weight space.

    The height is the maximum over t of E(w(t)) − (1 − t)·E(w(0)) − t·E(w(1)), for w(t) between two
    ends w(0) and w(1): the most by which an error lies above the straight line between the errors
    of the ends (Entezari et al. 2022). It is 0 where the error is convex along the
    segment, up to the noise of the data. Frankle et al. 2020, section 2, subtract the mean of the
    two ends' errors in place of the straight line; both agree where the ends do equally well.
    Two minima without a barrier are linearly connected. Garipov et al. 2018 show that independently
    trained networks are not, but by a curve.

    Attributes:
        metric: Key of the metric.
        title: Name of the metric, for people.
        unit: Unit of the height: percentage points for a percentage.
        data: ``evaluation data`` or ``training data``.
        height: The height, at least 0; infinite where a point between the ends is a hole, and NaN
            where an end is.
        at: The t of the maximum.
    """

    metric: str
    title: str
    unit: str
    data: str
    height: float
    at: float

    def describe(self) -> str:
        """Word the barrier, for a sentence about a segment."""
        name = f"{self.title.removesuffix('%').strip()} on {self.data}"
        if math.isnan(self.height):
            return f"an unknown barrier in {name}, as an end is not finite"
        if math.isinf(self.height):
            return f"an infinite barrier in {name}, which is not finite at t = {self.at:.2f}"
        if not self.height:
            return f"no barrier in {name}"
        unit = {"%": "percentage points"}.get(self.unit, self.unit)
        height = f"{self.height:.3g} {unit}".strip()
        return f"a barrier of {height} in {name} at t = {self.at:.2f}"

    def as_json(self) -> dict[str, Any]:
        """Return the barrier as plain values for JSON."""
        height = None
        if math.isfinite(self.height):
            height = self.height
        return {
            "metric": self.metric,
            "title": self.title,
            "unit": self.unit,
            "data": self.data,
            "height": height,
            "at": self.at,
        }


def choose_barriers(barriers: Sequence[Barrier], loss: str | None) -> list[Barrier]:
    """Choose the barriers to name in a sentence: of the first metric, and of the loss.

    Args:
        barriers: The barriers of a segment.
        loss: Key of the loss; None where the task names none.

    Returns:
        The first metric on evaluation data, and the loss on training data, else on evaluation data.
    """
    chosen = list(barriers[:1])
    losses = [barrier for barrier in barriers if barrier.metric == loss]
    if losses and losses[-1] not in chosen:
        chosen.append(losses[-1])
    return chosen


def measure_barriers(points: Sequence[Point], metrics: Sequence[Metric]) -> list[Barrier]:
    """Measure the barriers of all metrics that say which of their values are better.

    Args:
        points: Points of a segment, with t as ``x``; those at 0 and 1 are the ends.
        metrics: The metrics. A metric of which more is better counts with the opposite sign, as an
            error.

    Returns:
        A barrier per metric on the evaluation data, then one per metric on the training data.
    """
    barriers: list[Barrier] = []
    between = [point for point in points if 0 <= point.x <= 1]
    sources: dict[str, list[Mapping[str, float]]] = {
        "evaluation data": [point.data for point in between],
        "training data": [point.train or {} for point in between],
    }
    positions = [point.x for point in between]
    for data, scores in sources.items():
        for metric in metrics:
            if metric.higher is None or any(metric.key not in values for values in scores):
                continue
            sign = -1.0 if metric.higher else 1.0
            errors = [sign * values[metric.key] for values in scores]
            height, at = _height(positions, errors)
            barriers.append(Barrier(metric.key, metric.title, metric.unit, data, height, at))
    return barriers


def _height(positions: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Return the height of a barrier and its position; NaN where an end is not finite."""
    start, end = errors[positions.index(0.0)], errors[positions.index(1.0)]
    if not (math.isfinite(start) and math.isfinite(end)):
        return math.nan, math.nan
    highest, at = 0.0, 0.0
    for position, error in zip(positions, errors, strict=True):
        height = error - (1 - position) * start - position * end
        if not math.isfinite(error):
            height = math.inf
        # A straight line has no barrier by the rounding of its values.
        if height > max(highest, _ROUNDING * abs(error)):
            highest, at = height, position
    return highest, at
