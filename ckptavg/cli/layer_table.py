"""Coefficients per layer of a plan, as a table and as plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptavg.cli.console import Report, count_text
from ckptavg.runs.discovery.numbered import short_names

if TYPE_CHECKING:
    from ckptavg.averaging.planning.tensor_plan import LayerCoefficients, Plan

# Rows of a table that is shown in full.
_MOST_ROWS = 30
# Rows from the beginning, and from the end, of a longer one.
_ROWS_OF_EACH_END = 10


def show_layers(report: Report, plan: Plan) -> None:
    """Show the coefficients of layers, and the information that they follow from.

    Nothing is shown for a plan whose layers share their coefficients. A long table shows the first
    and the last layers, unless the command is verbose.
    """
    if not plan.layers:
        return
    other, own = short_names([checkpoint.path for checkpoint in plan.checkpoints])[-2:]
    shares = [layer.coefficients[-1] for layer in plan.layers]
    count = count_text(len(shares), "layer")
    title = f"{count}, {min(shares):.3g} to {max(shares):.3g} of {own}"
    rows = [_row(layer) for layer in plan.layers]
    if len(rows) > _MOST_ROWS and report.verbosity < 1:
        left_out = len(rows) - 2 * _ROWS_OF_EACH_END
        rows[_ROWS_OF_EACH_END:-_ROWS_OF_EACH_END] = [(f"... {left_out} more: -v", "", "", "")]
    columns = ("layer", f"information in {other}", f"in {own}", f"coefficient of {own}")
    report.table(columns, rows, title=title)


def layer_values(plan: Plan) -> dict[str, Any]:
    """Return the coefficients of layers as an entry for JSON; empty where layers share them."""
    if not plan.layers:
        return {}
    layers = []
    for layer in plan.layers:
        layers.append(
            {
                "layer": layer.name,
                "information": list(layer.information),
                "coefficients": list(layer.coefficients),
            }
        )
    return {"layers": layers}


def _row(layer: LayerCoefficients) -> tuple[str, str, str, str]:
    figures = [f"{value:.6g}" for value in layer.information[-2:] if value is not None]
    other, own = figures
    return layer.name, other, own, f"{layer.coefficients[-1]:.6g}"
