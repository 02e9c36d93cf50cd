"""Distances and angles of a run's checkpoints as a landscape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ckptavg.inspection.geometry import Geometry
from ckptavg.landscape.curves.named_runs import (
    NamedRun,
    StepAxis,
    choose_steps,
    landmarks_of,
)
from ckptavg.landscape.landscape import Landmark, Landscape, Point

TO_MEAN, NORM, STEP, COSINE = "to mean", "norm", "step", "cosine"


def lay_out_geometry(geometry: Geometry) -> Landscape:
    """Lay out the geometry of a run as lines over training and a table of distances.

    SGD at a constant learning rate ends up in a stationary distribution around a minimum (Mandt et
    al. 2017). In many dimensions its samples lie close to a sphere. Their mean lies inside of it,
    which is why it generalizes better (Izmailov et al. 2018, section 3.1).

    Args:
        geometry: The return value of ``ckptavg.geometry``.

    Returns:
        The landscape. ``x`` is the step, else the epoch, or the position in the run where one is
        unknown or occurs twice. The series are ``to mean`` (distance to the mean of all
        checkpoints), ``norm``, ``step`` (distance to the checkpoint before) and ``cosine`` (of the
        angle between the steps to and from a checkpoint). ``facts`` has ``distances`` between all
        pairs, (n, n), among others.
    """
    axis = _choose_axis(geometry)
    series = {
        TO_MEAN: geometry.to_mean.tolist(),
        NORM: geometry.norms.tolist(),
        STEP: _align(geometry, geometry.steps.tolist(), before=1),
        COSINE: _align(geometry, geometry.step_cosines.tolist(), before=1, after=1),
    }
    points: list[Point] = []
    for name, values in series.items():
        for x, value in zip(axis.steps, values, strict=True):
            if value is not None and math.isfinite(value):
                points.append(Point(x, value, series=name))
    return Landscape(
        kind="geometry",
        axes=(axis.title, "distance in weight space"),
        metrics=(),
        points=tuple(points),
        checkpoints=tuple(_landmarks(geometry, axis)),
        facts=_facts(geometry),
    )


def _choose_axis(geometry: Geometry) -> StepAxis:
    """Choose the axis of training; the position in the run where steps do not tell an order."""
    axis = choose_steps([NamedRun("", geometry.run, 0)])
    count = len(geometry.checkpoints)
    if len(set(axis.steps)) == count:
        return axis
    return StepAxis("position in the run", tuple(float(number + 1) for number in range(count)))


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


def _landmarks(geometry: Geometry, axis: StepAxis) -> list[Landmark]:
    """Return the checkpoints, each at its distance to the mean."""
    landmarks = landmarks_of([NamedRun("", geometry.run, 0)], axis)
    to_mean = geometry.to_mean.tolist()
    return [replace(mark, y=y) for mark, y in zip(landmarks, to_mean, strict=True)]


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
