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
# Series of a landscape of several runs are named "RUN: LINE".
_SEPARATOR = ": "


@dataclass(frozen=True)
class Curve:
    """A series with its look.

    Attributes:
        name: Name of the series.
        points: Its points.
        style: Its look.
    """

    name: str
    points: Sequence[Point]
    style: LineStyle


def curves_of(landscape: Landscape) -> list[Curve]:
    """Return the series with their looks: of several runs, each has its colour and marker."""
    series = points_by_series(landscape)
    runs: dict[str, None] = {}
    lines: dict[str, None] = {}
    for name in series:
        run, _, line = name.rpartition(_SEPARATOR)
        runs[run] = None
        lines[line] = None
    curves: list[Curve] = []
    for name, points in series.items():
        run, _, line = name.rpartition(_SEPARATOR)
        number = [*lines].index(line)
        style = line_style(number)
        if len(runs) > 1:
            style = line_style([*runs].index(run), dash=number)
        curves.append(Curve(name, points, style))
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
    if len(panels) > len(quantities):
        _draw_rates(landscape, panels[-1], curves)
    label_axes(panels[-1], x=landscape.axes[0])
    write_steps(panels[-1])
    return key


def _key_of(curves: Sequence[Curve]) -> Key:
    """Explain the lines: one by one, or colours of runs and dashes of lines."""
    key = Key()
    runs = {curve.name.rpartition(_SEPARATOR)[0]: curve.style for curve in reversed(curves)}
    if len(runs) == 1:
        for curve, name in zip(curves, short_names([curve.name for curve in curves]), strict=True):
            key.add(sample_of(curve.style), name or "scores")
        return key
    styles = [*runs.values()][::-1]
    for style, name in zip(styles, short_names([*runs][::-1]), strict=True):
        key.add(sample_of(replace(style, dash="-")), name or "other")
    lines: dict[str, LineStyle] = {}
    for curve in curves:
        lines.setdefault(curve.name.rpartition(_SEPARATOR)[2], curve.style)
    for name, style in lines.items():
        key.add(sample_of(LineStyle(GREY, style.dash, "none")), name)
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
