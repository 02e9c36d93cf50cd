"""The recorded metrics of a run as columns of a table, those first that tell most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.formats import Checkpoint
from ckptavg.formats.metric_names import is_metric, prominence

_Column = tuple[float | None, ...]


@dataclass(frozen=True)
class MetricColumns:
    """The metrics that some checkpoints record.

    Attributes:
        names: The metrics that say something of their own, in the order of a table.
        repeats: Name of each other metric → the column that has the same values.
    """

    names: tuple[str, ...]
    repeats: Mapping[str, str]


def metric_columns(checkpoints: Sequence[Checkpoint]) -> MetricColumns:
    """Choose the columns for the metrics of some checkpoints, in the run's order."""
    columns: dict[str, list[float | None]] = {}
    for row, checkpoint in enumerate(checkpoints):
        for name, value in checkpoint.record.metrics.items():
            columns.setdefault(name, [None] * len(checkpoints))[row] = value
    constant = {name for name, values in columns.items() if _is_constant(values)}
    ordered = sorted(columns, key=lambda name: (name in constant, prominence(name)))
    # Of one checkpoint any two values may be equal.
    if len(checkpoints) < 2:
        return MetricColumns(tuple(ordered), {})
    known = _clocks(checkpoints)
    names: list[str] = []
    repeats: dict[str, str] = {}
    for name in ordered:
        column = tuple(columns[name])
        # A metric may stand still as an epoch does, by chance.
        if column in known and not (name in constant and is_metric(name)):
            repeats[name] = known[column]
            continue
        names.append(name)
        known.setdefault(column, name)
    return MetricColumns(tuple(names), repeats)


def _clocks(checkpoints: Sequence[Checkpoint]) -> dict[_Column, str]:
    """Return the columns that any run has, by their values."""
    records = [checkpoint.record for checkpoint in checkpoints]
    return {
        tuple(record.lr for record in records): "LR",
        tuple(record.epoch for record in records): "epoch",
        tuple(record.step for record in records): "step",
        tuple(checkpoint.step for checkpoint in checkpoints): "step",
    }


def _is_constant(values: Sequence[float | None]) -> bool:
    """Tell whether several checkpoints all have the same value."""
    return len(values) > 1 and len(set(values)) == 1
