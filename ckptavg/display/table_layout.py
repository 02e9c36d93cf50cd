"""Layout of tables as lines of text that fit a width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from rich.cells import cell_len

from ckptavg.display.shortening import shorten_names, wrap_words
from ckptavg.display.tables import Cell, Column, Mark, Row, Table
from ckptavg.errors.printable import printable

Style = Literal["title", "head", "rule", "best", "significant"]
BEST = "*"  # before the best rows

_GAP = "  "
# Least width, in columns of a terminal, of a cell that may be shortened or wrapped.
_LEAST = 8


@dataclass(frozen=True)
class Piece:
    """Part of a line in a single style."""

    text: str
    style: Style | None = None


Line = tuple[Piece, ...]


def lay_out(table: Table, width: int | None, *, has_bold: bool = False) -> list[Line]:
    """Lay out a table in lines of styled text.

    If the width is short, columns are left out in the order of ``Column.leaves``, names are
    shortened in the middle, and prose continues on further lines. Numbers are never broken: if the
    remaining columns need more than the width, the lines are longer.

    Args:
        table: The content.
        width: Width in columns of a terminal; None for a whole table with lines of any length.
        has_bold: True if significant cells will be bold, which the legend then explains.

    Returns:
        The lines, each a tuple of pieces.
    """
    table = _make_printable(table)
    fitted, left_out = (table, []) if width is None else _leave_out(table, width)
    rooms = _rooms(fitted, width)
    lines: list[Line] = []
    if table.title:
        lines += [(Piece(text, "title"),) for text in wrap_note(table.title, width)]
    if table.columns:
        lines += _head(fitted, rooms)
        shown = _shorten(fitted, rooms)
        for row in shown.rows:
            lines += _row_lines(row, shown, rooms)
    below = list(table.legend)
    if has_bold and table.significance:
        below.append(table.significance)
    if left_out:
        below.append(f"not shown at this width: {', '.join(left_out)}")
    if table.rows and below:
        lines.append((Piece(""),))
    lines += [(Piece(text),) for line in below for text in wrap_note(line, width)]
    return lines


def table_text(table: Table, width: int | None = None) -> str:
    """Draw a table as plain text, without a newline at the end.

    Args:
        table: The content.
        width: Width in columns of a terminal; None for a whole table with lines of any length.
    """
    lines = ["".join(piece.text for piece in line) for line in lay_out(table, width)]
    return "\n".join(lines)


def wrap_note(text: str, width: int | None) -> list[str]:
    """Wrap a line of prose between words, with further lines indented by two columns."""
    if width is None:
        return [text]
    first = wrap_words(text, width)[0]
    remainder = text[len(first) + 1 :]
    further_lines = wrap_words(remainder, width - len(_GAP)) if remainder else []
    return [first, *(_GAP + line for line in further_lines)]


def _make_printable(table: Table) -> Table:
    """Make all texts of a table printable."""
    columns = [Column(printable(c.title), c.kind, c.leaves, c.shortens) for c in table.columns]
    rows = []
    for row in table.rows:
        cells = tuple(Cell(printable(cell.text), cell.mark) for cell in row.cells)
        rows.append(Row(cells, row.best))
    legend = tuple(map(printable, table.legend))
    return Table(printable(table.title), tuple(columns), tuple(rows), legend, table.significance)


def _leave_out(table: Table, width: int) -> tuple[Table, list[str]]:
    """Leave out columns, in the order of ``Column.leaves``, until the table fits a width.

    Returns:
        The remaining table, and the titles of the omitted columns from left to right.
    """
    remaining = dict(enumerate(table.columns))
    for i in sorted(remaining, key=lambda i: table.columns[i].leaves):
        column = table.columns[i]
        if not column.leaves:
            continue
        narrowed = table.without({*range(len(table.columns))} - {*remaining})
        if _needed(narrowed, column.shortens) <= width:
            break
        del remaining[i]
    positions = {*range(len(table.columns))} - {*remaining}
    return table.without(positions), [table.columns[i].title for i in sorted(positions)]


def _needed(table: Table, shortest: int) -> int:
    """Return the width of a table with names and prose cut to at most ``shortest`` columns."""
    total = _between(table)
    for column, natural in zip(table.columns, _naturals(table), strict=True):
        total += min(natural, shortest) if _is_flexible(column) else natural
    return total


def _between(table: Table) -> int:
    """Return the width of the gaps between the columns and of the margin for the mark."""
    mark = len(BEST) + 1 if table.has_best else 0
    return mark + len(_GAP) * (len(table.columns) - 1)


def _naturals(table: Table) -> list[int]:
    """Return the width of each column without shortening."""
    widths = []
    for i, column in enumerate(table.columns):
        widths.append(
            max(map(cell_len, (column.title, *(row.cells[i].text for row in table.rows))))
        )
    return widths


def _is_flexible(column: Column) -> bool:
    """Return True if the cells of a column may be shortened or wrapped."""
    return column.kind in ("name", "prose")


def _rooms(table: Table, width: int | None) -> list[int]:
    """Return the width of each column; flexible columns share the room that is left."""
    rooms = _naturals(table)
    if width is None:
        return rooms
    flexible = [i for i, column in enumerate(table.columns) if _is_flexible(column)]
    free_width = width - _between(table) - sum(rooms) + sum(rooms[i] for i in flexible)
    # The narrowest first: the room that they do not need goes to the wider columns.
    flexible.sort(key=lambda i: rooms[i])
    for count, i in zip(range(len(flexible), 0, -1), flexible, strict=True):
        rooms[i] = min(rooms[i], max(free_width // count, _LEAST))
        free_width -= rooms[i]
    return rooms


def _shorten(table: Table, rooms: Sequence[int]) -> Table:
    """Shorten the names of a table to the widths of the columns."""
    # By columns, not by cells: different names of a column must stay different.
    columns = []
    for i, (column, room) in enumerate(zip(table.columns, rooms, strict=True)):
        texts = [row.cells[i].text for row in table.rows]
        columns.append(shorten_names(texts, room) if column.kind == "name" else texts)
    rows = []
    for number, row in enumerate(table.rows):
        cells = [Cell(columns[i][number], cell.mark) for i, cell in enumerate(row.cells)]
        rows.append(Row(tuple(cells), row.best))
    return Table(table.title, table.columns, tuple(rows), table.legend, table.significance)


def _head(table: Table, rooms: Sequence[int]) -> list[Line]:
    """Set the titles of the columns and the rule below."""
    titles = []
    for column, room in zip(table.columns, rooms, strict=True):
        (title,) = shorten_names([column.title], room) if _is_flexible(column) else [column.title]
        titles.append(_set(title, column, room))
    margin = " " * (len(BEST) + 1) if table.has_best else ""
    text = (margin + _GAP.join(titles)).rstrip()
    rule = "─" * (_between(table) + sum(rooms))
    return [(Piece(text, "head"),), (Piece(rule, "rule"),)]


def _row_lines(row: Row, table: Table, rooms: Sequence[int]) -> list[Line]:
    """Set a row, in several lines if prose does not fit in a single line."""
    wrapped = []
    for cell, column, room in zip(row.cells, table.columns, rooms, strict=True):
        wrapped.append(_prose_lines(cell.text, room) if column.kind == "prose" else [cell.text])
    marks = [cell.mark for cell in row.cells]
    lines = []
    for number, texts in enumerate(zip_longest(*wrapped, fillvalue="")):
        parts = []
        for text, column, room in zip(texts, table.columns, rooms, strict=True):
            parts.append(_set(text, column, room))
        is_marked = row.best and not number
        mark = f"{BEST if is_marked else ' '} " if table.has_best else ""
        lines.append(_join(mark, parts, marks))
    return lines


def _prose_lines(text: str, room: int) -> list[str]:
    """Wrap a text, with words that are longer than a line shortened like names."""
    return shorten_names(wrap_words(text, room), room)


def _set(text: str, column: Column, room: int) -> str:
    """Pad a text to the width of a column: numbers flush right, other texts flush left."""
    blank = " " * (room - cell_len(text))
    return blank + text if column.kind == "number" else text + blank


def _join(margin: str, texts: Sequence[str], marks: Sequence[Mark | None]) -> Line:
    """Join the cells of a line without trailing blanks."""
    pieces = [Piece(margin, "best" if margin.strip() else None)] if margin else []
    last = max((i for i, text in enumerate(texts) if text.strip()), default=0)
    for i, (text, mark) in enumerate(zip(texts[: last + 1], marks, strict=False)):
        if i:
            pieces.append(Piece(_GAP))
        pieces.append(Piece(text.rstrip() if i == last else text, mark))
    return tuple(pieces)
