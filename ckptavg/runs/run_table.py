"""Table of a run's checkpoints with the values that training recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptavg.display.tables import NOTHING, Column, Table, rows_of_texts
from ckptavg.errors.printable import step_text, without_secrets
from ckptavg.formats import Checkpoint
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.metric_columns import metric_columns

# Columns of metrics. Further metrics are named below the table.
_MOST_METRICS = 3


def tabulate_run(checkpoints: Sequence[Checkpoint], notes: Sequence[str] = ()) -> Table:
    """Make the table of a run.

    Args:
        checkpoints: Checkpoints in the run's order; at least one.
        notes: Lines below the table.
    """
    metrics = metric_columns(checkpoints)
    shown = metrics.names[:_MOST_METRICS]
    columns = [
        Column("checkpoint", "name"),
        Column("step", "number"),
        Column("epoch", "number", len(shown) + 2),
        Column("LR", "number", len(shown) + 1),
    ]
    columns += [Column(name, "number", len(shown) - i) for i, name in enumerate(shown)]
    rows = []
    for name, checkpoint in zip(
        short_names([c.path for c in checkpoints]), checkpoints, strict=True
    ):
        record = checkpoint.record
        numbers = [checkpoint.step, record.epoch, record.lr, *map(record.metrics.get, shown)]
        rows.append([name, *(NOTHING if n is None else step_text(n) for n in numbers)])
    count = len(checkpoints)
    legend = [f"note: {note}" for note in notes]
    if more := metrics.names[_MOST_METRICS:]:
        legend.insert(0, f"more metrics: {', '.join(more)}")
    return Table(
        "1 checkpoint" if count == 1 else f"{count} checkpoints in order",
        tuple(columns), rows_of_texts(rows), tuple(legend),
    )  # fmt: skip


def records_of(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """List the recorded values of each checkpoint as plain values, with all metrics."""
    rows = []
    for name, checkpoint in zip(
        short_names([c.path for c in checkpoints]), checkpoints, strict=True
    ):
        record = checkpoint.record
        row = {
            "name": name,
            "step": checkpoint.step,
            "epoch": record.epoch,
            "lr": record.lr,
            "size": checkpoint.size,
            "path": without_secrets(str(checkpoint.path)),
        }
        # The name of a metric may equal the name of a fixed column.
        row |= {key if key not in row else f"metrics.{key}": v for key, v in record.metrics.items()}
        rows.append(row)
    return rows
