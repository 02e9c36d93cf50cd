"""Geometry of a run: distances to the mean, steps, their cosines, and all pairs of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.plots.panels import Key, Layout, label_axes, put_colour_bar
from ckptavg.plots.series import points_by_series, sample_of, write_steps
from ckptavg.plots.style import DARK_GREY, GREY, LineStyle, line_style, surface_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Series of a landscape of this kind, and their names in the legend, by panel.
_PANELS = {
    "distance in weight space": {"to mean": "to the mean", "step": "to the checkpoint before"},
    "norm of the weights": {"norm": "norm"},
    "cosine of successive steps": {"cosine": "cosine"},
}
_MATRIX = "distance between checkpoints"
# Cosines of successive steps that mean something: of a straight line, of a random walk, and of
# points scattered independently around a centre.
_COSINES = ((1.0, "straight"), (0.0, "random walk"), (-0.5, "scatter"))
_DOTS = 60


def panel_titles(landscape: Landscape) -> list[str]:
    """Return the titles of the panels for which there are values."""
    series = points_by_series(landscape)
    titles = [title for title, names in _PANELS.items() if names.keys() & series.keys()]
    if landscape.facts.get("distances"):
        titles.append(_MATRIX)
    return titles


def arrange(landscape: Landscape) -> Layout:
    """Arrange the panels in a row, or four of them in two."""
    count = len(panel_titles(landscape))
    rows = 1 + (count == 4)
    return Layout(rows=rows, columns=count // rows, height=2.7 * rows)


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw the lines over training and the matrix of distances; return the legend."""
    series = points_by_series(landscape)
    key = Key()
    for panel, title in zip(panels, panel_titles(landscape), strict=True):
        if title == _MATRIX:
            _draw_matrix(landscape, panel)
            continue
        names = _PANELS[title]
        for number, (name, label) in enumerate(names.items()):
            if name in series:
                style = line_style(number)
                _draw_values(panel, series[name], style)
                if len(names) > 1:
                    key.add(sample_of(style), label)
        label_axes(panel, x=landscape.axes[0], y=title)
        write_steps(panel)
        if "cosine" in names:
            _draw_cosines(panel)
        else:
            panel.set_ylim(bottom=_bottom(panel))
    return key


def _draw_values(panel: Axes, points: Sequence[Point], style: LineStyle) -> None:
    """Draw the values of a series, which stand in y."""
    size = 4.0
    if len(points) > _DOTS:
        size = 0.0
    x = [point.x for point in points]
    y = [math.nan if point.y is None else point.y for point in points]
    panel.plot(x, y, linewidth=1.2, markersize=size, markeredgewidth=0, **style.of_line())


def _bottom(panel: Axes) -> float:
    """Return 0 where values are not all far above it, else the lower end as it is."""
    low, high = panel.get_ylim()
    if low < 0.5 * high:
        return 0.0
    return low


def _draw_cosines(panel: Axes) -> None:
    """Draw the cosines that mean something."""
    low, high = panel.get_ylim()
    low, high = min(low, -0.6), max(high, 0.1)
    margin = 0.04 * (high - low)
    panel.set_ylim(low - margin, high + margin)
    for value, name in _COSINES:
        if panel.get_ylim()[0] <= value <= panel.get_ylim()[1]:
            panel.axhline(value, color=GREY, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
            panel.annotate(
                name,
                (1.0, value),
                xycoords=panel.get_yaxis_transform(),
                xytext=(2, 0),
                textcoords="offset points",
                color=DARK_GREY,
                fontsize=7,
                va="center",
            )


def _draw_matrix(landscape: Landscape, panel: Axes) -> None:
    """Draw the distances of all pairs; the diagonal, zeros, stays white."""
    distances: Any = np.array(landscape.facts["distances"], dtype=float)
    np.fill_diagonal(distances, math.nan)
    image = panel.imshow(
        distances, cmap=surface_map(), interpolation="nearest", origin="lower", aspect="equal"
    )
    put_colour_bar(panel, image, _MATRIX)
    title = "checkpoint, in the order of the run"
    label_axes(panel, x=title, y="checkpoint")
    positions = _ticks(len(distances))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_ticks([position - 1 for position in positions], [str(p) for p in positions])


def _ticks(count: int) -> list[int]:
    """Return a few round positions from 1 to a count."""
    step = 1
    while count / step > 6:
        step = {1: 2, 2: 5, 5: 10}[step // 10 ** (len(str(step)) - 1)] * 10 ** (len(str(step)) - 1)
    positions = [*range(step, count + 1, step)]
    if step > 1:
        positions.insert(0, 1)
    return positions
