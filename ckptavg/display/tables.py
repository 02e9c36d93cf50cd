"""Content of tables, independent of drawing: columns, rows and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")
NOTHING = "–"  # a cell without a value

Mark = Literal["best", "significant"]
Kind = Literal["name", "text", "number", "prose"]


@dataclass(frozen=True)
class Column:
    """Title of a column and layout of the cells.

    Attributes:
        title: Text above the column.
        kind: Kind of the cells. A ``name`` may be shortened if it stays different from the other
            names of the column. ``text`` and ``number`` stay whole, numbers flush right. ``prose``
            may continue on further lines.
        leaves: Turn of the column to be left out if the width is short, from 1; 0 to stay.
        shortens: Width to which names and prose are shortened before the column is left out.
    """

    title: str
    kind: Kind = "text"
    leaves: int = 0
    shortens: int = 24


@dataclass(frozen=True)
class Cell:
    """Text of a cell with an optional mark."""

    text: str
    mark: Mark | None = None


@dataclass(frozen=True)
class Row:
    """Cells of a row, one per column; ``best`` marks a best row of the table."""

    cells: tuple[Cell, ...]
    best: bool = False

    @property
    def texts(self) -> list[str]:
        """Texts of the cells."""
        return [cell.text for cell in self.cells]

    def with_texts(self, texts: Sequence[str]) -> Row:
        """Return the row with other texts and the same marks."""
        cells = []
        for cell, text in zip(self.cells, texts, strict=True):
            cells.append(Cell(text, cell.mark))
        return Row(tuple(cells), self.best)


@dataclass(frozen=True)
class Table:
    """Content of a table.

    Attributes:
        title: Text above the table.
        columns: Columns from left to right.
        rows: Rows from top to bottom.
        legend: Lines below the table.
        significance: Line below the table that explains that cells marked ``significant`` are bold;
            shown only if type can be bold.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    legend: tuple[str, ...] = ()
    significance: str = ""

    @property
    def has_best(self) -> bool:
        """True if any row is marked as the best."""
        return any(row.best for row in self.rows)

    def without(self, positions: set[int]) -> Table:
        """Return the table without the columns at some positions, counted from 0."""
        columns = tuple(_leave_out(self.columns, positions))
        rows: list[Row] = []
        for row in self.rows:
            rows.append(Row(tuple(_leave_out(row.cells, positions)), row.best))
        return Table(self.title, columns, tuple(rows), self.legend, self.significance)


def _leave_out(items: Sequence[T], positions: set[int]) -> list[T]:
    """Return a sequence without the items at some positions."""
    return [item for i, item in enumerate(items) if i not in positions]


def rows_of_texts(rows: Sequence[Sequence[str]]) -> tuple[Row, ...]:
    """Make rows of cells without marks."""
    return tuple(Row(tuple(map(Cell, row))) for row in rows)
