"""Tables of lines over an axis: a row per x, a column per line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptavg.cli.console import Report, number_text
from ckptavg.display.tables import NOTHING, Column

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptavg.landscape.landscape import Landmark, Landscape, Point
    from ckptavg.tasks import Metric

# Recorded metrics in a table; the file of results has all.
_MOST_RECORDED = 3
# Turns in which columns are left out on a narrow terminal: those beside the values of the sliding
# average first, then beside those of checkpoints and of the running average, then all else.
_LINE_TURNS = {0: 3, 1: 5}
_AXIS_TURN, _LAST_TURN = 7, 8
# Short titles of the distances between outputs.
_GAPS = {"output_gap": "gap of outputs", "last_gap": "of a checkpoint"}


def show_lines(report: Report, landscape: Landscape) -> None:
    """Print a table per run, and the verdict.

    Args:
        report: Where the tables go.
        landscape: A landscape with its ``lines`` and ``sentences`` among the facts.
    """
    runs: dict[str, dict[str, list[Point]]] = {}
    for line in landscape.facts["lines"]:
        points = [point for point in landscape.points if point.series == line["series"]]
        runs.setdefault(line["run"], {})[line["line"]] = points
    for run, lines in runs.items():
        _show_run(report, landscape, run, lines)
    for sentence in landscape.facts.get("sentences", ()):
        report.line(sentence)


def _show_run(
    report: Report, landscape: Landscape, run: str, lines: Mapping[str, Sequence[Point]]
) -> None:
    """Print the table of a run."""
    every_x = dict.fromkeys(point.x for points in lines.values() for point in points)
    columns = [Column(landscape.axes[0], "number")]
    cells = [[number_text(x) for x in every_x]]
    marks = _marks(landscape, lines)
    rates = {mark.x: mark.lr for mark in marks}
    if landscape.kind == "ensemble":
        joining = {mark.x: mark.name for mark in marks}
        columns.append(Column("with", "name", leaves=_AXIS_TURN))
        cells.append([joining.get(x, NOTHING) for x in every_x])
    elif any(rate is not None for rate in rates.values()):
        columns.append(Column("LR", "number", leaves=_AXIS_TURN))
        cells.append([number_text(rates.get(x)) for x in every_x])
    for column, texts in (*_line_columns(landscape, lines), *_gap_columns(landscape, lines)):
        columns.append(column)
        cells.append([texts.get(x, NOTHING) for x in every_x])
    report.table(columns, [*zip(*cells, strict=True)], title=run)


def _marks(landscape: Landscape, lines: Mapping[str, Sequence[Point]]) -> list[Landmark]:
    """Return the checkpoints of a run: those that its points are made of."""
    positions: set[int] = set()
    for points in lines.values():
        for point in points:
            positions.update(_weighted(point))
    return [landscape.checkpoints[position] for position in sorted(positions)]


def _weighted(point: Point) -> list[int]:
    """Return the positions of the checkpoints that a point is made of."""
    return [position for position, value in enumerate(point.coefficients or ()) if value]


def _line_columns(
    landscape: Landscape, lines: Mapping[str, Sequence[Point]]
) -> list[tuple[Column, dict[float, str]]]:
    """Return the columns of all lines, each as texts by x."""
    first, *others = landscape.metrics
    columns: list[tuple[Column, dict[float, str]]] = []
    for number, (line, points) in enumerate(lines.items()):
        turn = _LINE_TURNS.get(number, 1)
        title = f"{line}, {first.title}" if len(columns) == 0 else line
        columns.append((Column(title, "number"), _texts(points, first)))
        on_training = _texts(points, first, training=True)
        if on_training:
            columns.append((Column("on training data", "number", leaves=turn), on_training))
        intervals = _intervals(points, first)
        if intervals:
            columns.append((Column("[95 %]", "number", leaves=turn + 1), intervals))
    # Recorded metrics have one line, and room for more of them.
    if len(lines) == 1:
        for metric in others[: _MOST_RECORDED - 1]:
            (points,) = lines.values()
            columns.append(
                (Column(metric.title, "number", leaves=_LAST_TURN), _texts(points, metric))
            )
    return columns


def _gap_columns(
    landscape: Landscape, lines: Mapping[str, Sequence[Point]]
) -> list[tuple[Column, dict[float, str]]]:
    """Return the columns of distances between outputs, of ensembles only."""
    columns: list[tuple[Column, dict[float, str]]] = []
    points = [point for line in lines.values() for point in line]
    for metric in landscape.metrics:
        texts = _texts(points, metric)
        if metric.key in _GAPS and texts:
            columns.append((Column(_GAPS[metric.key], "number", leaves=_LAST_TURN), texts))
    return columns


def _texts(points: Sequence[Point], metric: Metric, *, training: bool = False) -> dict[float, str]:
    """Return the values of a metric by x, on evaluation or on training data."""
    texts: dict[float, str] = {}
    for point in points:
        metrics = point.data
        if training:
            metrics = point.train or {}
        value = metrics.get(metric.key)
        if value is None:
            continue
        texts[point.x] = format(value, metric.form) if math.isfinite(value) else "hole"
    return texts


def _intervals(points: Sequence[Point], metric: Metric) -> dict[float, str]:
    """Return the intervals of a metric by x; empty where there are none."""
    texts: dict[float, str] = {}
    for point in points:
        if metric.key in point.interval:
            low, high = point.interval[metric.key]
            texts[point.x] = f"[{low:{metric.form}}, {high:{metric.form}}]"
    return texts
