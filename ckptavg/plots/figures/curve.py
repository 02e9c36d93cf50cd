"""Curves over training: scores of checkpoints and of averages up to each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.plots.panels import Key, Layout, label_axes, short_names
from ckptavg.plots.quantities import Quantity, error_of, loss_metric, measured_at
from ckptavg.plots.series import draw_line, line_of, points_by_series, sample_of, write_steps
from ckptavg.plots.style import BAND, GREY, LineStyle, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A learning rate that varies by this factor gets a logarithmic axis.
_DECADES = 20.0


@dataclass(frozen=True)
class Curve:
    """A series with its look.

    Attributes:
        run: Name of its run.
        line: Its name among the lines of the run.
        points: Its points.
        style: Its look.
    """

    run: str
    line: str
    points: Sequence[Point]
    style: LineStyle


def curves_of(landscape: Landscape) -> list[Curve]:
    """Return the series with their looks: of several runs, each has its colour and marker.

    ``facts["lines"]`` tells which run and which of its lines a series is.
    """
    names = {entry["series"]: entry for entry in landscape.facts.get("lines", ())}
    series = points_by_series(landscape)
    runs: dict[str, int] = {}
    lines: dict[str, int] = {}
    curves: list[Curve] = []
    for name in series:
        known = names.get(name, {"run": "", "line": name})
        runs.setdefault(known["run"], len(runs))
        lines.setdefault(known["line"], len(lines))
    for name, points in series.items():
        known = names.get(name, {"run": "", "line": name})
        run, line = known["run"], known["line"]
        style = line_style(lines[line])
        if len(runs) > 1:
            style = line_style(runs[run], dash=lines[line])
        curves.append(Curve(run, line, points, style))
    return curves


def curve_quantities(landscape: Landscape) -> list[Quantity]:
    """Return what the panels show: the error, and the loss if that is another metric."""
    metrics = [landscape.metrics[0]]
    loss = loss_metric(landscape.metrics)
    if loss.key != metrics[0].key:
        metrics.append(loss)
    quantities: list[Quantity] = []
    for metric in metrics:
        if measured_at(error_of(metric), landscape.points):
            quantities.append(error_of(metric))
    return quantities or [error_of(landscape.metrics[0])]


def learning_rates(landscape: Landscape) -> list[list[tuple[float, float]]]:
    """Return step and recorded learning rate of the checkpoints that have both, run by run."""
    runs: list[list[tuple[float, float]]] = []
    for mark in landscape.checkpoints:
        if mark.lr is None or mark.x is None:
            continue
        # The steps of a run rise.
        if not runs or mark.x <= runs[-1][-1][0]:
            runs.append([])
        runs[-1].append((mark.x, mark.lr))
    return runs


def arrange(landscape: Landscape) -> Layout:
    """Arrange the panels below each other, the learning rate last."""
    heights = [2.0] * len(curve_quantities(landscape))
    if learning_rates(landscape):
        heights.append(0.8)
    return Layout(
        rows=len(heights), height=1.1 + 0.95 * sum(heights), heights=tuple(heights), share_x=True
    )


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw a line per series; return the legend."""
    curves = curves_of(landscape)
    quantities = curve_quantities(landscape)
    key = draw_curves(curves, quantities, panels)
    if len(panels) > len(quantities):
        _draw_rates(landscape, panels[-1], curves)
    label_axes(panels[-1], x=landscape.axes[0])
    write_steps(panels[-1])
    return key


def draw_curves(
    curves: Sequence[Curve], quantities: Sequence[Quantity], panels: Sequence[Axes]
) -> Key:
    """Draw all lines on a panel per quantity, with what was measured on training data.

    Args:
        curves: The lines.
        quantities: Metrics on the evaluation data.
        panels: A panel per quantity; further ones are left alone.

    Returns:
        The legend.
    """
    key = _key_of(curves)
    banded = trained = False
    for panel, quantity in zip(panels, quantities, strict=False):
        for curve in curves:
            line = line_of(curve.points, quantity)
            draw_line(panel, line, curve.style)
            banded |= line.banded
            train = line_of(curve.points, replace(quantity, training=True))
            if train.measured:
                draw_line(panel, train, curve.style, training=True)
                trained = True
        label_axes(panel, y=quantity.label)
    if banded:
        key.add(Patch(facecolor=GREY, alpha=2 * BAND, linewidth=0), "95 % intervals")
    if trained:
        key.add(sample_of(LineStyle(GREY, "-", "none"), training=True), "on training data")
    return key


def _key_of(curves: Sequence[Curve]) -> Key:
    """Explain the lines: one by one, or colours of runs and dashes of lines."""
    key = Key()
    runs: dict[str, LineStyle] = {}
    lines: dict[str, LineStyle] = {}
    for curve in curves:
        runs.setdefault(curve.run, curve.style)
        lines.setdefault(curve.line, curve.style)
    several = len(runs) > 1
    if several:
        for style, name in zip(runs.values(), short_names([*runs]), strict=True):
            key.add(sample_of(replace(style, dash="-")), name or "other")
    for style, name in zip(lines.values(), short_names([*lines]), strict=True):
        sample = style
        if several:
            sample = LineStyle(GREY, style.dash, "none")
        key.add(sample_of(sample), name or "scores")
    return key


def _draw_rates(landscape: Landscape, panel: Axes, curves: Sequence[Curve]) -> None:
    """Draw the recorded learning rates, of several runs each in its colour."""
    runs = learning_rates(landscape)
    colours = [*dict.fromkeys(curve.style.colour for curve in curves)]
    for number, run in enumerate(runs):
        colour = GREY
        if 1 < len(runs) <= len(colours):
            colour = colours[number]
        steps, rates = np.array(run).T
        panel.plot(steps, rates, color=colour, linewidth=1, marker=".", markersize=3)
    rates = np.array([rate for run in runs for _, rate in run])
    if rates.min() > 0 and rates.max() / rates.min() >= _DECADES:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(numticks=4))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    label_axes(panel, y="learning rate")
