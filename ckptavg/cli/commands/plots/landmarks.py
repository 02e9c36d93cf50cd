"""Table of the marked points of a landscape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptavg.cli.console import Report, number_text
from ckptavg.display.tables import NOTHING, Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.landscape.landscape import Landmark, Landscape
    from ckptavg.tasks import Metric

_L2_LOSS = "l2_loss"


def show_landmarks(report: Report, landscape: Landscape, title: str) -> None:
    """Print checkpoints and averages with position, distance and exact metrics.

    Args:
        report: Where the table goes.
        landscape: The landscape.
        title: Text above the table.
    """
    marks = [*landscape.checkpoints, *landscape.averages]
    columns = [Column("point", "name"), Column("step", "number")]
    cells = [[mark.name for mark in marks], [number_text(mark.step) for mark in marks]]
    for name, turn in (("x", 3), ("y", 3), ("distance", 0)):
        columns.append(Column(name, "number", leaves=turn))
        cells.append([_length_text(getattr(mark, name)) for mark in marks])
    for column, texts in _metric_columns(landscape.metrics, marks):
        columns.append(column)
        cells.append(texts)
    report.table(columns, [*zip(*cells, strict=True)], title=title)


def _metric_columns(
    metrics: Sequence[Metric], marks: Sequence[Landmark]
) -> list[tuple[Column, list[str]]]:
    """Return a column per metric on evaluation data, and one of the loss on training data."""
    columns: list[tuple[Column, list[str]]] = []
    for number, metric in enumerate(metrics):
        values = [mark.data.get(metric.key) for mark in marks]
        if any(value is not None for value in values):
            # The first metric stays on a narrow terminal.
            column = Column(metric.title, "number", leaves=min(number, 2))
            columns.append((column, [_metric_text(value, metric) for value in values]))
    with_l2: list[Mapping[str, float]] = [mark.train or {} for mark in marks]
    if any(_L2_LOSS in train for train in with_l2):
        texts = []
        for train in with_l2:
            value = train.get(_L2_LOSS)
            texts.append(NOTHING if value is None else f"{value:.4f}")
        columns.append((Column("train loss + L2", "number"), texts))
    return columns


def _metric_text(value: float | None, metric: Metric) -> str:
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "hole"
    return format(value, metric.form)


def _length_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}"
