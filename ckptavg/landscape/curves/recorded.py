"""Curves of what training recorded, without a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ckptavg.errors import RunError
from ckptavg.formats import Checkpoint
from ckptavg.formats.metric_names import is_metric
from ckptavg.landscape.curves.named_runs import NamedRun, StepAxis, join_runs
from ckptavg.landscape.curves.series import CHECKPOINTS, series_name
from ckptavg.landscape.landscape import Point
from ckptavg.runs.best import derive_mode
from ckptavg.runs.metric_columns import choose_metric_columns
from ckptavg.tasks import Metric

log = logging.getLogger("ckptavg")


def recorded_metrics(checkpoints: Sequence[Checkpoint]) -> tuple[Metric, ...]:
    """Return the metrics that checkpoints record, the most informative first.

    Raises:
        RunError: The checkpoints record no metric.
    """
    metrics: list[Metric] = []
    for name in choose_metric_columns(checkpoints).names:
        mode = derive_mode(name)
        if mode is not None or is_metric(name):
            metrics.append(Metric(name, name, ".5g", None if mode is None else mode == "max"))
    if not metrics:
        raise RunError(
            "the checkpoints record no metric, and there is no model to score them with",
            "Pass `model` and `data`.",
        )
    return tuple(metrics)


def recorded_points(
    runs: Sequence[NamedRun], axis: StepAxis, metrics: Sequence[Metric]
) -> tuple[Point, ...]:
    """Return a point per checkpoint with the recorded metrics.

    Args:
        runs: The runs.
        axis: Steps of the checkpoints of all runs.
        metrics: Metrics to take from the records.
    """
    log.info(
        "the metrics are those that training recorded, and averages are not scored: pass `model` "
        "and `data` for that"
    )
    total = len(axis.steps)
    names = [metric.key for metric in metrics]
    points: list[Point] = []
    for named in runs:
        series = series_name(runs, named, CHECKPOINTS)
        for position, checkpoint in enumerate(named.run, named.start):
            record = checkpoint.record.metrics
            data = {name: record[name] for name in names if name in record}
            coefficients = [0.0] * total
            coefficients[position] = 1.0
            points.append(
                Point(axis.steps[position], None, tuple(coefficients), data, series=series)
            )
    return tuple(points)


def note_missing_rates(runs: Sequence[NamedRun]) -> None:
    """Note runs without recorded learning rates."""
    checkpoints = join_runs(runs).checkpoints
    missing = sum(checkpoint.record.lr is None for checkpoint in checkpoints)
    if missing == len(checkpoints):
        log.info("no checkpoint records its learning rate")
    elif missing:
        log.info("%d of %d checkpoints record no learning rate", missing, len(checkpoints))
