"""Averages against ensembles of the same checkpoints, as their number grows.

The third panel has the distances between outputs: those of the ensemble (FGE) differ from those of
the average by O(Δ²) where those of a single checkpoint differ by O(Δ) (Izmailov et al. 2018, 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptavg.landscape.landscape import Landscape
from ckptavg.plots.figures.curve import curve_quantities, curves_of, draw_curves
from ckptavg.plots.panels import Key, Layout, label_axes
from ckptavg.plots.quantities import Quantity, error_of, measured_at
from ckptavg.plots.series import draw_line, line_of, sample_of, write_steps
from ckptavg.plots.style import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DISTANCE = "mean L2 distance of outputs"
# Keys of distances between outputs among the metrics of an ensemble.
_GAPS = ("output_gap", "last_gap")


def output_distances(landscape: Landscape) -> list[Quantity]:
    """Return the distances between outputs that were measured."""
    distances: list[Quantity] = []
    for metric in landscape.metrics:
        if metric.key in _GAPS and measured_at(error_of(metric), landscape.points):
            distances.append(error_of(metric))
    return distances


def arrange(landscape: Landscape) -> Layout:
    """Arrange the panels side by side."""
    columns = len(curve_quantities(landscape)) + bool(output_distances(landscape))
    return Layout(columns=columns, height=2.8)


def draw(landscape: Landscape, panels: Sequence[Axes]) -> Key:
    """Draw scores, and distances of outputs, over the number of checkpoints."""
    curves = curves_of(landscape)
    key = draw_curves(curves, curve_quantities(landscape), panels)
    for number, quantity in enumerate(output_distances(landscape), len(curves)):
        style = line_style(number)
        for curve in curves:
            line = line_of(curve.points, quantity)
            if line.measured:
                draw_line(panels[-1], line, style)
        key.add(sample_of(style), quantity.label)
    if output_distances(landscape):
        label_axes(panels[-1], y=_DISTANCE)
        panels[-1].set_ylim(bottom=0)
    for panel in panels:
        label_axes(panel, x=landscape.axes[0])
        write_steps(panel)
    return key
