"""Figures of landscapes, on axes or in files."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ckptavg.errors import EvaluationError, UsageError
from ckptavg.errors.system import guard_writes
from ckptavg.io.atomic import Publication
from ckptavg.landscape.landscape import Kind, Landscape
from ckptavg.plots.figures import curve, ensemble, geometry, rays, reliability, segment, surface
from ckptavg.plots.panels import (
    Key,
    Layout,
    fit_height,
    new_figure,
    put_key_below,
    put_key_beside,
    root_figure,
)
from ckptavg.plots.style import figure_style

log = logging.getLogger("ckptavg")
Form = Literal["png", "svg", "pdf"]
SUFFIXES = tuple(f".{form}" for form in get_args(Form))
_LARGE_PNG = 150_000  # bytes
# No dates and versions: the same landscape gives the same file.
_METADATA: Mapping[str, Mapping[str, Any]] = {
    "png": {"Software": "ckptavg"},
    "svg": {"Date": None, "Creator": "ckptavg"},
    "pdf": {"CreationDate": None, "Creator": "ckptavg"},
}


@dataclass(frozen=True)
class Drawing:
    """Functions that draw landscapes of one kind.

    Attributes:
        layout: Arranges the panels of a landscape.
        draw: Draws a landscape on its panels and returns the legend.
    """

    layout: Callable[[Landscape], Layout]
    draw: Callable[[Landscape, Sequence[Axes]], Key]


DRAWINGS: Mapping[Kind, Drawing] = {
    "plane": Drawing(surface.arrange, surface.draw),
    "pca": Drawing(surface.arrange, surface.draw),
    "curve": Drawing(curve.arrange, curve.draw),
    "segment": Drawing(segment.arrange, segment.draw),
    "rays": Drawing(rays.arrange, rays.draw),
    "ensemble": Drawing(ensemble.arrange, ensemble.draw),
    "reliability": Drawing(reliability.arrange, reliability.draw),
    "geometry": Drawing(geometry.arrange, geometry.draw),
}


def draw(
    landscape: Landscape, ax: Axes | Sequence[Axes] | None = None
) -> tuple[Figure, Axes | tuple[Axes, ...]]:
    """Draw a landscape.

    A new figure belongs to no window and no pyplot state: ``figure.savefig`` writes it, and a
    notebook shows it after ``%matplotlib inline``. Nothing of matplotlib's settings is changed.

    Args:
        landscape: Scored points.
        ax: Axes to draw on, or one per panel; a new figure where None. Given axes keep their own
            style, and get the legend below the last of them.

    Returns:
        The figure, and its axes: one, or a tuple where there are several panels.

    Raises:
        UsageError: There are other panels than given axes.
        EvaluationError: The landscape has no points.
    """
    if not landscape.points:
        raise EvaluationError("there is no point to draw", "Score at least one point.")
    drawing = DRAWINGS[landscape.kind]
    layout = drawing.layout(landscape)
    if ax is not None:
        return _draw_on(landscape, drawing, _as_panels(ax, layout, landscape.kind))
    with figure_style():
        figure, panels = new_figure(layout)
        key = drawing.draw(landscape, panels)
        put_key_below(figure, key)
        if layout.equal:
            fit_height(figure, panels)
    return figure, _as_value(panels)


def _draw_on(
    landscape: Landscape, drawing: Drawing, panels: Sequence[Axes]
) -> tuple[Figure, Axes | tuple[Axes, ...]]:
    """Draw on axes of the caller's."""
    key = drawing.draw(landscape, panels)
    if drawing.layout(landscape).equal:
        for panel in panels:
            panel.set_aspect("equal")
    put_key_beside(panels[-1], key)
    return root_figure(panels[0]), _as_value(panels)


def _as_panels(ax: Axes | Sequence[Axes], layout: Layout, kind: str) -> list[Axes]:
    """Return given axes as a list.

    Raises:
        UsageError: They are no axes, or not one per panel.
    """
    given: list[Any] = [ax]
    if not isinstance(ax, Axes):
        # An array of axes, as of ``subplots``, has rows.
        given = [*getattr(ax, "flat", ax)]
    if not all(isinstance(panel, Axes) for panel in given):
        raise UsageError("`ax` is expected to be axes of matplotlib, or a list of them")
    if len(given) != layout.count:
        raise UsageError(
            f"a figure of kind {kind} has {layout.count} panels here, but {len(given)} axes are "
            f"given",
            f"Pass {layout.count} axes, or none for a new figure.",
        )
    return given


def _as_value(panels: Sequence[Axes]) -> Axes | tuple[Axes, ...]:
    if len(panels) == 1:
        return panels[0]
    return tuple(panels)


def render(landscape: Landscape, form: Form) -> bytes:
    """Draw a landscape as the contents of a file.

    The same landscape gives the same bytes with the same release of matplotlib. Text in SVG files
    stays text.

    Args:
        landscape: Scored points.
        form: ``png`` (800 pixels wide), ``svg`` or ``pdf``.

    Raises:
        EvaluationError: The landscape has no points.
    """
    return render_figure(landscape, form)[1]


def render_figure(
    landscape: Landscape, form: Form, change: Callable[[Figure], None] = lambda _: None
) -> tuple[Figure, bytes]:
    """Draw a landscape as a figure and as the contents of a file, see ``render``.

    Args:
        landscape: Scored points.
        form: As for ``render``.
        change: Changes the figure before it is written.
    """
    contents = io.BytesIO()
    with figure_style(), _note_missing_glyphs():
        figure, _ = draw(landscape)
        change(figure)
        figure.savefig(contents, format=form, metadata=dict(_METADATA[form]))
    if form == "png" and len(contents.getvalue()) > _LARGE_PNG:
        return figure, _reduce_colours(contents)
    return figure, contents.getvalue()


def _reduce_colours(png: io.BytesIO) -> bytes:
    """Reduce an image to its 256 best colours, which takes a third of the room."""
    reduced = io.BytesIO()
    with Image.open(png) as image:
        colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colours.save(reduced, "PNG", optimize=True, dpi=image.info["dpi"])
    return reduced.getvalue()


def save_figure(landscape: Landscape, path: Path) -> None:
    """Draw a landscape into a ``.png``, ``.svg`` or ``.pdf`` file, whole or not at all.

    Args:
        landscape: Scored points.
        path: The file, which is replaced if it exists.

    Raises:
        UsageError: The path ends in something else.
        EvaluationError: The landscape has no points.
        OutputError: The file cannot be written.
    """
    contents = render(landscape, form_of(path))
    with guard_writes(path), Publication(path, directory=False, overwrite=True) as publication:
        publication.temporary.write_bytes(contents)
        publication.publish()


def form_of(path: Path) -> Form:
    """Return the form of a figure by its file's name, before any work.

    Raises:
        UsageError: The name ends in nothing known.
    """
    for form in get_args(Form):
        if path.suffix.lower() == f".{form}":
            known: Form = form
            return known
    raise UsageError(
        f"a figure is expected in a file that ends in {', '.join(SUFFIXES[:-1])} or "
        f"{SUFFIXES[-1]}, but got {path}"
    )


@contextmanager
def _note_missing_glyphs() -> Iterator[None]:
    """Turn matplotlib's warnings of missing glyphs into one note."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield
    missing = False
    for warning in caught:
        if "missing from font" in str(warning.message):
            missing = True
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if missing:
        log.warning(
            "the figure shows boxes for characters that no font here has; an .svg file keeps them"
        )
