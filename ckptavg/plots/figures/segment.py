"""Segments between two points, with the barrier on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from ckptavg.landscape.landscape import Landmark, Landscape
from ckptavg.plots.figures.surface import panel_quantities
from ckptavg.plots.panels import Key, Layout, ink_of, label_axes, short_names
from ckptavg.plots.quantities import Quantity
from ckptavg.plots.series import Line, draw_line, line_of
from ckptavg.plots.style import GREY, SMALL, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A line with a short bar at each end, which a low barrier does not hide.
_HEIGHT = {"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "shrinkA": 0, "shrinkB": 0}
# Marks that are farther off the line than this share of its range have other statistics.
_OFF_LINE = 0.01


def arrange(landscape: Landscape) -> Layout:
    """Arrange a panel for the loss and one for the error."""
    return Layout(columns=len(panel_quantities(landscape)), height=3.2)


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw loss and error along the segment; return the legend."""
    quantities = panel_quantities(landscape)
    points = landscape.points
    for panel, quantity in zip(panels, quantities, strict=True):
        line = line_of(points, quantity)
        draw_line(panel, line, line_style(0))
        _draw_barrier(landscape, panel, line, quantity)
        _draw_holes(panel, line)
        label_axes(panel, x=landscape.axes[0], y=quantity.title)
    return _draw_ends(landscape, panels, quantities)


def _draw_barrier(landscape: Landscape, panel: Axes, line: Line, quantity: Quantity) -> None:
    """Draw the straight line between the ends, and the height of the barrier above it."""
    barrier = _barrier_of(landscape, quantity)
    ends = np.isin(line.x, (0.0, 1.0)) & np.isfinite(line.values)
    if barrier is None or np.count_nonzero(ends) != 2:
        return
    start, end = line.values[ends]
    panel.plot([0.0, 1.0], [start, end], color=GREY, linewidth=0.9, linestyle=":", zorder=2)
    height, at = barrier["height"], barrier["at"]
    text = "no barrier"
    if height is None:
        text = "barrier: not finite"
    # Less than the last digit shown is rounding.
    elif quantity.text(height) != quantity.text(0.0):
        text = f"barrier {quantity.text(height)}".replace("%", "percentage points")
        base = (1 - at) * start + at * end
        panel.annotate(
            "",
            xy=(at, base + height),
            xytext=(at, base),
            arrowprops=_HEIGHT | {"color": ink_of(panel)},
        )
    panel.set_title(text, loc="right", fontsize=SMALL, parse_math=False)


def _barrier_of(landscape: Landscape, quantity: Quantity) -> Mapping[str, Any] | None:
    """Return the barrier of a quantity: its height and where it is; None where not measured."""
    for barrier in landscape.facts.get("barriers", ()):
        training = barrier["data"] == "training data"
        if barrier["metric"] == quantity.key and training == quantity.training:
            measured: Mapping[str, Any] = barrier
            return measured
    return None


def _draw_holes(panel: Axes, line: Line) -> None:
    """Shade the parts without finite values."""
    holes = ~np.isfinite(line.values)
    if not holes.any() or len(line.x) < 2:
        return
    middles = (line.x[1:] + line.x[:-1]) / 2
    edges = np.concatenate(([line.x[0]], middles, [line.x[-1]]))
    for left, right in zip(edges[:-1][holes], edges[1:][holes], strict=True):
        panel.axvspan(left, right, facecolor="white", edgecolor=GREY, hatch="////", linewidth=0)


def _draw_ends(landscape: Landscape, panels: Sequence[Axes], quantities: Sequence[Quantity]) -> Key:
    """Mark named points of the segment, with their exact values in the legend."""
    marks: list[Landmark] = []
    for mark in (*landscape.checkpoints, *landscape.averages):
        if mark.data and mark.x is not None:
            marks.append(mark)
    key = Key()
    if marks:
        key.title = "Exact values: " + "; ".join(quantity.title for quantity in quantities)
    names = short_names([mark.name for mark in marks])
    off_line = False
    for number, (mark, name) in enumerate(zip(marks, names, strict=True)):
        look = end_look(number)
        for panel, quantity in zip(panels, quantities, strict=True):
            value = quantity.value(mark)
            if math.isfinite(value) and mark.x is not None:
                panel.plot([mark.x], [value], zorder=4, clip_on=False, **look)
                off_line |= _is_off(line_of(landscape.points, quantity), mark.x, value)
        values = "; ".join(quantity.text(quantity.value(mark)) for quantity in quantities)
        key.add(Line2D([], [], **look), f"{name}: {values}")
    if off_line:
        blank = Line2D([], [], linestyle="none")
        key.add(blank, "off the line: a checkpoint with BatchNorm statistics of its own")
    return key


def _is_off(line: Line, x: float, value: float) -> bool:
    """Return True if a mark is visibly off the line."""
    at_x = line.values[np.isclose(line.x, x) & np.isfinite(line.values)]
    spread = float(np.nanmax(line.values) - np.nanmin(line.values)) if line.measured else 0.0
    return bool((np.abs(at_x - value) > _OFF_LINE * spread).any())


def end_look(number: int) -> dict[str, Any]:
    """Return the look of the mark at an end, or of another named point."""
    style = line_style(number + 1)
    return {
        "marker": style.marker,
        "markerfacecolor": style.colour,
        "markeredgecolor": "white",
        "markersize": 8,
        "linestyle": "none",
    }
