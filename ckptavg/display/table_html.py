"""Tables as HTML, for notebooks."""

from __future__ import annotations

from html import escape

from ckptavg.display.table_layout import BEST
from ckptavg.display.tables import Cell, Column, Row, Table
from ckptavg.errors.printable import printable

BEST_COLOR = "#00875f"  # a contrast of 4.5 with white and with black

_CELL = "padding: 2px 8px; white-space: nowrap; text-align:"
# Some pages give tables a color of their own, whatever is behind them.
_AS_AROUND = "color: inherit; font: inherit"


def table_html(table: Table) -> str:
    """Draw a table as HTML that reads on light and dark pages.

    Nothing is left out or shortened. The best rows are marked by a star and a color, significant
    cells are bold.
    """
    lines = ['<div style="overflow-x: auto">', f'<table style="{_AS_AROUND}">']
    if table.title:
        lines.append(f'<caption style="text-align: left">{_text(table.title)}</caption>')
    heads = [f'<th style="{_style(column)}">{_text(column.title)}</th>' for column in table.columns]
    lines += ["<thead>", f"<tr>{''.join(heads)}</tr>", "</thead>", "<tbody>"]
    for row in table.rows:
        lines.append(f"<tr>{_cells(row, table.columns)}</tr>")
    lines += ["</tbody>", "</table>"]
    legend = [*table.legend, *([table.significance] if table.significance else [])]
    if legend:
        lines.append(f"<p>{'<br>'.join(map(_text, legend))}</p>")
    return "\n".join([*lines, "</div>"])


def _cells(row: Row, columns: tuple[Column, ...]) -> str:
    parts = []
    for i, (cell, column) in enumerate(zip(row.cells, columns, strict=True)):
        mark = f"{BEST} " if row.best and not i else ""
        parts.append(f'<td style="{_style(column)}">{_marked(mark, cell)}</td>')
    return "".join(parts)


def _marked(mark: str, cell: Cell) -> str:
    text = mark + _text(cell.text)
    if cell.mark == "best":
        return f'<b style="color: {BEST_COLOR}">{text}</b>'
    return f"<b>{text}</b>" if cell.mark == "significant" else text


def _style(column: Column) -> str:
    return f"{_CELL} {'right' if column.kind == 'number' else 'left'}"


def _text(text: str) -> str:
    return escape(printable(text))
