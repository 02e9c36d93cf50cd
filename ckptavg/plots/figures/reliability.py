"""Reliability diagrams (Guo et al. 2017, figure 1): the share that is right over confidence.

The lower panel has the number of samples per bin: points of few samples scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.plots.panels import Key, Layout, label_axes, short_names
from ckptavg.plots.series import Line, draw_line, points_by_series, sample_of, step_label
from ckptavg.plots.style import BAND, GREY, line_style
from ckptavg.tasks.metrics import ECE_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More candidates than these have no intervals, which would cover each other.
_FEW = 4
_DIAGONAL: dict[str, Any] = {"color": GREY, "linewidth": 0.9, "linestyle": ":", "zorder": 1}


def arrange(landscape: Landscape) -> Layout:
    """Arrange the diagram above the numbers of samples."""
    del landscape
    return Layout(rows=2, height=5.0, heights=(2.6, 1.0), share_x=True)


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw a line per candidate and bars of counts; return the legend."""
    diagram, counts = panels
    series = points_by_series(landscape)
    ece = landscape.facts.get("ece", {})
    key = Key()
    banded = False
    for number, (name, short) in enumerate(zip(series, short_names([*series]), strict=True)):
        line = _line_of(series[name], banded=len(series) <= _FEW)
        style = line_style(number)
        draw_line(diagram, line, style, width=1.2)
        banded |= line.banded
        label = short
        if name in ece:
            label += f": ECE {ece[name]:.4f}"
        key.add(sample_of(style, width=1.2), label)
    start = _first_edge(landscape)
    diagram.plot([start, 1], [start, 1], **_DIAGONAL)
    key.add(Line2D([], [], **_DIAGONAL), "perfect calibration")
    if banded:
        key.add(Patch(facecolor=GREY, alpha=2 * BAND, linewidth=0), "95 % intervals")
    diagram.set_xlim(start, 1)
    diagram.set_ylim(-0.02, 1.02)
    label_axes(diagram, y=landscape.axes[1])
    _draw_counts(landscape, counts)
    label_axes(counts, x=landscape.axes[0], y="samples")
    return key


def _line_of(points: Sequence[Point], *, banded: bool) -> Line:
    """Return the share that is right over the mean confidence of each bin."""
    ordered = sorted(points, key=lambda point: point.x)
    none = (math.nan, math.nan)
    ends = [none] * len(ordered)
    if banded:
        ends = [point.interval.get("accuracy", none) for point in ordered]
    low, high = np.array(ends).T
    shares = np.array([math.nan if point.y is None else point.y for point in ordered])
    return Line(np.array([point.x for point in ordered]), shares, low, high)


def _first_edge(landscape: Landscape) -> float:
    """Return the lower edge of the first bin with samples."""
    low = min(point.x for point in landscape.points)
    return math.floor(low * ECE_BINS) / ECE_BINS


def _draw_counts(landscape: Landscape, panel: Axes) -> None:
    """Draw the samples per bin: a bar per candidate beside those of the others."""
    series = points_by_series(landscape)
    width = 0.86 / ECE_BINS / len(series)
    for number, points in enumerate(series.values()):
        left: list[float] = []
        heights: list[float] = []
        for point in points:
            # Bins are open at their lower end.
            start = (np.ceil(point.x * ECE_BINS) - 1) / ECE_BINS
            left.append(start + 0.07 / ECE_BINS + number * width)
            heights.append(point.data.get("n", 0))
        panel.bar(left, heights, width, align="edge", color=line_style(number).colour, linewidth=0)
    panel.set_yscale("log")
    panel.set_ylim(bottom=0.7)
    panel.yaxis.set_major_locator(LogLocator(numticks=4))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda count, _: step_label(count)))
    panel.yaxis.set_minor_formatter(NullFormatter())
