"""Table of the checkpoints and averages among the points of a landscape."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptavg.display.tables import NOTHING, Column, Table, rows_of_texts
from ckptavg.errors.printable import step_text
from ckptavg.landscape.landscape import L2_LOSS, Landmark, Landscape
from ckptavg.tasks import Metric

_HOLE = "hole"


def tabulate_landmarks(landscape: Landscape, title: str) -> Table:
    """Tabulate checkpoints and averages with position, distance and exact metrics.

    Args:
        landscape: The landscape.
        title: Text above the table.
    """
    marks = [*landscape.checkpoints, *landscape.averages]
    columns = [Column("point", "name"), Column("step", "number")]
    cells = [[mark.name for mark in marks], [_step_text(mark.step) for mark in marks]]
    for name, turn in (("x", 3), ("y", 3), ("distance", 0)):
        columns.append(Column(name, "number", leaves=turn))
        cells.append([_length_text(getattr(mark, name)) for mark in marks])
    for column, texts in _metric_columns(landscape.metrics, marks):
        columns.append(column)
        cells.append(texts)
    return Table(title, tuple(columns), rows_of_texts([*zip(*cells, strict=True)]))


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
            columns.append((column, [_metric_text(value, metric.form) for value in values]))
    losses: list[float | None] = []
    for mark in marks:
        losses.append((mark.train or {}).get(L2_LOSS))
    if any(loss is not None for loss in losses):
        column = Column("train loss + L2", "number")
        columns.append((column, [_metric_text(loss, ".4f") for loss in losses]))
    return columns


def _metric_text(value: float | None, form: str) -> str:
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return _HOLE
    return format(value, form)


def _length_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}"


def _step_text(step: float | None) -> str:
    if step is None:
        return NOTHING
    return step_text(step)
