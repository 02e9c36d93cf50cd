"""Planes of weight space through checkpoints of a run, scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_progress
from ckptavg.errors import UsageError, short
from ckptavg.errors.notes import collect_notes
from ckptavg.inspection.geometry import geometry
from ckptavg.landscape.landscape import Kind, Landmark, Landscape, Point
from ckptavg.landscape.named_points import (
    AVERAGE,
    FIRST,
    LAST,
    MIDDLE,
    NamedPoint,
    NamedPoints,
    PointName,
    find_points,
)
from ckptavg.landscape.plane import Plane, plane_through, principal_plane
from ckptavg.landscape.planes.grid import Grid, check_grid
from ckptavg.landscape.points import PointScorer
from ckptavg.landscape.store import Scores, check_results, score_landscape
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.tasks import Task

# Corners of a plane; a principal plane needs as many checkpoints.
_CORNERS = 3
_MARGIN = 0.2
# Points of the coarsest grid.
_COARSEST = 9


def plane(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None,
    through: Sequence[PointName | int] = (FIRST, MIDDLE, LAST), points: int = 21,
    margin: float = _MARGIN, weight_decay: float | None = None,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score a grid of points on the plane through three points of weight space.

    With the loss on training data and the error on evaluation data, these are figures 2 and 3 of
    Izmailov et al. 2018. BatchNorm statistics are recomputed at every point. All checkpoints of the
    run are projected on the plane and scored exactly, with statistics of their own; so is the
    average, with recomputed ones::

        run = ckptavg.open_run("runs/swa")
        landscape = ckptavg.plane(run, model, val_data, train_data=train_data, weight_decay=5e-4)
        landscape.save_figure("plane.png")

    Args:
        run: The run, or a path.
        model: A module that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, as for ``evaluate``.
        train_data: Training data: statistics are recomputed from it, and the loss on it is scored.
            Without it statistics are averaged as the weights are, and stale.
        through: Three of ``average`` (the uniform average of the run), ``first``, ``middle``,
            ``last``, positions in the run, file names of checkpoints, and paths of other runs,
            whose final checkpoint is taken.
        points: Number of points along each axis.
        margin: Width of the grid beyond the outermost marked points on each side, as a share of
            their extent.
        weight_decay: λ of the L2 term λ/2·‖w‖² that training added to the loss, over all
            parameters, those of BatchNorm included, and no buffers. The loss with the term is
            scored besides, under ``l2_loss``.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, results, resume,
            progress: As for ``evaluate``; results are a ``.json`` or ``.npz`` file. The grid is
            scored from coarse to fine and stored after each pass.

    Returns:
        The landscape, with the points row by row. x and y are distances in weight space. ``facts``
        names the points that the plane goes through.

    Raises:
        UsageError: A point is unknown, the three are on a line, or a number cannot be meant.
        CkptavgError: As for ``evaluate``.
    """
    check_grid(points, margin)
    check_results(results, "plane", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        named = check_corners(as_run(run), through)
        scorer = PointScorer.open(
            named.run, model, data, train_data=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples, weight_decay=weight_decay,
        )  # fmt: skip
        corners = [torch.tensor(p.coefficients, dtype=torch.float64) for p in named.points]
        laid = plane_through(geometry(named.run), corners)
        scored = ScoredPlane("plane", scorer, laid, named.own, points, margin, named.points)
        return scored.score(results, resume=resume, progress=reporter, notes=notes)


def pca(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None, points: int = 21, margin: float = _MARGIN,
    weight_decay: float | None = None,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score a grid of points on the plane of a run's two directions of most variance.

    The plane goes through the average along the first two principal components of the checkpoints
    (Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", 7)::

        landscape = ckptavg.pca(run, model, val_data, train_data=train_data)
        print(landscape.facts["explained"])
        landscape.save_figure("pca.png")

    Args:
        run: The run, or a path; at least three checkpoints.
        model, data, train_data, points, margin, weight_decay, task, device, forward, exclude, amp,
            batch_size, workers, seed, bn_samples, results, resume, progress: As for ``plane``.

    Returns:
        The landscape, as from ``plane``. ``facts`` has under ``explained`` the share of the
        checkpoints' variance along each axis, between 0 and 1.

    Raises:
        UsageError: The checkpoints are on a line, or a number cannot be meant.
        CkptavgError: As for ``evaluate``.
    """
    check_grid(points, margin)
    check_results(results, "pca", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        run = as_run(run)
        if len(run) < _CORNERS:
            raise _too_few(run)
        scorer = PointScorer.open(
            run, model, data, train_data=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples, weight_decay=weight_decay,
        )  # fmt: skip
        laid = principal_plane(geometry(run))
        scored = ScoredPlane("pca", scorer, laid, len(run), points, margin)
        return scored.score(results, resume=resume, progress=reporter, notes=notes)


def check_corners(run: Run, through: Sequence[PointName | int]) -> NamedPoints:
    """Find the corners of a plane, and refuse those that are the same point by definition.

    Args:
        run: The checkpoints.
        through: As for ``plane``.

    Raises:
        UsageError: A point is unknown, or there are not three that differ.
        CkptavgError: Another run cannot be opened.
    """
    if isinstance(through, str) or len(through) != _CORNERS or "" in through:
        raise UsageError(
            f"`through` is expected to name three points but got {short(repr(through))}"
        )
    named = find_points(run, [_at_position(run, name) for name in through])
    names: dict[tuple[float, ...], str] = {}
    for point in named.points:
        if point.coefficients in names:
            if named.own < _CORNERS:
                raise _too_few(named.run)
            raise UsageError(
                "two of the three points of the plane are the same: "
                f"{names[point.coefficients]} and {point.name}",
                "Name three that differ: `through`.",
            )
        names[point.coefficients] = point.name
    return named


def _at_position(run: Run, name: PointName | int) -> PointName:
    """Return the checkpoint of a position, and a name as it is.

    Raises:
        UsageError: The run has no such position.
    """
    if not isinstance(name, int):
        return name
    if not -len(run) <= name < len(run):
        raise UsageError(f"a run of {len(run)} checkpoints has none at position {name}")
    return run[name]


def _too_few(run: Run) -> UsageError:
    """Build the error for a run of fewer than three checkpoints."""
    noun = "checkpoints"
    if len(run) == 1:
        noun = "checkpoint"
    return UsageError(
        f"a plane needs three checkpoints, but the run has {len(run)} {noun}", "Select more."
    )


@dataclass(frozen=True)
class ScoredPlane:
    """A plane, the grid on it, and the marked points around which the grid lies.

    Attributes:
        kind: Kind of the landscape.
        scorer: Scores the points.
        plane: The plane, over the scorer's run.
        own: Number of checkpoints of the run itself, which are averaged; others may follow.
        points: Number of points along each axis.
        margin: Width of the grid beyond the marked points, as a share of their extent.
        corners: Points that the plane goes through; empty for a principal plane.
    """

    kind: Kind
    scorer: PointScorer
    plane: Plane
    own: int
    points: int
    margin: float
    corners: tuple[NamedPoint, ...] = ()

    def score(
        self,
        results: str | os.PathLike[str] | None,
        *,
        resume: bool,
        progress: PhaseProgress | None,
        notes: Sequence[str],
    ) -> Landscape:
        """Score the marked points and the grid.

        Args:
            results: As for ``plane``.
            resume: As for ``plane``.
            progress: Called with phase, done and total.
            notes: Remarks so far, which may grow meanwhile.
        """
        in_order = [corner.coefficients for corner in self.corners]
        in_order.append(self._average_coefficients)
        grid = [self._at(x, y) for x, y in self.grid.coarse_to_fine()]
        # The first 3 × 3 points show the area; then come the checkpoints.
        in_order += grid[:_COARSEST]
        in_order += [self._unit(position) for position in range(len(self.scorer.run))]
        in_order += grid[_COARSEST:]
        return score_landscape(
            self.scorer, dict(zip(in_order, in_order, strict=True)), self.lay_out,
            results=results, resume=resume, progress=progress, notes=notes,
        )  # fmt: skip

    @cached_property
    def grid(self) -> Grid:
        """The grid around all marked points."""
        positions: list[tuple[float, float]] = []
        for mark in (*self._checkpoints, self._average):
            positions.append((mark.x or 0.0, mark.y or 0.0))
        return Grid.around(positions, self.points, self.margin)

    def lay_out(self, scores: Scores) -> Landscape:
        """Lay out the points and marks that have scores.

        Args:
            scores: Scores by coefficients.
        """
        points: list[Point] = []
        for x, y in self.grid.by_rows():
            coefficients = self._at(x, y)
            if coefficients in scores:
                score = scores[coefficients]
                points.append(
                    Point(x, y, coefficients, score.data, score.train, dict(score.interval))
                )
        facts: dict[str, Any] = {"shape": [self.points, self.points]}
        if self.corners:
            facts["through"] = [corner.name for corner in self.corners]
        if self.plane.explained is not None:
            facts["explained"] = list(self.plane.explained)
        return Landscape(
            kind=self.kind,
            axes=self._axes,
            metrics=tuple(self.scorer.task.metrics),
            points=tuple(points),
            checkpoints=tuple(_with_scores(mark, scores) for mark in self._checkpoints),
            averages=(_with_scores(self._average, scores),),
            facts=facts,
        )

    @property
    def _axes(self) -> tuple[str, str]:
        if self.plane.explained is not None:
            first, second = self.plane.explained
            return (
                f"1st principal component ({first:.0%} of variance)",
                f"2nd principal component ({second:.0%})",
            )
        first_name, second_name, third_name = (corner.name for corner in self.corners)
        return (
            f"distance from {first_name} towards {second_name}",
            f"distance from that line towards {third_name}",
        )

    @cached_property
    def _checkpoints(self) -> tuple[Landmark, ...]:
        """All checkpoints at their projections, without scores."""
        run = self.scorer.run
        names = short_names(paths_of(run.checkpoints))
        marks: list[Landmark] = []
        for position, checkpoint in enumerate(run):
            mark = self._landmark(names[position], self._unit(position))
            marks.append(
                replace(
                    mark, path=str(checkpoint.path), step=checkpoint.step, lr=checkpoint.record.lr
                )
            )
        return tuple(marks)

    @cached_property
    def _average(self) -> Landmark:
        """The uniform average of the run at its projection, without scores."""
        return self._landmark(AVERAGE, self._average_coefficients)

    @property
    def _average_coefficients(self) -> tuple[float, ...]:
        others = len(self.scorer.run) - self.own
        return (1 / self.own,) * self.own + (0.0,) * others

    def _unit(self, position: int) -> tuple[float, ...]:
        """Return the coefficients of a checkpoint."""
        coefficients = [0.0] * len(self.scorer.run)
        coefficients[position] = 1.0
        return tuple(coefficients)

    def _landmark(self, name: str, coefficients: tuple[float, ...]) -> Landmark:
        """Return the landmark of a point at its projection.

        Args:
            name: Name in the figure.
            coefficients: The point, (n,).
        """
        seen = self.plane.project(torch.tensor(coefficients, dtype=torch.float64))
        x, y, distance = seen.x, seen.y, seen.distance
        for number, corner in enumerate(self.corners):
            if corner.coefficients == coefficients:
                # The first corner is the origin, and the second is on the first axis: what is left
                # beside 0 is rounding.
                distance = 0.0
                if number == 0:
                    x = 0.0
                if number <= 1:
                    y = 0.0
        return Landmark(name, None, None, None, x, y, distance, coefficients=coefficients)

    def _at(self, x: float, y: float) -> tuple[float, ...]:
        """Return the coefficients of the point at (x, y)."""
        return tuple(self.plane.coefficients(x, y).tolist())


def _with_scores(mark: Landmark, scores: Scores) -> Landmark:
    """Return a landmark with its scores, if it has any."""
    score = scores.get(mark.coefficients)
    if score is None:
        return mark
    return replace(mark, data=score.data, train=score.train)
