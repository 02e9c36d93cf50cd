"""Colours, dashes and markers of all figures, readable on screens and printed in grey."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.style
from matplotlib import font_manager
from matplotlib.colors import ListedColormap

INK = "#1a1a1a"
GREY = "#8c8c8c"
DARK_GREY = "#595959"
FAINT = "#d9d9d9"
STAR = "#d55e00"
# Okabe and Ito's palette without its yellow, which white paper swallows. Neighbours differ in
# lightness, for printers without colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#1a1a1a", "#e69f00", "#56b4e9")
# Plain dashes are left to values on training data.
DASHES = ("-", (0, (8, 1.5, 1.5, 1.5)), (0, (1.2, 1.2)), (0, (3, 1.2, 1, 1.2, 1, 1.2)), (0, (1, 3)))
TRAINING = (0, (4, 2.5))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BAND = 0.15  # opacity
SMALL = 8.0  # points
# Scripts that DejaVu lacks, where a system has a font for them.
_OTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei")
_RC = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "hatch.color": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "ckptavg",
    "pdf.fonttype": 42,
    "savefig.dpi": 100,
}


@dataclass(frozen=True)
class LineStyle:
    """Look of a line; colour, dashes and marker each tell it from other lines."""

    colour: str
    dash: Any
    marker: str

    def of_line(self) -> dict[str, Any]:
        """Return the keywords of ``Axes.plot``."""
        return {"color": self.colour, "linestyle": self.dash, "marker": self.marker}


def line_style(position: int, dash: int | None = None) -> LineStyle:
    """Return the look of the line at a position among several.

    Args:
        position: Number of the line, from 0.
        dash: Number of the dashes; as the line's where None.
    """
    if dash is None:
        dash = position
    return LineStyle(
        COLOURS[position % len(COLOURS)],
        DASHES[dash % len(DASHES)],
        MARKERS[position % len(MARKERS)],
    )


def surface_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return colours from light, for low values, to dark, for high ones.

    They are those of cividis, whose lightness rises evenly for every kind of colour vision. Its
    darkest part is left out, so that dark marks stand out everywhere.

    Args:
        count: Number of colours, 1 or more.
    """
    cividis = mpl.colormaps["cividis_r"]
    steps = max(count - 1, 1)
    colours: list[tuple[float, float, float, float]] = []
    for number in range(count):
        red, green, blue, alpha = cividis(0.02 + 0.73 * number / steps)
        colours.append((red, green, blue, alpha))
    return colours


def surface_map() -> ListedColormap:
    """Return a colour map with the colours of surfaces."""
    return ListedColormap([*surface_colours(256)], name="ckptavg")


@contextmanager
def figure_style() -> Iterator[None]:
    """Apply the style of figures, whatever the caller has set, and take it back at the end."""
    fonts = ["DejaVu Sans"]
    installed = {*font_manager.fontManager.get_font_names()}
    fonts += [font for font in _OTHER_FONTS if font in installed]
    with mpl.style.context(["default", _RC | {"font.family": fonts}]):
        yield
