"""Rays in random directions from centres, as in figure 4 of Izmailov et al. 2018.

Thin lines are single directions, thick ones their mean at each distance, with its 95 % interval.
The width of a minimum is marked where the loss has risen by a given amount.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.plots.figures.surface import panel_quantities
from ckptavg.plots.panels import Key, Layout, label_axes, short_names
from ckptavg.plots.quantities import Quantity, error_of
from ckptavg.plots.series import draw_line, line_of, points_by_series
from ckptavg.plots.style import BAND, GREY, INK, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MEAN_WIDTH = 1.8  # points
_RAY: dict[str, Any] = {"linewidth": 0.5, "alpha": 0.45, "zorder": 1.5}
_WIDTH: dict[str, Any] = {"marker": "|", "markersize": 11, "markeredgewidth": 1.6}


def ray_quantities(landscape: Landscape) -> list[Quantity]:
    """Return what the panels show: the loss whose rise tells the width, and the error."""
    quantities = panel_quantities(landscape)
    rise = landscape.facts.get("rise")
    if rise is None:
        return quantities
    for metric in landscape.metrics:
        if metric.key == rise["metric"]:
            loss = error_of(metric, training=rise["data"] == "training data")
            if loss == quantities[-1]:
                return [loss]
            return [loss, quantities[-1]]
    return quantities


def arrange(landscape: Landscape) -> Layout:
    """Arrange a panel for the loss and one for the error."""
    return Layout(columns=len(ray_quantities(landscape)), height=3.3)


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw the rays of each centre, their mean and the widths; return the legend."""
    quantities = ray_quantities(landscape)
    series = points_by_series(landscape)
    centers: list[str] = [name for name in landscape.facts.get("centers", ()) if name in series]
    key = Key()
    banded = False
    for panel, quantity in zip(panels, quantities, strict=True):
        for name, points in series.items():
            if name not in centers:
                style = line_style(_center_of(name, centers))
                line = line_of(points, quantity)
                panel.plot(line.x, line.values, color=style.colour, **_RAY)
        for number, name in enumerate(centers):
            line = line_of(series[name], quantity)
            draw_line(panel, line, line_style(number), width=_MEAN_WIDTH)
            banded |= line.banded
        label_axes(panel, x=landscape.axes[0], y=quantity.title)
    _draw_widths(landscape, panels[0], quantities[0])
    _explain(landscape, key, centers)
    if banded:
        key.add(Patch(facecolor=GREY, alpha=2 * BAND, linewidth=0), "95 % intervals of the mean")
    return key


def _center_of(series: str, centers: Sequence[str]) -> int:
    """Return the number of a ray's centre, which its name begins with; the longest that fits."""
    number = 0
    longest = -1
    for position, center in enumerate(centers):
        if series.startswith(f"{center}, ") and len(center) > longest:
            number, longest = position, len(center)
    return number


def _widths_of(landscape: Landscape) -> dict[str, Mapping[str, Any]]:
    """Return the widths by centre."""
    return {width["center"]: width for width in landscape.facts.get("widths", ())}


def _draw_widths(landscape: Landscape, panel: Axes, quantity: Quantity) -> None:
    """Mark the mean width of each centre, with its 95 % interval, at the risen loss."""
    rise = landscape.facts.get("rise")
    centers = list(landscape.facts.get("centers", ()))
    series = points_by_series(landscape)
    for name, width in _widths_of(landscape).items():
        if rise is None or width["mean"] is None or name not in series:
            continue
        level = _first_value(series[name], quantity) + rise["value"]
        colour = line_style(centers.index(name)).colour
        panel.plot([width["mean"]], [level], color=colour, zorder=5, **_WIDTH)
        bottom, top = panel.get_ylim()
        panel.vlines(
            width["mean"],
            bottom,
            level,
            colors=colour,
            linewidth=0.8,
            linestyles=(0, (1, 2)),
            zorder=1,
        )
        panel.set_ylim(bottom, top)
        if width["low"] is not None:
            panel.hlines(level, width["low"], width["high"], colors=colour, linewidth=1.6, zorder=5)


def _first_value(points: Sequence[Point], quantity: Quantity) -> float:
    return float(line_of(points, quantity).values[0])


def _explain(landscape: Landscape, key: Key, centers: Sequence[str]) -> None:
    """Explain the lines of the centres, with their widths."""
    widths = _widths_of(landscape)
    rise = landscape.facts.get("rise")
    for number, (center, name) in enumerate(zip(centers, short_names(centers), strict=True)):
        style = line_style(number)
        label = f"{name}, mean of {landscape.facts['directions']} directions"
        width = widths.get(center)
        if width is not None and width["mean"] is not None:
            label += f"; width {width['mean']:.3g}"
            if width["low"] is not None:
                label += f" ({width['low']:.3g} to {width['high']:.3g})"
        key.add(Line2D([], [], linewidth=_MEAN_WIDTH, markersize=4, **style.of_line()), label)
    key.add(Line2D([], [], color=GREY, linewidth=0.7), "single directions")
    if rise is not None and widths:
        bar = Line2D([], [], color=INK, linewidth=1.6, **_WIDTH)
        key.add(bar, f"width: loss risen by {rise['value']:.3g} {rise['unit']}".rstrip())
