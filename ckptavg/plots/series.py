"""Lines of figures: points by series, with 95 % bands, training values and ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.plots.quantities import Quantity
from ckptavg.plots.style import BAND, TRAINING, LineStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines of more points have markers on some of them.
_MARKED = 24
# Whole numbers from here on are written with an exponent.
_LONG_NUMBER = 1e7


@dataclass(frozen=True)
class Line:
    """Values of a quantity along a line.

    Attributes:
        x: Horizontal coordinates, rising, (n,).
        values: Values, (n,), NaN for holes.
        low: Lower ends of the 95 % intervals, (n,), NaN where there are none.
        high: Upper ends.
    """

    x: np.ndarray[Any, np.dtype[np.float64]]
    values: np.ndarray[Any, np.dtype[np.float64]]
    low: np.ndarray[Any, np.dtype[np.float64]]
    high: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def measured(self) -> bool:
        """True if any value is finite."""
        return bool(np.isfinite(self.values).any())

    @property
    def banded(self) -> bool:
        """True if there is any interval."""
        return bool(np.isfinite(self.low).any())

    @property
    def holes(self) -> int:
        """Number of values that are not finite on a line that has others."""
        if not self.measured:
            return 0
        return int(np.count_nonzero(~np.isfinite(self.values)))


def points_by_series(landscape: Landscape) -> dict[str, list[Point]]:
    """Return the points of each series, in the order of the series' first points."""
    series: dict[str, list[Point]] = {}
    for point in landscape.points:
        series.setdefault(point.series, []).append(point)
    return series


def line_of(points: Sequence[Point], quantity: Quantity) -> Line:
    """Return a quantity along a series, in the order of x."""
    ordered = sorted(points, key=lambda point: point.x)
    values = np.array([quantity.value(point) for point in ordered])
    values[~np.isfinite(values)] = math.nan
    ends = np.array([quantity.interval(point) for point in ordered]).reshape(-1, 2)
    return Line(np.array([point.x for point in ordered]), values, ends[:, 0], ends[:, 1])


def draw_line(
    panel: Axes, line: Line, style: LineStyle, *, width: float = 1.4, training: bool = False
) -> Line2D:
    """Draw a line with its band; one on training data is thin, dashed and has no markers.

    Args:
        panel: Axes.
        line: Values; holes interrupt the line.
        style: Look of the line.
        width: Width in points.
        training: True for values on the training data.

    Returns:
        The line.
    """
    look: dict[str, Any] = style.of_line()
    if training:
        look |= {"linestyle": TRAINING, "marker": "none"}
        width *= 0.7
    every = max(-(-len(line.x) // _MARKED), 1)
    (drawn,) = panel.plot(
        line.x,
        line.values,
        linewidth=width,
        markersize=4,
        markeredgewidth=0,
        markevery=every,
        zorder=3,
        **look,
    )
    if line.banded:
        _draw_band(panel, line, style)
    return drawn


def _draw_band(panel: Axes, line: Line, style: LineStyle) -> None:
    """Draw the 95 % intervals: a band, or a bar at a lone point."""
    if len(line.x) > 1:
        panel.fill_between(
            line.x,
            line.low,
            line.high,
            color=style.colour,
            alpha=BAND,
            linewidth=0,
            zorder=2,
        )
        return
    panel.vlines(line.x, line.low, line.high, color=style.colour, linewidth=1, zorder=2)


def sample_of(style: LineStyle, *, width: float = 1.4, training: bool = False) -> Line2D:
    """Return a sample of a line for the legend.

    Args:
        style: Look of the line.
        width: Width of the line in points.
        training: True for a line of training data, which has dashes and no markers.
    """
    look: dict[str, Any] = style.of_line()
    if training:
        look |= {"linestyle": TRAINING, "marker": "none"}
    return Line2D([], [], linewidth=width, markersize=4, markeredgewidth=0, **look)


def write_steps(panel: Axes) -> None:
    """Write the horizontal axis of steps in whole numbers without a common factor."""
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: step_label(step)))


def step_label(step: float) -> str:
    """Write a step on an axis: 500, 12 000, 2e+07."""
    if step == round(step) and abs(step) < _LONG_NUMBER:
        return f"{step:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{step:g}"
