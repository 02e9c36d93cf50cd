"""Landscapes of rays: a mean curve per center, the rays, and the widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.lines.bundle import RayBundle, key_of_center, series_of
from ckptavg.landscape.lines.line_points import mark_name
from ckptavg.landscape.lines.loss import RayLoss
from ckptavg.landscape.lines.widths import (
    Width,
    compare_widths,
    describe_widths,
    find_crossing,
    mean_interval,
)
from ckptavg.landscape.named_points import NamedPoint
from ckptavg.landscape.points import PointScore
from ckptavg.landscape.store import Scores
from ckptavg.tasks import Metric


@dataclass(frozen=True)
class RayFigure:
    """Layout of scored rays.

    Attributes:
        bundle: The rays.
        loss: The loss that tells the width; None where the task names none.
        metrics: The task's metrics.
    """

    bundle: RayBundle
    loss: RayLoss | None
    metrics: Sequence[Metric]

    def lay_out(self, scores: Scores) -> Landscape:
        """Lay out the points that have scores.

        Args:
            scores: Scores by the keys of ``RayBundle.to_score``.
        """
        points: list[Point] = []
        checkpoints: list[Landmark] = []
        averages: list[Landmark] = []
        for center in self.bundle.centers:
            points += self._mean_curve(center, scores)
            for number in range(self.bundle.settings.directions):
                points += self._ray(center, number, scores)
            if center.position is None:
                averages.append(self._landmark(center, scores))
            else:
                checkpoints.append(self._landmark(center, scores))
        return Landscape(
            kind="rays",
            axes=("t, distance from the center in weight space", ""),
            metrics=tuple(self.metrics),
            points=tuple(points),
            checkpoints=tuple(checkpoints),
            averages=tuple(averages),
            facts=self._facts(scores),
        )

    def _ray(self, center: NamedPoint, number: int, scores: Scores) -> list[Point]:
        """Return the points of a ray that have scores, the center included."""
        points: list[Point] = []
        for t in self.bundle.grid:
            score = self.bundle.score_at(center, number, t, scores)
            if score is not None:
                point = Point(
                    t, data=score.data, train=score.train, series=series_of(center, number)
                )
                points.append(replace(point, interval=score.interval))
        return points

    def _mean_curve(self, center: NamedPoint, scores: Scores) -> list[Point]:
        """Return the mean over the directions at each t, with its 95 % interval."""
        points: list[Point] = []
        for t in self.bundle.grid:
            at_t: list[PointScore] = []
            for number in range(self.bundle.settings.directions):
                score = self.bundle.score_at(center, number, t, scores)
                if score is not None:
                    at_t.append(score)
            if at_t:
                points.append(_mean_point(t, center.name, at_t))
        return points

    def _landmark(self, center: NamedPoint, scores: Scores) -> Landmark:
        """Return a center, a checkpoint with statistics of its own."""
        name = mark_name(center, recompute=self.bundle.recompute)
        landmark = Landmark(name, None, None, None, 0.0)
        if center.position is not None:
            checkpoint = self.bundle.named.run[center.position]
            landmark = replace(
                landmark,
                path=str(checkpoint.path), step=checkpoint.step, lr=checkpoint.record.lr,
            )  # fmt: skip
        score = scores.get(name, scores.get(key_of_center(center)))
        if score is not None:
            landmark = replace(landmark, data=score.data, train=score.train)
        return landmark

    def _facts(self, scores: Scores) -> dict[str, Any]:
        bundle = self.bundle
        facts: dict[str, Any] = {
            "centers": [center.name for center in bundle.centers],
            "distances": list(bundle.distances),
            "norms": list(bundle.norms),
            "directions": bundle.settings.directions,
            "seed": bundle.settings.seed,
            "radius": bundle.radius,
            "rise": None,
            "widths": [],
            "differences": [],
            "text": "",
        }
        if self.loss is None:
            facts["text"] = "the task names no loss whose rise would tell a width"
            return facts
        first = scores.get(key_of_center(bundle.centers[0]))
        if first is None:
            return facts
        rise = self.loss.choose_rise(first, bundle.settings.rise)
        facts["rise"] = {**self.loss.as_json(), "value": rise}
        widths = self._widths(rise, scores)
        if not widths:
            return facts
        facts["widths"] = [width.as_json() for width in widths]
        for other in widths[1:]:
            entry: dict[str, Any] = {
                "center": other.center,
                "mean": None,
                "low": None,
                "high": None,
            }
            difference = widths[0].difference(other)
            if difference is not None:
                entry |= difference.as_json()
            entry["wider"] = compare_widths(widths[0], other).wider
            facts["differences"].append(entry)
        facts["text"] = describe_widths(widths, self.loss.describe(rise), bundle.radius)
        return facts

    def _widths(self, rise: float, scores: Scores) -> list[Width]:
        """Measure the width of each center; none before all points have scores."""
        widths: list[Width] = []
        if self.loss is None:
            return widths
        for center in self.bundle.centers:
            each: list[float | None] = []
            for number in range(self.bundle.settings.directions):
                losses: list[float] = []
                for t in self.bundle.grid:
                    score = self.bundle.score_at(center, number, t, scores)
                    if score is None:
                        return []
                    losses.append(self.loss.of(score))
                each.append(find_crossing(self.bundle.grid, losses, losses[0] + rise))
            widths.append(Width(center.name, tuple(each)))
        return widths


def _mean_point(t: float, series: str, scores: Sequence[PointScore]) -> Point:
    """Return the mean of scores at one distance.

    Args:
        t: The distance.
        series: Name of the mean curve.
        scores: Scores in some directions.
    """
    means: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for key, values in _columns([score.data for score in scores]).items():
        interval = mean_interval(values)
        means[key] = interval.mean
        # All directions share the center.
        if t and math.isfinite(interval.low):
            intervals[key] = (interval.low, interval.high)
    train: dict[str, float] = {}
    for key, values in _columns([score.train or {} for score in scores]).items():
        train[key] = mean_interval(values).mean
    return Point(t, data=means, train=train or None, interval=intervals, series=series)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the values of each metric that all rows have."""
    columns: dict[str, list[float]] = {}
    for key in rows[0]:
        # The number of samples is the same everywhere, and no metric.
        if key != "n" and all(key in row for row in rows):
            columns[key] = [row[key] for row in rows]
    return columns
