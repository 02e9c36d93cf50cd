"""Rays from points of a run in random directions of weight space, scored."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.plan import plan_average
from ckptavg.data.loaders import Subset
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_progress
from ckptavg.errors import UsageError, short
from ckptavg.errors.notes import collect_notes
from ckptavg.inspection.geometry import geometry
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.lines.bundle import RayBundle, RaySettings
from ckptavg.landscape.lines.line_points import has_statistics_to_recompute
from ckptavg.landscape.lines.loss import RayLoss
from ckptavg.landscape.lines.radius import choose_radius, read_radius
from ckptavg.landscape.lines.ray_figure import RayFigure
from ckptavg.landscape.named_points import AVERAGE, NamedPoints, PointName, find_points
from ckptavg.landscape.points import PointScorer
from ckptavg.landscape.store import check_results, score_landscape
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.tasks import Task

log = logging.getLogger("ckptavg")


def rays(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None,
    centers: Sequence[PointName] = (AVERAGE, "last"), directions: int = 10, points: int = 11,
    radius: float | None = None, rise: float | None = None, seed: int = 0,
    weight_decay: float | None = None,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score points on rays in random directions, and measure how wide the minimum is.

    w(t, d) = w + t·d, as in figure 4 of Izmailov et al. 2018. The random directions d, uniform on
    the unit sphere over all parameters (see ``Direction``), are the same for all centers. BatchNorm
    statistics are recomputed at every point, the centers included. The width in a direction is the
    t at which the loss, on training data if there is any, has risen by ``rise``::

        print(ckptavg.rays(run, model, val_data, train_data=train_data).facts["text"])

    Args:
        run: The run, or a path.
        model: A module that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, as for ``evaluate``.
        train_data: Training data: statistics are recomputed from it, and the loss on it is scored.
        centers: Points as the ends of ``segment``; the others are compared with the first.
        directions: Number of directions.
        points: Number of points per ray, the center included.
        radius: Greatest t. Where None, a multiple of the distance between the centers at which the
            loss has risen enough; see ``choose_radius``.
        rise: Rise that defines the width; 0.1 nats, or a tenth of the first center's loss, if None.
        seed: Seed of the directions, and as for ``evaluate``.
        weight_decay: As for ``segment``.
        task, device, forward, exclude, amp, batch_size, workers, bn_samples, results, resume,
            progress: As for ``evaluate``; results are a ``.json`` or ``.npz`` file.

    Returns:
        The landscape. ``x`` is t. The series are a ray per center and direction, and their mean,
        under the center's name. ``facts`` has the ``widths`` and their ``differences`` with 95 %
        intervals over the directions, and a sentence as ``text``.

    Raises:
        UsageError: A center is unknown, two centers are the same, or a number cannot be meant.
        CkptavgError: As for ``evaluate``.
    """
    settings = RaySettings(directions, points, seed, rise)
    check_results(results, "rays", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        named = check_centers(as_run(run), centers, radius)
        scorer = PointScorer.open(
            named.run, model, data, train_data=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples, weight_decay=weight_decay,
        )  # fmt: skip
        bundle, stored = _make_bundle(named, scorer, settings), _StoredRays(results, resume)
        landscape = _score(bundle, scorer, radius, stored, reporter)
    return replace(landscape, notes=tuple(notes))


@dataclass(frozen=True)
class _StoredRays:
    """File of results.

    Attributes:
        path: The file; None for none.
        resume: True to take the scores and the length of rays that it holds.
    """

    path: str | os.PathLike[str] | None
    resume: bool


def _score(
    bundle: RayBundle,
    scorer: PointScorer,
    radius: float | None,
    stored: _StoredRays,
    progress: PhaseProgress | None,
) -> Landscape:
    """Choose the length of rays where none is given, and score all points.

    Args:
        bundle: Rays without a length.
        scorer: Scores the points.
        radius: Length of the rays; None to choose it.
        stored: File of results.
        progress: As for ``PointScorer.score``.
    """
    loss = RayLoss.of_scorer(scorer)
    if radius is None and stored.resume:
        radius = read_radius(stored.path, bundle)
    if radius is None:
        radius = choose_radius(bundle, scorer, loss, progress)
    bundle = replace(bundle, radius=float(radius))
    figure = RayFigure(bundle, loss, scorer.task.metrics)
    return score_landscape(
        scorer, bundle.to_score(), figure.lay_out, results=stored.path, resume=stored.resume,
        progress=progress, settings=bundle.identity,
    )  # fmt: skip


def check_centers(run: Run, centers: Sequence[PointName], radius: float | None) -> NamedPoints:
    """Find the centers of rays, before any work.

    Args:
        run: The checkpoints.
        centers: As for ``rays``.
        radius: As for ``rays``.

    Raises:
        UsageError: There is none, one is unknown, two are the same, or the radius cannot be meant.
    """
    if radius is not None and not (isinstance(radius, (int, float)) and 0 < radius < math.inf):
        raise UsageError(f"`radius` is expected to be a number above 0 but is {radius!r}")
    if isinstance(centers, str) or not centers:
        raise UsageError(
            f"`centers` is expected to be a list of points but is {short(repr(centers))}"
        )
    named = find_points(run, centers)
    for position, center in enumerate(named.points):
        for other in named.points[:position]:
            if center.coefficients == other.coefficients:
                raise UsageError(
                    f"two centers of rays are the same: {other.name} and {center.name}",
                    "Name two checkpoints that differ, or a longer run.",
                )
    if len(centers) == 1 and radius is None:
        raise UsageError(
            "a single center has no distance to go by: the length of its rays is needed",
            "Give `radius`.",
        )
    return named


def _make_bundle(named: NamedPoints, scorer: PointScorer, settings: RaySettings) -> RayBundle:
    """Measure the distances between the centers, and make rays without a length.

    Raises:
        UsageError: Two centers have the same weights.
    """
    measured = None
    if len(named.run) > 1:
        measured = geometry(named.run)
    recompute = has_statistics_to_recompute(scorer)
    if scorer.training is None and plan_average(named.run).batchnorm in ("own", "stale"):
        log.info(
            "the BatchNorm statistics along rays are those of their centers, which do not fit: "
            "pass `train_data` to recompute them"
        )
    bundle = RayBundle(named, measured, settings, recompute)
    for center, distance in list(zip(bundle.centers, bundle.distances, strict=True))[1:]:
        if not distance:
            raise UsageError(
                f"two centers of rays have the same weights: {bundle.centers[0].name} and "
                f"{center.name}"
            )
    return bundle
