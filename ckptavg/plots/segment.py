"""Segments between two points, with the barrier on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.lines import Line2D

from ckptavg.landscape.landscape import Landscape
from ckptavg.plots.panels import Key, Layout, label_axes, short_names
from ckptavg.plots.quantities import Quantity
from ckptavg.plots.series import Line, draw_line, line_of
from ckptavg.plots.style import GREY, INK, SMALL, line_style
from ckptavg.plots.surface import panel_quantities

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Share of the values below which a barrier is rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Barrier:
    """Highest point of a segment above the straight line between its ends.

    Attributes:
        x: Its place.
        height: Its height above the straight line; 0 or below where there is no barrier.
        base: Value of the straight line there.
    """

    x: float
    height: float
    base: float


def barrier_of(line: Line) -> Barrier | None:
    """Find the barrier: max over t of L(w(t)) − (1−t)·L(w(0)) − t·L(w(1)) (Frankle et al. 2020).

    Args:
        line: Values along the segment.

    Returns:
        The barrier; None where an end was not scored.
    """
    if len(line.x) < 2 or not np.isfinite(line.values[[0, -1]]).all():
        return None
    share = (line.x - line.x[0]) / (line.x[-1] - line.x[0])
    base = (1 - share) * line.values[0] + share * line.values[-1]
    heights = line.values - base
    highest = int(np.nanargmax(heights))
    return Barrier(float(line.x[highest]), float(heights[highest]), float(base[highest]))


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
        _draw_barrier(panel, line, quantity)
        _draw_holes(panel, line)
        label_axes(panel, x=landscape.axes[0], y=quantity.title)
    return _draw_ends(landscape, panels, quantities)


def _draw_barrier(panel: Axes, line: Line, quantity: Quantity) -> None:
    """Draw the straight line between the ends, and the height of the barrier above it."""
    barrier = barrier_of(line)
    if barrier is None:
        return
    panel.plot(line.x[[0, -1]], line.values[[0, -1]], color=GREY, linewidth=0.8, linestyle=":")
    if barrier.height <= _ROUNDING * float(np.nanmax(np.abs(line.values))):
        panel.set_title("no barrier", loc="right", fontsize=SMALL, color=INK)
        return
    panel.annotate(
        "",
        xy=(barrier.x, barrier.base + barrier.height),
        xytext=(barrier.x, barrier.base),
        arrowprops={
            "arrowstyle": "<->",
            "color": INK,
            "linewidth": 0.8,
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )
    text = f"barrier {quantity.text(barrier.height)}"
    panel.set_title(text, loc="right", fontsize=SMALL, color=INK)


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
    marks = [mark for mark in (*landscape.checkpoints, *landscape.averages) if mark.x is not None]
    key = Key()
    if marks:
        key.title = "Exact values: " + "; ".join(quantity.title for quantity in quantities)
    names = short_names([mark.name for mark in marks])
    for number, (mark, name) in enumerate(zip(marks, names, strict=True)):
        look = end_look(number)
        for panel, quantity in zip(panels, quantities, strict=True):
            value = quantity.value(mark)
            if math.isfinite(value) and mark.x is not None:
                panel.plot([mark.x], [value], zorder=4, clip_on=False, **look)
        values = "; ".join(quantity.text(quantity.value(mark)) for quantity in quantities)
        key.add(Line2D([], [], **look), f"{name}: {values}")
    return key


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
