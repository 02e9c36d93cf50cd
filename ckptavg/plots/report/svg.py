"""Figures as SVG elements for a page, with what each point is shown under the pointer."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ckptavg.errors.printable import printable, step_text
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.plots.draw import render_figure
from ckptavg.tasks import Metric

# Radius in points within which the pointer is at a point.
_REACH = 6
# A mark is at a point if the two are this close, as a share of the axis.
_CLOSE = 1e-6
# Most rows and columns of cells; more are thinned out, as a screen would do.
_MOST_CELLS = 64
# Kinds of figures whose points belong to the checkpoint at the same place of the first axis.
_OVER_TRAINING = ("curve", "geometry")
# A page has its own title and styles, and may show no image that is not drawn.
_UNUSED = ("metadata", "style", "title", "image")
_LOCAL_LINK = re.compile(r"url\(#")


def draw_inline(landscape: Landscape, prefix: str, label: str) -> str:
    """Draw a landscape as an SVG element that stands in a page beside others.

    Names of elements are unique to the prefix, styles do not reach beyond the element, and nothing
    outside is referred to. A mark that shows a scored point tells its name and scores.

    Args:
        landscape: Scored points.
        prefix: Text before the names of all elements.
        label: The figure in a sentence, for whoever cannot see it.

    Raises:
        EvaluationError: The landscape has no points.
    """
    figure, contents = render_figure(landscape, "svg", _draw_as_vectors)
    # Made by matplotlib a moment ago; it holds no entities.
    root = ET.fromstring(contents)
    _bring_inside(root, prefix)
    root.set("role", "img")
    root.set("aria-label", printable(label))
    root.append(_draw_targets(figure, landscape, _view_size(root)))
    return ET.tostring(root, encoding="unicode")


def _draw_as_vectors(figure: Figure) -> None:
    """Replace images by cells that are drawn, since a page without images shows no others."""
    for axes in _panels_of(figure):
        limits = axes.get_xlim(), axes.get_ylim()
        for image in [*axes.images]:
            values: Any = np.ma.asarray(image.get_array())
            rows, columns = (_thin_out(count) for count in values.shape)
            left, right, bottom, top = image.get_extent()
            axes.pcolormesh(
                np.linspace(left, right, len(columns) + 1),
                np.linspace(bottom, top, len(rows) + 1),
                values[np.ix_(rows, columns)],
                cmap=image.get_cmap(),
                norm=cast(Normalize, image.norm),
                zorder=image.get_zorder(),
            )
            image.remove()
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
        for collection in axes.collections:
            collection.set_rasterized(False)


def _panels_of(figure: Figure) -> list[Axes]:
    """List the panels of a figure, and the colour bars within."""
    panels: list[Axes] = []
    for axes in figure.axes:
        panels.append(axes)
        panels += [child for child in axes.child_axes if isinstance(child, Axes)]
    return panels


def _thin_out(count: int) -> list[int]:
    """Return at most ``_MOST_CELLS`` positions, evenly spread."""
    shown = min(count, _MOST_CELLS)
    return [number * count // shown for number in range(shown)]


def _bring_inside(root: ET.Element, prefix: str) -> None:
    """Remove what an element within a page has no use for, and make names unique."""
    for parent in root.iter():
        for child in list(parent):
            if _bare(child.tag) in _UNUSED:
                parent.remove(child)
    for element in root.iter():
        element.tag = _bare(element.tag)
        attributes = {_bare(name): value for name, value in element.attrib.items()}
        element.attrib.clear()
        for name, value in attributes.items():
            if name == "id":
                value = f"{prefix}-{value}"  # noqa: PLW2901
            elif name == "href":
                value = f"#{prefix}-{value.removeprefix('#')}"  # noqa: PLW2901
            element.set(name, _LOCAL_LINK.sub(f"url(#{prefix}-", value))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)


def _bare(name: str) -> str:
    """Return a name without its namespace, which a page knows by the element ``svg``."""
    return name.rpartition("}")[2]


def _view_size(root: ET.Element) -> tuple[float, float]:
    """Return width and height of the drawing, in points."""
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    return width, height


@dataclass(frozen=True)
class _Target:
    """A place on the drawing that tells what is there.

    Attributes:
        x: Place from the left, in points.
        y: Place from the top, in points.
        text: Text of the place.
    """

    x: float
    y: float
    text: str


def _draw_targets(figure: Figure, landscape: Landscape, size: tuple[float, float]) -> ET.Element:
    """Draw an invisible disc with a text over each mark that shows a scored point."""
    group = ET.Element("g", {"class": "targets"})
    drawn: set[tuple[str, str, str]] = set()
    for target in _find_targets(figure, landscape, size):
        place = (f"{target.x:.1f}", f"{target.y:.1f}", target.text)
        if place in drawn:
            continue
        drawn.add(place)
        disc = ET.SubElement(
            group,
            "circle",
            {"cx": place[0], "cy": place[1], "r": str(_REACH), "fill": "transparent"},
        )
        ET.SubElement(disc, "title").text = printable(target.text)
    return group


def _find_targets(
    figure: Figure, landscape: Landscape, size: tuple[float, float]
) -> Iterator[_Target]:
    """Find the marks of all panels that show a scored point."""
    described = _describe_all(landscape)
    for axes in figure.axes:
        for position in _marks_of(axes):
            text = _text_at(axes, position, described)
            if text is None:
                continue
            shown = axes.transData.transform(position)
            right, up = figure.transFigure.inverted().transform(shown)
            yield _Target(right * size[0], (1 - up) * size[1], text)


def _marks_of(axes: Axes) -> list[tuple[float, float]]:
    """List the points of a panel's lines and dots, in the units of its data."""
    arrays: list[Any] = []
    for line in axes.lines:
        if line.get_transform().contains_branch(axes.transData):
            arrays.append(line.get_xydata())
    for collection in axes.collections:
        if isinstance(collection, PathCollection):
            arrays.append(np.ma.filled(np.ma.asarray(collection.get_offsets(), float), np.nan))
    marks: list[tuple[float, float]] = []
    for array in arrays:
        for x, y in np.asarray(array, float).reshape(-1, 2).tolist():
            if np.isfinite(x) and np.isfinite(y):
                marks.append((x, y))
    return marks


@dataclass(frozen=True)
class _Described:
    """A scored point with all heights at which a figure may show it.

    Attributes:
        x: Coordinate along the first axis.
        heights: Values on second axes.
        text: The point in words.
    """

    x: float
    heights: tuple[float, ...]
    text: str


def _text_at(
    axes: Axes, position: tuple[float, float], described: Sequence[_Described]
) -> str | None:
    """Return the text of the scored point that a mark shows; None for any other mark."""
    reach_x, reach_y = (
        _CLOSE * abs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim())
    )
    x, y = position
    for point in described:
        if abs(point.x - x) > reach_x:
            continue
        for height in point.heights:
            if abs(height - y) <= reach_y:
                return point.text
    return None


def _describe_all(landscape: Landscape) -> list[_Described]:
    """Describe landmarks, then points, as names say more."""
    described: list[_Described] = []
    names: dict[float, Landmark] = {}
    for mark in (*landscape.checkpoints, *landscape.averages):
        if mark.x is None:
            continue
        names.setdefault(mark.x, mark)
        described.append(_Described(mark.x, _heights(mark, landscape), _mark_text(mark, landscape)))
    for point in landscape.points:
        mark_at_x = None
        if landscape.kind in _OVER_TRAINING:
            mark_at_x = names.get(point.x)
        text = _point_text(point, landscape, mark_at_x)
        described.append(_Described(point.x, _heights(point, landscape), text))
    return described


def _heights(scored: Point | Landmark, landscape: Landscape) -> tuple[float, ...]:
    """Return the values of a point that figures show along the second axis."""
    heights: list[float] = []
    if scored.y is not None:
        heights.append(scored.y)
    if isinstance(scored, Landmark) and scored.lr is not None:
        heights.append(scored.lr)
    percentages = {metric.key for metric in landscape.metrics if metric.unit == "%"}
    for metrics in (scored.data, scored.train or {}):
        for key, value in metrics.items():
            heights.append(value)
            # An accuracy may be shown as an error.
            if key in percentages:
                heights.append(100 - value)
    return tuple(heights)


def _mark_text(mark: Landmark, landscape: Landscape) -> str:
    """Describe a checkpoint or an average: name, step, learning rate and scores."""
    parts = [mark.name]
    if mark.step is not None:
        parts.append(f"step {step_text(mark.step)}")
    if mark.lr is not None:
        parts.append(f"LR {mark.lr:.4g}")
    return ", ".join([*parts, *_score_texts(mark, landscape)])


def _point_text(point: Point, landscape: Landscape, mark: Landmark | None) -> str:
    """Describe a point: its line, its place and its scores."""
    parts: list[str] = []
    if point.series:
        parts.append(point.series)
    if mark is not None:
        parts.append(mark.name)
        if mark.step is not None:
            parts.append(f"step {step_text(mark.step)}")
    else:
        name = landscape.axes[0].partition(",")[0]
        parts.append(f"{name} {point.x:.4g}")
    if point.y is not None:
        parts.append(f"{point.y:.4g}")
    return ", ".join([*parts, *_score_texts(point, landscape)])


def _score_texts(scored: Point | Landmark, landscape: Landscape) -> list[str]:
    """Word the scores of a point on evaluation data, then on training data."""
    texts: list[str] = []
    for metric in landscape.metrics:
        if metric.key in scored.data:
            texts.append(_score_text(metric, scored.data[metric.key]))
    for metric in landscape.metrics:
        if scored.train is not None and metric.key in scored.train:
            texts.append(f"{_score_text(metric, scored.train[metric.key])} on training data")
    return texts


def _score_text(metric: Metric, value: float) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{metric.title.removesuffix(' %')} {value:{metric.form}}{unit}"
