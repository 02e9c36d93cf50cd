"""Segments of weight space between two points of a run, scored."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.errors import UsageError, short
from ckptavg.errors.notes import collect_notes
from ckptavg.inspection.geometry import Geometry, geometry
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.lines.barrier import Barrier, choose_barriers, measure_barriers
from ckptavg.landscape.lines.line_points import (
    candidate_of,
    has_statistics_to_recompute,
    mark_name,
    metrics_with_l2,
)
from ckptavg.landscape.named_points import (
    AVERAGE,
    NamedPoint,
    NamedPoints,
    PointName,
    find_points,
    only_position,
)
from ckptavg.landscape.plane import inner_product, length
from ckptavg.landscape.points import PointLike, PointScorer
from ckptavg.landscape.store import Key, Scores, check_results, score_landscape
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.tasks import Task

_FEWEST_POINTS = 2


def segment(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None,
    ends: Sequence[PointName] = (AVERAGE, "last"), points: int = 21, beyond: float = 0.25,
    weight_decay: float | None = None,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score points on the straight line between two points of weight space.

    w(t) = (1 − t)·w_a + t·w_b, as in figure 5 of Izmailov et al. 2018, with the average and the
    last weights of SGD. BatchNorm statistics are recomputed at every point, the ends included. An
    end that is a checkpoint is scored with its own statistics besides, as ``evaluate`` does::

        print(ckptavg.segment(run, model, val_data, train_data=train_data).facts["text"])

    Args:
        run: The run, or a path.
        model: A module that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, as for ``evaluate``.
        train_data: Training data: statistics are recomputed from it, and the loss on it is scored.
        ends: Two of ``average`` (uniform, of the run), ``first``, ``middle``, ``last``, file names
            of checkpoints, and paths of other runs, whose final checkpoint is taken.
        points: Number of points from end to end, both included.
        beyond: Part of the segment to go on beyond each end, at the same spacing; 0 for none.
        weight_decay: λ of the L2 term λ/2·‖w‖², with which the loss is scored besides.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, results, resume,
            progress: As for ``evaluate``; results are a ``.json`` or ``.npz`` file.

    Returns:
        The landscape. ``x`` is t. ``facts`` has the ``ends``, their ``distance``, the ``barriers``
        (see ``Barrier``) and a sentence as ``text``. Checkpoints are at their projections, with
        their distance off the line.

    Raises:
        UsageError: A point is unknown, the two ends are the same, or a number cannot be meant.
        CkptavgError: As for ``evaluate``.
    """
    _check_numbers(points, beyond)
    check_results(results, "segment", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        named = check_ends(as_run(run), ends)
        scorer = PointScorer.open(
            named.run, model, data, train_data=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples, weight_decay=weight_decay,
        )  # fmt: skip
        line = SegmentPoints(
            named, scorer.task, geometry(named.run), space_evenly(points, beyond),
            has_statistics_to_recompute(scorer),
        )  # fmt: skip
        landscape = score_landscape(
            scorer, line.to_score(), line.lay_out, results=results, resume=resume,
            progress=reporter,
        )  # fmt: skip
    return replace(landscape, notes=tuple(notes))


def _check_numbers(points: int, beyond: float) -> None:
    """Refuse arguments that cannot be meant.

    Raises:
        UsageError: There is such an argument.
    """
    if type(points) is not int or points < _FEWEST_POINTS:
        raise UsageError(
            f"`points` of a segment is expected to be a whole number from {_FEWEST_POINTS} on but "
            f"is {points!r}"
        )
    if not (isinstance(beyond, (int, float)) and 0 <= beyond < math.inf):
        raise UsageError(f"`beyond` is expected to be a number from 0 on but is {beyond!r}")


def space_evenly(points: int, beyond: float) -> tuple[float, ...]:
    """Return t of each point.

    Args:
        points: Number of points from end to end.
        beyond: Part of the segment to go on beyond each end.
    """
    spacing = points - 1
    # A little more, so that rounding does not lose the last point.
    further = math.floor(beyond * spacing + 1e-9)
    return tuple(number / spacing for number in range(-further, spacing + further + 1))


def check_ends(run: Run, ends: Sequence[PointName]) -> NamedPoints:
    """Find the ends of a segment, before any work.

    Args:
        run: The checkpoints.
        ends: As for ``segment``.

    Raises:
        UsageError: There are not two, one is unknown, or both are the same.
    """
    if isinstance(ends, str) or len(ends) != 2:
        raise UsageError(f"a segment has two ends but got {short(repr(ends))}")
    named = find_points(run, ends)
    first, second = named.points
    if first.coefficients == second.coefficients:
        raise UsageError(
            f"the two ends of the segment are the same: {first.name} and {second.name}",
            "Name two checkpoints that differ, or a longer run.",
        )
    return named


@dataclass(frozen=True)
class SegmentPoints:
    """Points of a segment between two ends, and the landscape of their scores.

    Attributes:
        named: The two ends, and the run that their coefficients are over.
        task: The task that scores.
        geometry: Inner products of the run.
        grid: t of each point, rising, with 0 and 1.
        recomputes: True if there are statistics to recompute, and data to recompute these from.

    Raises:
        UsageError: The ends have the same weights.
    """

    named: NamedPoints
    task: Task
    geometry: Geometry
    grid: tuple[float, ...]
    recomputes: bool

    def __post_init__(self) -> None:
        if not self.distance:
            first, second = self.named.points
            raise UsageError(
                f"the two ends of the segment have the same weights: {first.name} and {second.name}"
            )

    @property
    def distance(self) -> float:
        """Distance of the ends in weight space."""
        return length(self.geometry.differences, self._direction)

    @property
    def _start(self) -> torch.Tensor:
        return torch.tensor(self.named.points[0].coefficients, dtype=torch.float64)

    @property
    def _direction(self) -> torch.Tensor:
        """Coefficients of the step from one end to the other."""
        return torch.tensor(self.named.points[1].coefficients, dtype=torch.float64) - self._start

    def coefficients(self, t: float) -> tuple[float, ...]:
        """Return the coefficients of w(t)."""
        start, end = self.named.points
        mixed: list[float] = []
        for a, b in zip(start.coefficients, end.coefficients, strict=True):
            mixed.append((1 - t) * a + t * b)
        return tuple(mixed)

    def to_score(self) -> dict[Key, PointLike]:
        """List the points to score by their keys, the ends first, as all else is seen against them.

        An end that is a checkpoint is listed twice: by name with statistics of its own, and by its
        coefficients, with statistics that are recomputed as at all points between.
        """
        listed: dict[Key, PointLike] = {}
        for end in self.named.points:
            if end.position is not None and self.recomputes:
                listed[self._mark_name(end)] = end.coefficients
        for end in self.named.points:
            listed[end.coefficients] = candidate_of(self.named.run, end, recompute=self.recomputes)
        for t in self.grid:
            coefficients = self.coefficients(t)
            listed.setdefault(coefficients, coefficients)
        return listed

    def _mark_name(self, end: NamedPoint) -> str:
        return mark_name(end, recompute=self.recomputes)

    def lay_out(self, scores: Scores) -> Landscape:
        """Lay out the points that have scores.

        Args:
            scores: Scores by the keys of ``to_score``.
        """
        points: list[Point] = []
        for t in self.grid:
            coefficients = self.coefficients(t)
            if coefficients in scores:
                score = scores[coefficients]
                points.append(
                    Point(t, None, coefficients, score.data, score.train, interval=score.interval)
                )
        first, second = self.named.points
        barriers = measure_barriers(points, metrics_with_l2(self.task))
        return Landscape(
            kind="segment",
            axes=(f"t, from {first.name} (0) to {second.name} (1)", ""),
            metrics=tuple(self.task.metrics),
            points=tuple(points),
            checkpoints=tuple(self._checkpoints(scores)),
            averages=tuple(self._averages(scores)),
            facts={
                "ends": [first.name, second.name],
                "distance": self.distance,
                "loss": self.task.loss,
                "barriers": [barrier.as_json() for barrier in barriers],
                "text": self._describe(barriers),
            },
        )

    def _checkpoints(self, scores: Scores) -> list[Landmark]:
        """Return all checkpoints at their projections; the ends have scores."""
        run = self.named.run
        names = short_names(paths_of(run.checkpoints))
        ends = {end.position: end for end in self.named.points}
        landmarks: list[Landmark] = []
        for position, checkpoint in enumerate(run):
            coefficients = [0.0] * len(run)
            coefficients[position] = 1.0
            name = names[position]
            if position in ends:
                name = self._mark_name(ends[position])
            mark = self._landmark(name, coefficients, scores)
            landmarks.append(
                replace(
                    mark, path=str(checkpoint.path), step=checkpoint.step, lr=checkpoint.record.lr
                )
            )
        return landmarks

    def _averages(self, scores: Scores) -> list[Landmark]:
        """Return the average of the run, whether it is an end or not."""
        own = self.named.own
        coefficients = [1 / own] * own + [0.0] * (len(self.named.run) - own)
        if only_position(coefficients) is not None:
            return []
        return [self._landmark(AVERAGE, coefficients, scores)]

    def _landmark(self, name: str, coefficients: Sequence[float], scores: Scores) -> Landmark:
        """Return the landmark of a point at its projection, with scores if it is an end.

        Args:
            name: Name in the figure.
            coefficients: The point, (n,).
            scores: Scores by the keys of ``to_score``.
        """
        differences, direction = self.geometry.differences, self._direction
        offset = torch.tensor(coefficients, dtype=torch.float64) - self._start
        t = inner_product(differences, offset, direction) / self.distance**2
        landmark = Landmark(
            name, None, None, None, t, None, length(differences, offset - t * direction)
        )
        for end in self.named.points:
            score = scores.get(self._mark_name(end), scores.get(end.coefficients))
            if end.coefficients == tuple(coefficients) and score is not None:
                return replace(landmark, data=score.data, train=score.train)
        return landmark

    def _describe(self, barriers: Sequence[Barrier]) -> str:
        """Word the barriers in a sentence: of the first metric, and of the loss."""
        first, second = self.named.points
        text = f"{first.name} and {second.name} are {self.distance:.4g} apart"
        if not barriers:
            return text
        parts = [barrier.describe() for barrier in choose_barriers(barriers, self.task.loss)]
        return f"{text}; between them {' and '.join(parts)}"
