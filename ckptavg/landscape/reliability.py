"""Reliability diagrams: how often predictions of a confidence are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike
from ckptavg.errors import UsageError
from ckptavg.evaluation.compare import compare
from ckptavg.evaluation.results import Result, Results
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.run import Run, RunLike
from ckptavg.tasks import Task
from ckptavg.tasks.intervals import wilson_interval
from ckptavg.tasks.metrics import ClassificationMetrics
from ckptavg.tasks.named import as_task

# Entry of a result's details that has the bins.
_BINS = "reliability"


def reliability(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None,
    selection: Run | None = None, each: bool = False, ensemble: bool = True,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None, progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score the last checkpoint, the average and the ensemble, and lay out their reliability.

    Predictions are sorted by confidence into 15 equal bins. In each, the share that is right stands
    against the mean confidence (Guo et al. 2017, figure 1)::

        ckptavg.reliability(run, model, val_data, train_data=train_data).save_figure("r.png")

    Args:
        run: The run, or a path.
        model: A classifier that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, as for ``evaluate``.
        train_data: Training data, from which the average's statistics are recomputed; without, they
            are scored as averaged.
        selection: The part of the run to average; the whole run where None.
        each: True to add every selected checkpoint.
        ensemble: True to add the mean of the selected checkpoints' outputs (FGE).
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, progress: As for
            ``evaluate``.

    Returns:
        The landscape of ``lay_out_reliability``.

    Raises:
        UsageError: The task has no calibration error.
        CkptavgError: As for ``compare``.
    """
    task = as_task(task)
    check_classifier(task)
    results = compare(
        run, model, data, train_data=train_data, selection=selection, each=each, ensemble=ensemble,
        stale=train_data is None, task=task, device=device, forward=forward, exclude=exclude,
        amp=amp, batch_size=batch_size, workers=workers, seed=seed, bn_samples=bn_samples,
        progress=progress,
    )  # fmt: skip
    return lay_out_reliability(results)


def check_classifier(task: Task) -> None:
    """Refuse a task without a calibration error, before any work.

    Raises:
        UsageError: The task is such a one.
    """
    if not isinstance(task.scores(), ClassificationMetrics):
        raise UsageError(
            f"a reliability diagram is that of a classifier, and {type(task).__name__} has no bins "
            "of confidence"
        )


def lay_out_reliability(results: Results) -> Landscape:
    """Lay out the bins of the calibration error of scored candidates.

    Args:
        results: The return value of ``evaluate`` or ``compare`` for image classification.

    Returns:
        The landscape. A series per candidate has a point per bin with samples: ``x`` is the mean
        confidence, ``y`` the share that is right with its 95 % interval by Wilson as ``accuracy``,
        and ``n`` the number of samples. ``facts`` has the expected calibration errors as ``ece``.

    Raises:
        UsageError: A candidate has no bins.
    """
    points: list[Point] = []
    ece: dict[str, float] = {}
    candidates: list[dict[str, Any]] = []
    for series, result in zip(_name_series(results), results, strict=True):
        if _BINS not in result.details:
            raise UsageError(f"{result.candidate.name} has no bins of confidence")
        points += _points_of(series, result.details[_BINS])
        ece[series] = result.metrics["ece"]
        candidates.append({"series": series, **result.as_json()})
    names = [f"{series} {value:.4f}" for series, value in ece.items()]
    return Landscape(
        kind="reliability",
        axes=("confidence", "share that is right"),
        metrics=tuple(results.task.metrics),
        points=tuple(points),
        checkpoints=tuple(_landmarks(results, "checkpoint")),
        averages=tuple(_landmarks(results, "average")),
        facts={
            "ece": ece,
            "candidates": candidates,
            "text": f"expected calibration error: {', '.join(names)}",
        },
        notes=results.notes,
    )


def _name_series(results: Results) -> list[str]:
    """Name the series after candidates, with the state of statistics where two share a name."""
    counts = Counter(result.candidate.name for result in results)
    names: list[str] = []
    for result in results:
        name = result.candidate.name
        if counts[name] > 1:
            name += f" ({result.bn})"
        names.append(name)
    return names


def _points_of(series: str, bins: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return a point per bin with samples.

    Args:
        series: Name of the candidate.
        bins: As from ``ClassificationMetrics.reliability``.
    """
    points: list[Point] = []
    for entry in bins:
        count = entry["n"]
        if count:
            interval = wilson_interval(entry["accuracy"] * count, count)
            points.append(
                Point(
                    entry["confidence"], entry["accuracy"], data={"n": count},
                    interval={"accuracy": interval}, series=series,
                )
            )  # fmt: skip
    return points


def _landmarks(results: Results, kind: str) -> list[Landmark]:
    """Return the candidates of a kind with their metrics, and no position."""
    landmarks: list[Landmark] = []
    for series, result in zip(_name_series(results), results, strict=True):
        if result.candidate.kind == kind:
            landmarks.append(_landmark(series, result))
    return landmarks


def _landmark(name: str, result: Result) -> Landmark:
    candidate = result.candidate
    if candidate.kind != "checkpoint" or not candidate.checkpoints:
        return Landmark(name, None, None, None, None, data=result.metrics)
    (checkpoint,) = candidate.checkpoints
    return Landmark(
        name, str(checkpoint.path), checkpoint.step, checkpoint.record.lr, None,
        data=result.metrics,
    )  # fmt: skip
