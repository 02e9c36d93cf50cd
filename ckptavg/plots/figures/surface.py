"""Surfaces of loss and error over a plane in weight space.

Two panels, as in figure 3 of Izmailov et al. 2018 and in Garipov et al. 2018: the training loss
with the L2 term, and the evaluation error. Contours are close above the minimum and capped, as in
their code; the legend has the exact values at marked points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.patches import Patch, Rectangle
from matplotlib.tri import Triangulation

from ckptavg.landscape.landscape import Landscape
from ckptavg.plots.figures.levels import Levels, choose_levels
from ckptavg.plots.figures.marks import coordinates, draw_marks, key_of_marks, named_marks
from ckptavg.plots.panels import Key, Layout, label_axes, put_colour_bar
from ckptavg.plots.quantities import Quantity, distinct_texts, error_of, loss_of, measured_at
from ckptavg.plots.style import GREY, INK, SMALL, surface_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Ratios of height to width between which panels keep equal scales on both axes.
_FLATTEST, _TALLEST = 0.4, 1.6
_HEIGHT = 3.6  # inches
_HATCH = "////"


@dataclass(frozen=True)
class Surface:
    """Values over a plane.

    Attributes:
        x: Horizontal coordinates, (n,).
        y: Vertical coordinates, (n,).
        values: Values, (n,), NaN for holes.
    """

    x: np.ndarray[Any, np.dtype[np.float64]]
    y: np.ndarray[Any, np.dtype[np.float64]]
    values: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def finite(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask of the points with finite values, (n,)."""
        mask: np.ndarray[Any, np.dtype[np.bool_]] = np.isfinite(self.values)
        return mask


def panel_quantities(landscape: Landscape) -> list[Quantity]:
    """Return the quantities of the panels: the loss and the error, or one if they are the same."""
    error = error_of(landscape.metrics[0])
    loss = loss_of(landscape)
    quantities = [quantity for quantity in (loss, error) if measured_at(quantity, landscape.points)]
    if not quantities or quantities[0].title == error.title:
        return [error]
    return quantities


def arrange(landscape: Landscape) -> Layout:
    """Arrange the panels side by side."""
    columns = len(panel_quantities(landscape))
    return Layout(columns=columns, height=_HEIGHT, equal=_has_equal_scales(landscape))


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw the surfaces with the marked points; return the legend."""
    quantities = panel_quantities(landscape)
    holes = 0
    for panel, quantity in zip(panels, quantities, strict=True):
        holes = max(holes, _draw_panel(landscape, panel, quantity))
        label_axes(panel, landscape.axes[0], title=quantity.title)
    # Both panels have the same axes.
    label_axes(panels[0], y=landscape.axes[1])
    key = key_of_marks(landscape, quantities)
    if holes:
        patch = Patch(facecolor="white", edgecolor=GREY, hatch=_HATCH)
        key.add(patch, f"no finite value ({_count(holes, 'point')})")
    return key


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}s"


def _draw_panel(landscape: Landscape, panel: Axes, quantity: Quantity) -> int:
    """Draw one surface; return the number of holes."""
    surface = surface_of(landscape, quantity)
    holes = int(np.count_nonzero(~surface.finite))
    if holes:
        _hatch(panel, surface)
    values = surface.values[surface.finite].tolist()
    if values:
        marks = [quantity.value(mark) for mark in (*landscape.checkpoints, *landscape.averages)]
        marks = [value for value in marks if math.isfinite(value)]
        levels = choose_levels(values, marks, _resolution_of(landscape, quantity))
        _fill(panel, surface, levels, quantity)
    (left, right), (bottom, top) = _limits(landscape)
    if left < right:
        panel.set_xlim(left, right)
    if bottom < top:
        panel.set_ylim(bottom, top)
    draw_marks(landscape, panel)
    return holes


def _resolution_of(landscape: Landscape, quantity: Quantity) -> float:
    """Return the share of a single sample in a percentage; 0 for other quantities."""
    count = quantity.metrics(landscape.points[0]).get("n", 0)
    if quantity.unit != "%" or not count:
        return 0.0
    return 100 / count


def surface_of(landscape: Landscape, quantity: Quantity) -> Surface:
    """Return a quantity at all points as arrays."""
    x: list[float] = []
    y: list[float] = []
    values: list[float] = []
    for point in landscape.points:
        value = quantity.value(point)
        x.append(point.x)
        y.append(point.y or 0.0)
        # Infinite values are holes, too.
        values.append(value if math.isfinite(value) else math.nan)
    return Surface(np.array(x), np.array(y), np.array(values))


def _has_equal_scales(landscape: Landscape) -> bool:
    """Return True if the area is not too long for equal scales on both axes."""
    (left, right), (bottom, top) = _limits(landscape)
    if right == left or top == bottom:
        return False
    ratio = (top - bottom) / (right - left)
    return _FLATTEST <= ratio <= _TALLEST


def _limits(landscape: Landscape) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the limits of x and y: the area of the points and the named marks."""
    x, y = coordinates(named_marks(landscape))
    x += [point.x for point in landscape.points]
    y += [point.y or 0.0 for point in landscape.points]
    return (min(x), max(x)), (min(y), max(y))


def _hatch(panel: Axes, surface: Surface) -> None:
    """Hatch the area of the points; the surface covers all of it but the holes."""
    left, bottom = surface.x.min(), surface.y.min()
    area = Rectangle(
        (left, bottom),
        surface.x.max() - left,
        surface.y.max() - bottom,
        facecolor="white",
        edgecolor=GREY,
        hatch=_HATCH,
        linewidth=0,
        zorder=0,
    )
    panel.add_patch(area)


def _fill(panel: Axes, surface: Surface, levels: Levels, quantity: Quantity) -> None:
    """Fill the bands between levels, with a colour bar; lone points get coloured dots."""
    boundaries = [*levels.values]
    if len(boundaries) == 1:
        _fill_flat(panel, surface, quantity)
        return
    bands = len(boundaries) - 1
    colours = surface_colours(bands + levels.capped)
    # The first level is the minimum, which rounding must not put outside.
    boundaries[0] -= 1e-9 * (boundaries[-1] - boundaries[0])
    extend = "neither"
    shown: Colormap = ListedColormap(colours[:bands])
    if levels.capped:
        extend = "max"
        shown = shown.with_extremes(over=colours[-1])
    norm = BoundaryNorm(boundaries, bands)
    look: dict[str, Any] = {"cmap": shown, "norm": norm, "zorder": 1}
    mesh = _triangles(surface)
    if mesh is None:
        dots = surface.finite
        drawn: Any = panel.scatter(
            surface.x[dots], surface.y[dots], c=surface.values[dots], s=30, linewidths=0, **look
        )
    else:
        values = np.where(surface.finite, surface.values, boundaries[-1])
        drawn = panel.tricontourf(mesh, values, levels=boundaries, extend=extend, **look)
        panel.tricontour(
            mesh, values, levels=levels.values[1:], colors=INK, linewidths=0.3, zorder=1.5
        )
    _put_levels(panel, drawn, levels, extend)


def _fill_flat(panel: Axes, surface: Surface, quantity: Quantity) -> None:
    """Fill a surface of equal values with one colour, and say the value."""
    colour = surface_colours(3)[0]
    mesh = _triangles(surface)
    if mesh is not None:
        panel.tripcolor(
            mesh, np.zeros(len(surface.x)), cmap=ListedColormap([colour]), zorder=1, linewidth=0
        )
    value = quantity.text(float(surface.values[surface.finite][0]))
    panel.set_title(f"{value} everywhere", loc="right", fontsize=SMALL, parse_math=False)


def _triangles(surface: Surface) -> Triangulation | None:
    """Join points to triangles without holes; None where they span no area.

    Points may be a whole grid, or an unfinished one that is finer in parts.
    """
    points = {*zip(surface.x.tolist(), surface.y.tolist(), strict=True)}
    if len(points) < 3:
        return None
    try:
        mesh = Triangulation(surface.x, surface.y)
    except (RuntimeError, ValueError):
        # All points are on a line.
        return None
    holes = ~surface.finite
    mesh.set_mask(holes[mesh.triangles].any(axis=1))
    if mesh.mask is not None and mesh.mask.all():
        return None
    return mesh


def _put_levels(panel: Axes, drawn: Any, levels: Levels, extend: str) -> None:
    """Put a colour bar beside a panel; the end of a capped one says "> cap"."""
    bar = put_colour_bar(
        panel,
        drawn,
        extend=extend,
        extendrect=True,
        extendfrac="auto",
        spacing="uniform",
        ticks=levels.values,
    )
    texts = distinct_texts(levels.values)
    if levels.capped:
        texts[-1] = f"> {texts[-1]}"
    bar.ax.set_yticklabels(texts)
