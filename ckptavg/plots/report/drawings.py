"""Drawings of a report's figures, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Mapping

from ckptavg.landscape.landscape import Landscape
from ckptavg.optional import import_optional
from ckptavg.plots.report.figures import FigureKind
from ckptavg.plots.report.page import Drawing

_CAPTIONS: dict[FigureKind, str] = {
    "curve": "Each checkpoint, and the uniform average of all checkpoints up to it. The bands are "
    "95 % intervals of each score by itself; the paired comparison in the table is sharper.",
    "geometry": "Checkpoints that scatter around a common centre are what averaging is for: the "
    "centre is nearer to each of them than they are to each other.",
    "segment": "Scores on the straight line between the two in weight space, with BatchNorm "
    "statistics recomputed at every point where there are training data. A barrier would mean "
    "that the two lie in different valleys.",
    "reliability": "Predictions sorted by confidence into 15 bins: how many of each are right. "
    "Below the diagonal, a network is more confident than right.",
}


def draw_figures(figures: Mapping[FigureKind, Landscape]) -> dict[FigureKind, Drawing]:
    """Draw figures for a page.

    Args:
        figures: Figures by kind.

    Raises:
        SpecError: matplotlib is not installed.
    """
    svg = import_optional("ckptavg.plots.report.svg", "matplotlib")
    drawings: dict[FigureKind, Drawing] = {}
    for kind, landscape in figures.items():
        label = f"Figure: {kind}. {_CAPTIONS[kind]} {describe(landscape)}"
        drawn = svg.draw_inline(landscape, kind, label)
        drawings[kind] = Drawing(drawn, _CAPTIONS[kind])
    return drawings


def describe(landscape: Landscape) -> str:
    """Return the sentence of a figure, with a capital letter and a full stop; empty without one."""
    text = str(landscape.facts.get("text", ""))
    if not text:
        return ""
    return f"{text[0].upper()}{text[1:].removesuffix('.')}."
