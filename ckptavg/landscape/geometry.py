"""Distances and angles of a run's checkpoints as a landscape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckptavg.inspection.geometry import Geometry
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of

TO_MEAN, NORM, STEP, COSINE = "to mean", "norm", "step", "cosine"


def lay_out_geometry(geometry: Geometry) -> Landscape:
    """Lay out the geometry of a run as lines over training and a table of distances.

    SGD at a constant learning rate ends up in a stationary distribution around a minimum (Mandt et
    al. 2017). In many dimensions its samples lie close to a sphere. Their mean lies inside of it,
    which is why it generalizes better (Izmailov et al. 2018, section 3.1).

    Args:
        geometry: The return value of ``ckptavg.geometry``.

    Returns:
        The landscape. ``x`` is the step, or the position in the run where a step is unknown or
        occurs twice. The series are ``to mean`` (distance to the mean of all checkpoints),
        ``norm``, ``step`` (distance to the checkpoint before) and ``cosine`` (cosine of the angle
        between the steps to and from a checkpoint). ``facts`` has ``distances`` between all pairs,
        (n, n), among others.
    """
    positions = _positions(geometry)
    series = {
        TO_MEAN: geometry.to_mean.tolist(),
        NORM: geometry.norms.tolist(),
        STEP: _align(geometry, geometry.steps.tolist(), before=1),
        COSINE: _align(geometry, geometry.step_cosines.tolist(), before=1, after=1),
    }
    points: list[Point] = []
    for name, values in series.items():
        for x, value in zip(positions, values, strict=True):
            if value is not None and math.isfinite(value):
                points.append(Point(x, value, series=name))
    title = "step"
    if positions != _steps(geometry):
        title = "position in the run"
    return Landscape(
        kind="geometry",
        axes=(title, "distance in weight space"),
        metrics=(),
        points=tuple(points),
        checkpoints=tuple(_landmarks(geometry, positions)),
        facts=_facts(geometry),
    )


def _steps(geometry: Geometry) -> list[float | None]:
    return [checkpoint.step for checkpoint in geometry.checkpoints]


def _positions(geometry: Geometry) -> list[float]:
    """Return the step of each checkpoint, or the position where the steps do not tell an order."""
    steps: list[float] = []
    for checkpoint in geometry.checkpoints:
        if checkpoint.step is not None:
            steps.append(checkpoint.step)
    if len(set(steps)) == len(geometry.checkpoints):
        return steps
    return list(range(1, len(geometry.checkpoints) + 1))


def _align(
    geometry: Geometry, values: Sequence[float], *, before: int, after: int = 0
) -> list[float | None]:
    """Align values of steps with the checkpoints of each training.

    Args:
        geometry: The geometry.
        values: Values of all trainings, one after another.
        before: Number of checkpoints without a value at the start of a training.
        after: Number of checkpoints without a value at the end.
    """
    aligned: list[float | None] = []
    start = 0
    for training in geometry.run.trainings:
        count = max(0, len(training) - before - after)
        padded: list[float | None] = [None] * before
        padded += values[start : start + count]
        padded += [None] * after
        aligned += padded[: len(training)]
        start += count
    return aligned


def _landmarks(geometry: Geometry, positions: Sequence[float]) -> list[Landmark]:
    """Return the checkpoints, each at its distance to the mean."""
    names = short_names(paths_of(geometry.checkpoints))
    to_mean = geometry.to_mean.tolist()
    landmarks: list[Landmark] = []
    for number, checkpoint in enumerate(geometry.checkpoints):
        landmarks.append(
            Landmark(
                name=names[number],
                path=str(checkpoint.path),
                step=checkpoint.step,
                lr=checkpoint.record.lr,
                x=positions[number],
                y=to_mean[number],
            )
        )
    return landmarks


def _facts(geometry: Geometry) -> dict[str, Any]:
    cosines = geometry.step_cosines
    mean_cosine = None
    if bool(cosines.isfinite().any()):
        mean_cosine = float(cosines.nanmean())
    outliers: list[str] = []
    if geometry.outliers is not None:
        outliers = [str(checkpoint.path) for checkpoint in geometry.outliers.checkpoints]
    return {
        "distances": geometry.distances.tolist(),
        "norms": geometry.norms.tolist(),
        "to_mean": geometry.to_mean.tolist(),
        "steps": geometry.steps.tolist(),
        "step_cosines": cosines.tolist(),
        "mean_step_cosine": mean_cosine,
        "outliers": outliers,
        "text": _describe(geometry, mean_cosine),
    }


def _describe(geometry: Geometry, mean_cosine: float | None) -> str:
    """Word the geometry in a sentence."""
    to_mean = geometry.to_mean
    text = (
        f"the {len(to_mean)} checkpoints are {float(to_mean.min()):.4g} to "
        f"{float(to_mean.max()):.4g} away from their mean"
    )
    if mean_cosine is not None:
        text += (
            f"; successive steps have a mean cosine of {mean_cosine:.2f} (1 straight, 0 random "
            "walk, -0.5 scatter)"
        )
    return text
