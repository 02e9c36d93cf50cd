"""Layout of tables as lines of text that fit a width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal

from rich.cells import cell_len

from ckptavg.display.shortening import shorten_names, wrap_words
from ckptavg.display.tables import Column, Mark, Row, Table
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

    def __str__(self) -> str:
        return self.text


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
    fitted, left_out = _leave_out(table, width)
    rooms = _rooms(fitted, width)
    lines: list[Line] = []
    if table.title:
        lines += _note_lines(table.title, width, "title")
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
    for line in below:
        lines += _note_lines(line, width)
    return lines


def _note_lines(text: str, width: int | None, style: Style | None = None) -> list[Line]:
    """Wrap prose into lines of a single piece."""
    return [(Piece(line, style),) for line in wrap_note(text, width)]


def table_text(table: Table, width: int | None = None) -> str:
    """Draw a table as plain text, without a newline at the end.

    Args:
        table: The content.
        width: Width in columns of a terminal; None for a whole table with lines of any length.
    """
    lines = []
    for line in lay_out(table, width):
        lines.append("".join(map(str, line)))
    return "\n".join(lines)


def wrap_note(text: str, width: int | None) -> list[str]:
    """Wrap a line of prose between words, with further lines indented by two columns."""
    if width is None:
        return [text]
    lines = [wrap_words(text, width)[0]]
    remainder = text[len(lines[0]) + 1 :]
    if remainder:
        lines += [_GAP + line for line in wrap_words(remainder, width - len(_GAP))]
    return lines


def _make_printable(table: Table) -> Table:
    """Make all texts of a table printable."""
    columns = [replace(column, title=printable(column.title)) for column in table.columns]
    rows = []
    for row in table.rows:
        rows.append(row.with_texts([printable(text) for text in row.texts]))
    legend = tuple(map(printable, table.legend))
    return Table(printable(table.title), tuple(columns), tuple(rows), legend, table.significance)


def _leave_out(table: Table, width: int | None) -> tuple[Table, list[str]]:
    """Leave out columns, in the order of ``Column.leaves``, until the table fits a width.

    Returns:
        The remaining table, and the titles of the omitted columns from left to right, each once.
    """
    if width is None:
        return table, []
    omitted: set[int] = set()
    for i, column in sorted(enumerate(table.columns), key=lambda pair: pair[1].leaves):
        if not column.leaves:
            continue
        if _needed(table.without(omitted), column.shortens) <= width:
            break
        omitted.add(i)
    titles = dict.fromkeys(table.columns[i].title for i in sorted(omitted))
    return table.without(omitted), list(titles)


def _needed(table: Table, shortest: int) -> int:
    """Return the width of a table with names and prose cut to at most ``shortest`` columns."""
    total = _between(table)
    for column, natural in zip(table.columns, _naturals(table), strict=True):
        if _is_flexible(column):
            total += min(natural, shortest)
        else:
            total += natural
    return total


def _between(table: Table) -> int:
    """Return the width of the gaps between the columns and of the margin for the mark."""
    return len(_margin(table)) + len(_GAP) * (len(table.columns) - 1)


def _margin(table: Table) -> str:
    """Return the blanks before a row that is not the best; empty if no row is marked."""
    if not table.has_best:
        return ""
    return " " * (len(BEST) + 1)


def _naturals(table: Table) -> list[int]:
    """Return the width of each column without shortening."""
    widths = [cell_len(column.title) for column in table.columns]
    for row in table.rows:
        for i, cell in enumerate(row.cells):
            widths[i] = max(widths[i], cell_len(cell.text))
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
        texts = [row.texts[i] for row in table.rows]
        if column.kind == "name":
            texts = shorten_names(texts, room)
        columns.append(texts)
    rows = []
    for row, *texts in zip(table.rows, *columns, strict=True):
        rows.append(row.with_texts(texts))
    return Table(table.title, table.columns, tuple(rows), table.legend, table.significance)


def _head(table: Table, rooms: Sequence[int]) -> list[Line]:
    """Set the titles of the columns and the rule below."""
    titles = []
    for column, room in zip(table.columns, rooms, strict=True):
        title = column.title
        if _is_flexible(column):
            (title,) = shorten_names([title], room)
        titles.append(_set(title, column, room))
    text = (_margin(table) + _GAP.join(titles)).rstrip()
    rule = "─" * (_between(table) + sum(rooms))
    return [(Piece(text, "head"),), (Piece(rule, "rule"),)]


def _row_lines(row: Row, table: Table, rooms: Sequence[int]) -> list[Line]:
    """Set a row, in several lines if prose does not fit in a single line."""
    wrapped = []
    for cell, column, room in zip(row.cells, table.columns, rooms, strict=True):
        wrapped.append(_cell_lines(cell.text, column, room))
    marks = [cell.mark for cell in row.cells]
    lines = []
    for number, texts in enumerate(zip_longest(*wrapped, fillvalue="")):
        parts = []
        for text, column, room in zip(texts, table.columns, rooms, strict=True):
            parts.append(_set(text, column, room))
        margin = _margin(table)
        if row.best and not number:
            margin = f"{BEST} "
        lines.append(_join(margin, parts, marks))
    return lines


def _cell_lines(text: str, column: Column, room: int) -> list[str]:
    """Wrap prose, with words that are longer than a line shortened like names."""
    if column.kind != "prose":
        return [text]
    return shorten_names(wrap_words(text, room), room)


def _set(text: str, column: Column, room: int) -> str:
    """Pad a text to the width of a column: numbers flush right, other texts flush left."""
    blank = " " * (room - cell_len(text))
    if column.kind == "number":
        return blank + text
    return text + blank


def _join(margin: str, texts: Sequence[str], marks: Sequence[Mark | None]) -> Line:
    """Join the cells of a line without trailing blanks."""
    pieces: list[Piece] = []
    if margin.strip():
        pieces.append(Piece(margin, "best"))
    elif margin:
        pieces.append(Piece(margin))
    shown = list(zip(texts, marks, strict=False))
    while len(shown) > 1 and not shown[-1][0].strip():
        shown.pop()
    for text, mark in shown[:-1]:
        pieces += [Piece(text, mark), Piece(_GAP)]
    for text, mark in shown[-1:]:
        pieces.append(Piece(text.rstrip(), mark))
    return tuple(pieces)
