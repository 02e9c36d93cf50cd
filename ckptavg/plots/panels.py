"""Panels of figures: their arrangement, labels and legends, and names as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ckptavg.display.shortening import shorten_names, wrap_words
from ckptavg.errors.printable import printable
from ckptavg.plots.style import SMALL

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH = 8.0  # inches: 800 pixels
NAME_ROOM = 28
# Characters of small text across a figure.
_LINE = 118
_HANDLE = 7
_MOST_COLUMNS = 4
_LINE_HEIGHT = 0.18  # inches
_BELOW = 0.55  # inches for labels between a panel and a legend below it
# Characters of a label per inch at 1 point, fewest characters of a line, inches around a panel.
_PER_INCH, _NARROW, _MARGIN = 117.0, 16, 0.6


@dataclass(frozen=True)
class Layout:
    """Arrangement of a figure's panels.

    Attributes:
        rows: Rows of panels.
        columns: Columns of panels.
        height: Height of the figure without its legend, in inches.
        heights: Relative heights of the rows; equal where empty.
        share_x: True if all panels have the same horizontal axis.
        equal: True if both axes of the panels have the same scale.
    """

    rows: int = 1
    columns: int = 1
    height: float = 4.0
    heights: tuple[float, ...] = ()
    share_x: bool = False
    equal: bool = False

    @property
    def count(self) -> int:
        """Number of panels."""
        return self.rows * self.columns


@dataclass
class Key:
    """Entries of a figure's legend, in order.

    Attributes:
        title: Heading of the legend.
        handles: Samples of what the entries explain.
        labels: Texts.
    """

    title: str = ""
    handles: list[Artist] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def add(self, handle: Artist, label: str) -> None:
        """Add an entry."""
        # matplotlib hides labels that begin with an underscore.
        if label.startswith("_"):
            label = f" {label}"
        self.handles.append(handle)
        self.labels.append(label)

    @property
    def columns(self) -> int:
        """Largest number of columns, filled one after the other, that fit below a figure."""
        count = len(self.labels)
        for columns in range(min(count, _MOST_COLUMNS), 1, -1):
            width = start = 0
            for column in range(columns):
                # The first columns take what is left over.
                length = count // columns + (column < count % columns)
                width += max(map(len, self.labels[start : start + length])) + _HANDLE
                start += length
            if width <= _LINE:
                return columns
        return 1

    @property
    def lines(self) -> int:
        """Number of lines of the legend below a figure."""
        if not self.labels:
            return 0
        return -(-len(self.labels) // self.columns) + bool(self.title)


def new_figure(layout: Layout) -> tuple[Figure, list[Axes]]:
    """Make a figure with its panels, outside of pyplot."""
    # Inches between panels and legend, and shares of a panel between panels.
    engine = ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.05, hspace=0.03, wspace=0.03)
    figure = Figure(figsize=(WIDTH, layout.height), layout=engine)
    grid = figure.subplots(
        layout.rows,
        layout.columns,
        sharex=layout.share_x,
        squeeze=False,
        height_ratios=layout.heights or None,
    )
    return figure, [*grid.flat]


def fit_height(figure: Figure, panels: Sequence[Axes]) -> None:
    """Make a figure as high as panels with equal scales on both axes need.

    The layout counts on a panel's whole box for its labels, which a box of another shape is not.
    """
    engine = figure.get_layout_engine()
    if engine is None:
        return
    engine.execute(figure)
    heights: list[float] = []
    for panel in panels:
        left, right = panel.get_xlim()
        bottom, top = panel.get_ylim()
        box = panel.get_window_extent()
        heights.append(box.width * (top - bottom) / (right - left) - box.height)
        panel.set_aspect("equal")
    figure.set_figheight(figure.get_figheight() + max(heights) / figure.dpi)


def put_key_below(figure: Figure, key: Key) -> None:
    """Put a legend below all panels of a figure, which grows by it."""
    figure.set_figheight(figure.get_figheight() + _LINE_HEIGHT * key.lines)
    if key.labels:
        legend = figure.legend(
            key.handles,
            key.labels,
            loc="outside lower center",
            ncols=key.columns,
            title=key.title or None,
            fontsize=SMALL,
            frameon=False,
            columnspacing=1.6,
        )
        _style_legend(legend)


def put_key_beside(axes: Axes, key: Key) -> None:
    """Put a legend below a panel of the caller's, to the left from its right end."""
    if not key.labels:
        return
    box = axes.get_window_extent()
    legend = axes.legend(
        key.handles,
        key.labels,
        loc="upper right",
        bbox_to_anchor=(1.0, -_BELOW * axes.figure.dpi / max(box.height, 1.0)),
        ncols=key.columns,
        title=key.title or None,
        fontsize=SMALL,
        frameon=False,
    )
    _style_legend(legend)


def _style_legend(legend: Any) -> None:
    legend.get_title().set_fontsize(SMALL)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)


def label_axes(axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Label a panel with plain texts, wrapped to its size.

    Args:
        axes: The panel.
        x: Title of the horizontal axis; empty for none.
        y: Title of the vertical axis; empty for none.
        title: Title of the panel; empty for none.
    """
    wide, high = _room_of(axes)
    if x:
        axes.set_xlabel(_wrap(x, wide), parse_math=False)
    if y:
        axes.set_ylabel(_wrap(y, high), parse_math=False)
    if title:
        axes.set_title(_wrap(title, wide), loc="left", parse_math=False)


def _room_of(axes: Axes) -> tuple[int, int]:
    """Return the characters that fit along the width and the height of a panel."""
    place = axes.get_subplotspec()
    if place is None:
        return _LINE, _LINE
    width, height = root_figure(axes).get_size_inches()
    rows, columns = place.get_gridspec().get_geometry()
    per_inch = _PER_INCH / float(axes.xaxis.label.get_fontsize())
    wide = per_inch * (width / columns - _MARGIN)
    high = per_inch * (height * len(place.rowspan) / rows - _MARGIN)
    return max(int(wide), _NARROW), max(int(high), _NARROW)


def _wrap(text: str, room: int) -> str:
    return "\n".join(wrap_words(printable(text), room))


def short_names(names: Sequence[str], room: int = NAME_ROOM) -> list[str]:
    """Shorten names for a legend, different ones to different ones, without control characters."""
    return shorten_names([printable(name) for name in names], room)


def root_figure(axes: Axes) -> Figure:
    """Return the figure of a panel, which may be in a part of it."""
    figure = axes.figure
    if isinstance(figure, SubFigure):
        figure = figure.figure
    return figure


def put_colour_bar(panel: Axes, drawn: Any, title: str = "", **look: Any) -> Any:
    """Put a colour bar beside a panel.

    In a figure of our own it is inside the panel's box, so that both have the same height. A panel
    of the caller's gives it room, since its neighbours may be close.

    Args:
        panel: The panel.
        drawn: What matplotlib has drawn in colours.
        title: Title of the bar; empty for none.
        look: Further keywords of ``Figure.colorbar``.
    """
    figure = root_figure(panel)
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        bar = figure.colorbar(drawn, cax=panel.inset_axes((1.03, 0.0, 0.04, 1.0)), **look)
    else:
        bar = figure.colorbar(drawn, ax=panel, pad=0.03, fraction=0.05, **look)
    bar.ax.tick_params(length=2)
    bar.outline.set_linewidth(0.5)
    if title:
        bar.set_label(title)
    return bar


def ink_of(panel: Axes) -> Any:
    """Return the colour of a panel's own texts."""
    return panel.xaxis.label.get_color()
