"""Drawing of tables as HTML for notebooks."""

from __future__ import annotations

from html import escape

from ckptavg.display.table_layout import BEST
from ckptavg.display.tables import Cell, Column, Row, Table
from ckptavg.errors.printable import printable

# A contrast of 4.5 with white and with black.
BEST_COLOR = "#00875f"

_CELL = "padding: 2px 8px; white-space: nowrap; text-align:"
# Some pages set a color for tables that does not suit the background.
_AS_AROUND = "color: inherit; font: inherit"


def table_html(table: Table) -> str:
    """Draw a table as HTML that is readable on light and dark pages.

    Nothing is left out or shortened. The best rows are marked by a star, the best cells by a color.
    Significant cells are bold.
    """
    lines = ['<div style="overflow-x: auto">', f'<table style="{_AS_AROUND}">']
    if table.title:
        lines.append(f'<caption style="text-align: left">{_text(table.title)}</caption>')
    heads = ""
    for column in table.columns:
        heads += f'<th style="{_style(column)}">{_text(column.title)}</th>'
    lines += ["<thead>", f"<tr>{heads}</tr>", "</thead>", "<tbody>"]
    for row in table.rows:
        lines.append(f"<tr>{_cells(row, table.columns)}</tr>")
    lines += ["</tbody>", "</table>"]
    legend = list(table.legend)
    if table.significance:
        legend.append(table.significance)
    if legend:
        lines.append(f"<p>{'<br>'.join(map(_text, legend))}</p>")
    return "\n".join([*lines, "</div>"])


def _cells(row: Row, columns: tuple[Column, ...]) -> str:
    """Draw the cells of a row, with a star in the first cell of a best row."""
    texts = list(map(_text, row.texts))
    if row.best:
        texts[0] = f"{BEST} {texts[0]}"
    parts = []
    for text, cell, column in zip(texts, row.cells, columns, strict=True):
        parts.append(f'<td style="{_style(column)}">{_mark_text(text, cell)}</td>')
    return "".join(parts)


def _mark_text(text: str, cell: Cell) -> str:
    """Draw a text in the style of the cell's mark."""
    if cell.mark == "best":
        return f'<b style="color: {BEST_COLOR}">{text}</b>'
    if cell.mark == "significant":
        return f"<b>{text}</b>"
    return text


def _style(column: Column) -> str:
    """Return the CSS style of the cells of a column."""
    if column.kind == "number":
        return f"{_CELL} right"
    return f"{_CELL} left"


def _text(text: str) -> str:
    """Escape a text for HTML."""
    # Made printable first: texts come out of untrusted files.
    return escape(printable(text))
