"""Recorded metrics of a run as columns of a table, the most informative first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.formats import Checkpoint
from ckptavg.formats.metric_names import is_metric, is_setting, prominence

_Column = tuple[float | None, ...]


@dataclass(frozen=True)
class MetricColumns:
    """Metrics that some checkpoints record.

    Attributes:
        names: Metrics with values of their own, in the order of a table.
        repeats: Name of a metric without values of its own → the column that has the same values.
            The metric may also be a multiple of a clock, such as "4 × step".
        constants: Settings and counts that are the same in all checkpoints.
    """

    names: tuple[str, ...]
    repeats: Mapping[str, str]
    constants: Mapping[str, float]


def choose_metric_columns(checkpoints: Sequence[Checkpoint]) -> MetricColumns:
    """Choose the columns for the metrics of some checkpoints, in the run's order."""
    columns: dict[str, list[float | None]] = {}
    for row, checkpoint in enumerate(checkpoints):
        for name, value in checkpoint.record.metrics.items():
            columns.setdefault(name, [None] * len(checkpoints))[row] = value
    constant: set[str] = set()
    for name, values in columns.items():
        if _is_constant(values):
            constant.add(name)
    ordered = sorted(columns, key=lambda name: (name in constant, prominence(name)))
    # With one checkpoint, any two values may be equal by chance.
    if len(checkpoints) < 2:
        return MetricColumns(tuple(ordered), {}, {})
    names_by_column = _clocks(checkpoints)
    names: list[str] = []
    repeats: dict[str, str] = {}
    constants: dict[str, float] = {}
    for name in ordered:
        column = tuple(columns[name])
        if name in constant and not is_metric(name) and column[0] is not None:
            constants[name] = column[0]
            continue
        # A constant metric may equal a constant epoch by chance.
        if column in names_by_column and not (name in constant and is_metric(name)):
            repeats[name] = names_by_column[column]
            continue
        if not is_metric(name) and (clock := _multiple_of_clock(column, checkpoints)):
            repeats[name] = clock
            continue
        names.append(name)
        names_by_column.setdefault(column, name)
    return MetricColumns(tuple(names), repeats, constants)


def _multiple_of_clock(column: _Column, checkpoints: Sequence[Checkpoint]) -> str:
    """Name the clock, with the factor, for a column that is a whole multiple; else empty."""
    for clock, name in _clocks(checkpoints).items():
        if name == "LR" or len(set(column)) < 2:
            continue
        ratio = _common_ratio(column, clock)
        if ratio > 1 and ratio.is_integer():
            return f"{ratio:g} × {name}"
    return ""


def _common_ratio(column: _Column, clock: _Column) -> float:
    """Return the ratio of the values to those of a clock; 0 if the ratios differ."""
    ratios: set[float] = set()
    for value, tick in zip(column, clock, strict=True):
        if value is None or not tick:
            return 0.0
        ratios.add(value / tick)
    return ratios.pop() if len(ratios) == 1 else 0.0


def find_momentary_numbers(checkpoints: Sequence[Checkpoint]) -> frozenset[str]:
    """Name the recorded numbers that change from checkpoint to checkpoint, and are no counts.

    Such numbers were measured on a checkpoint, whatever the name, and are not true of an average.
    Settings are excluded, since some of them follow a schedule.
    """
    columns: dict[str, set[float]] = defaultdict(set)
    for checkpoint in checkpoints:
        for name, value in checkpoint.record.metrics.items():
            columns[name].add(value)
    momentary: set[str] = set()
    for name, values in columns.items():
        is_count = all(value.is_integer() for value in values)
        if len(values) > 1 and not is_count and not is_setting(name.rpartition(".")[2]):
            momentary.add(name)
    return frozenset(momentary)


def _clocks(checkpoints: Sequence[Checkpoint]) -> dict[_Column, str]:
    """Return the columns of every run (rate, epoch, step): values → name."""
    rows: list[_Column] = []
    for checkpoint in checkpoints:
        record = checkpoint.record
        rows.append((record.lr, record.epoch, record.step, checkpoint.step))
    rates, epochs, recorded_steps, steps = zip(*rows, strict=True)
    return {rates: "LR", epochs: "epoch", recorded_steps: "step", steps: "step"}


def _is_constant(values: Sequence[float | None]) -> bool:
    """Return True if several checkpoints all have the same value."""
    return len(values) > 1 and len(set(values)) == 1
