"""Table of a run's checkpoints with the values that training recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptavg.display.tables import NOTHING, Column, Table, rows_of_texts
from ckptavg.errors.printable import step_text, without_secrets
from ckptavg.formats import Checkpoint
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.metric_columns import choose_metric_columns
from ckptavg.runs.order import paths_of

# Columns of metrics. Further metrics are named below the table.
_MOST_METRICS = 3


def tabulate_run(checkpoints: Sequence[Checkpoint], notes: Sequence[str] = ()) -> Table:
    """Make the table of a run.

    Args:
        checkpoints: Checkpoints in the run's order; at least one.
        notes: Lines below the table.
    """
    metrics = choose_metric_columns(checkpoints)
    shown = metrics.names[:_MOST_METRICS]
    columns = [
        Column("checkpoint", "name"),
        Column("step", "number"),
        Column("epoch", "number", len(shown) + 2),
        Column("LR", "number", len(shown) + 1),
    ]
    for position, name in enumerate(shown):
        columns.append(Column(name, "number", len(shown) - position))
    names = short_names(paths_of(checkpoints))
    rows: list[list[str]] = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        record = checkpoint.record
        numbers = [checkpoint.step, record.epoch, record.lr, *map(record.metrics.get, shown)]
        rows.append([name, *map(_number_text, numbers)])
    legend: list[str] = []
    if more := metrics.names[_MOST_METRICS:]:
        legend.append(f"more metrics: {', '.join(more)}")
    legend += [f"note: {note}" for note in notes]
    title = "1 checkpoint"
    if len(checkpoints) > 1:
        title = f"{len(checkpoints)} checkpoints in order"
    return Table(title, tuple(columns), rows_of_texts(rows), tuple(legend))


def _number_text(value: float | None) -> str:
    """Write a recorded value for the table."""
    return NOTHING if value is None else step_text(value)


def list_records(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """List the recorded values of each checkpoint as plain values, with all metrics."""
    names = short_names(paths_of(checkpoints))
    rows: list[dict[str, Any]] = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        record = checkpoint.record
        row: dict[str, Any] = {
            "name": name,
            "step": checkpoint.step,
            "epoch": record.epoch,
            "lr": record.lr,
            "size": checkpoint.size,
            "path": without_secrets(str(checkpoint.path)),
        }
        fixed = frozenset(row)
        for metric, value in record.metrics.items():
            # The name of a metric may equal the name of a fixed column.
            row[f"metrics.{metric}" if metric in fixed else metric] = value
        rows.append(row)
    return rows
