"""Checkpoints and averages among the points of a plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from ckptavg.landscape.landscape import Landmark, Landscape
from ckptavg.plots.panels import NAME_ROOM, Key, short_names
from ckptavg.plots.quantities import Quantity, distinct_texts
from ckptavg.plots.style import INK, STAR

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CORNERS = ("^", "s", "D")
_CORNER: dict[str, Any] = {
    "markersize": 7.5,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 1.3,
    "linestyle": "none",
}
_AVERAGES = ("*", "P", "X", "h")
_AVERAGE: dict[str, Any] = {
    "markersize": 13,
    "markerfacecolor": STAR,
    "markeredgecolor": "white",
    "markeredgewidth": 0.9,
    "linestyle": "none",
}
# Most averages that get a mark of their own.
MOST_AVERAGES = 6
# Areas of dots, in square points: on the plane, and farthest off it.
_NEAR, _FAR = 26.0, 4.0
# From this number on, dots are smaller.
_MANY = 50
# A point this far off, as a share of the plane's extent, is on the plane.
_ON_PLANE = 1e-6


@dataclass(frozen=True)
class Marks:
    """Marked points of a plane.

    Attributes:
        corners: Checkpoints that the plane goes through, or the first and the last in order.
        others: Further checkpoints.
        averages: Averages.
        outside: Number of further checkpoints beyond the area of the points.
    """

    corners: tuple[Landmark, ...]
    others: tuple[Landmark, ...]
    averages: tuple[Landmark, ...]
    outside: int


def marks_of(landscape: Landscape) -> Marks:
    """Sort the landmarks of a plane by how they are marked."""
    placed = [mark for mark in landscape.checkpoints if mark.x is not None and mark.y is not None]
    x = [point.x for point in landscape.points]
    y = [point.y or 0.0 for point in landscape.points]
    extent = max(max(x) - min(x), max(y) - min(y))
    if landscape.kind == "plane":
        on_plane = [mark for mark in placed if mark.distance <= _ON_PLANE * extent]
        corners = on_plane[: len(_CORNERS)]
    else:
        corners = [placed[0], placed[-1]][: len(placed)] if placed else []
    corner_ids = {id(mark) for mark in corners}
    others = [mark for mark in placed if id(mark) not in corner_ids]
    outside = 0
    for mark in others:
        inside_x = min(x) <= (mark.x or 0.0) <= max(x)
        inside_y = min(y) <= (mark.y or 0.0) <= max(y)
        outside += not (inside_x and inside_y)
    return Marks(
        tuple(corners),
        tuple(others),
        tuple(mark for mark in landscape.averages if mark.x is not None)[:MOST_AVERAGES],
        outside,
    )


def coordinates(marks: Sequence[Landmark]) -> tuple[list[float], list[float]]:
    """Return x and y of the landmarks that have both."""
    x: list[float] = []
    y: list[float] = []
    for mark in marks:
        if mark.x is not None and mark.y is not None:
            x.append(mark.x)
            y.append(mark.y)
    return x, y


def named_marks(landscape: Landscape) -> tuple[Landmark, ...]:
    """Return the corners and the averages, which the legend has values of."""
    marks = marks_of(landscape)
    return (*marks.corners, *marks.averages)


def _names_of(landscape: Landscape, marks: Sequence[Landmark]) -> list[str]:
    """Return the names of marks, with the words by which the plane's corners were given."""
    given = dict(zip(_corners_in_order(marks), landscape.facts.get("through", ()), strict=False))
    names: list[str] = []
    for number, mark in enumerate(marks):
        word = given.get(number, mark.name)
        if word == mark.name:
            names.append(mark.name)
        else:
            names.append(f"{word} ({mark.name})")
    return names


def _corners_in_order(marks: Sequence[Landmark]) -> list[int]:
    """Return the positions of the three corners in the order in which the plane was laid.

    The first is the origin, and the second is on the horizontal axis.
    """
    on_plane = [n for n, mark in enumerate(marks) if mark.distance == 0 and mark.y is not None]
    if len(on_plane) < len(_CORNERS):
        return []
    first = min(on_plane, key=lambda n: math.hypot(marks[n].x or 0.0, marks[n].y or 0.0))
    rest = [n for n in on_plane if n != first]
    second = min(rest, key=lambda n: abs(marks[n].y or 0.0))
    third = max(rest, key=lambda n: abs(marks[n].y or 0.0))
    return [first, second, third]


def draw_marks(landscape: Landscape, panel: Axes) -> None:
    """Draw the checkpoints in order, the corners and the averages."""
    marks = marks_of(landscape)
    if marks.others:
        panel.plot(
            *coordinates(landscape.checkpoints),
            color=INK,
            linewidth=0.7,
            alpha=0.7,
            zorder=3,
        )
        panel.scatter(
            *coordinates(marks.others),
            s=_areas(marks.others),
            color=INK,
            edgecolors="white",
            linewidths=0.5,
            zorder=3.5,
        )
    for shape, mark in zip(_CORNERS, marks.corners, strict=False):
        panel.plot(*coordinates([mark]), marker=shape, zorder=4, clip_on=False, **_CORNER)
    for number, mark in enumerate(marks.averages):
        shape = _AVERAGES[number % len(_AVERAGES)]
        panel.plot(*coordinates([mark]), marker=shape, zorder=5, clip_on=False, **_AVERAGE)


def _areas(marks: Sequence[Landmark]) -> list[float]:
    """Return the areas of dots, which shrink with the distance off the plane.

    Many dots are smaller, so that the surface can be seen between them.
    """
    farthest = max(mark.distance for mark in marks) or 1.0
    scale = min(1.0, _MANY / len(marks))
    areas: list[float] = []
    for mark in marks:
        share = mark.distance / farthest
        areas.append(scale * (_NEAR + (_FAR - _NEAR) * share))
    return areas


def key_of_marks(landscape: Landscape, quantities: Sequence[Quantity]) -> Key:
    """Explain the marks, with the exact values of corners and averages."""
    marks = marks_of(landscape)
    key = Key()
    named = (*marks.corners, *marks.averages)
    if named:
        key.title = "Exact values: " + "; ".join(quantity.title for quantity in quantities)
    names = short_names(_names_of(landscape, named), NAME_ROOM)
    shapes = [*_CORNERS[: len(marks.corners)]]
    for number in range(len(marks.averages)):
        shapes.append(_AVERAGES[number % len(_AVERAGES)])
    for position, (mark, name, shape) in enumerate(zip(named, names, shapes, strict=True)):
        look = _AVERAGE | {"markersize": 10}
        if position < len(marks.corners):
            look = _CORNER
        values = "; ".join(_text(quantity, mark) for quantity in quantities)
        key.add(Line2D([], [], marker=shape, **look), f"{name}: {values}")
    if marks.others:
        dot = Line2D(
            [], [], color=INK, linewidth=0.7, marker="o", markersize=4.5, markeredgecolor="white"
        )
        key.add(dot, _label_of_others(marks))
    return key


def _text(quantity: Quantity, mark: Landmark) -> str:
    value = quantity.value(mark)
    if math.isinf(value):
        return "not finite"
    return quantity.text(value)


def _label_of_others(marks: Marks) -> str:
    """Explain the dots: number, order, distance off the plane."""
    distances = sorted({mark.distance for mark in marks.others})
    label = f"{len(marks.others)} further checkpoints, joined in order"
    if len(marks.others) == 1:
        label = "another checkpoint"
    if distances[-1] > 0:
        texts = distinct_texts([distances[0], distances[-1]], 2)
        if len(distances) == 1:
            label += f", {texts[0]} off the plane"
        else:
            label += f"; smaller: farther off the plane ({texts[0]} to {texts[-1]})"
    if marks.outside:
        label += f"; {marks.outside} outside"
    return label
