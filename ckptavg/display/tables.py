"""Tables before anything draws them: columns, rows and marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

NOTHING = "–"  # a cell without a value

Mark = Literal["best", "significant"]
Kind = Literal["name", "text", "number", "prose"]


@dataclass(frozen=True)
class Column:
    """A column's title and how its cells are set.

    Attributes:
        title: Stands above it.
        kind: ``name``: told apart from the others of the column, may be shortened; ``text`` and
            ``number``: stays whole, numbers flush right; ``prose``: may go on in further lines.
        leaves: The column's turn to be left out where the width is short, from 1; 0 to stay.
        shortens: The width that names are shortened to before the column is left out.
    """

    title: str
    kind: Kind = "text"
    leaves: int = 0
    shortens: int = 24


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it stands out."""

    text: str
    mark: Mark | None = None


@dataclass(frozen=True)
class Row:
    """A row's cells, one per column; ``best`` if it is the best of the table."""

    cells: tuple[Cell, ...]
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table's content.

    Attributes:
        title: Stands above it.
        columns: From left to right.
        rows: From top to bottom.
        legend: Lines below it.
        significance: Line below it that says of the cells marked ``significant`` that they are
            bold; for where type can be bold.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    legend: tuple[str, ...] = ()
    significance: str = ""

    @property
    def has_best(self) -> bool:
        """True if a row is marked as the best."""
        return any(row.best for row in self.rows)

    def without(self, positions: set[int]) -> Table:
        """Leave out the columns at some positions."""
        kept = [i for i in range(len(self.columns)) if i not in positions]
        rows = [Row(tuple(row.cells[i] for i in kept), row.best) for row in self.rows]
        columns = tuple(self.columns[i] for i in kept)
        return Table(self.title, columns, tuple(rows), self.legend, self.significance)


def rows_of_texts(rows: Sequence[Sequence[str]]) -> tuple[Row, ...]:
    """Make rows of cells without marks."""
    return tuple(Row(tuple(map(Cell, row))) for row in rows)
