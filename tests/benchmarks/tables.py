"""Figures with their goals, and the tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Something measured in every round.

    Attributes:
        values: One a round.
        unit: What follows the number.
        goal: The median should be no more; None where there is none.
        least: Whether it should be no less instead.
    """

    values: Sequence[float]
    unit: str = "×"
    goal: float | None = None
    least: bool = False

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the goal is; None where there is none."""
        if self.goal is None:
            return None
        return self.median >= self.goal if self.least else self.median <= self.goal

    def text(self) -> str:
        """The median with the spread: from the least to the most."""
        low, high = _number(min(self.values)), _number(max(self.values))
        spread = f" ({low}–{high})" if len(self.values) > 1 else ""
        return f"{_number(self.median)} {self.unit}{spread}"

    def goal_text(self) -> str:
        """The goal, and whether it is missed."""
        if self.goal is None:
            return ""
        sign = "≥" if self.least else "≤"
        return f"{sign} {_number(self.goal)} {self.unit}{'' if self.met else ', missed'}"

    def as_json(self) -> dict[str, Any]:
        """Everything there is to know."""
        return {
            "values": list(self.values), "median": self.median, "min": min(self.values),
            "max": max(self.values), "unit": self.unit, "goal": self.goal, "least": self.least,
            "met": self.met,
        }  # fmt: skip


Cells = dict[str, "Figure | str"]


@dataclass(frozen=True)
class Table:
    """Rows of figures.

    Attributes:
        title: What was measured, on how much.
        rows: Name → column → a figure, or text in the place of one.
    """

    title: str
    rows: dict[str, Cells]

    def columns(self) -> list[str]:
        """The columns that any row has, in order."""
        return list(dict.fromkeys(column for cells in self.rows.values() for column in cells))

    def texts(self) -> list[list[str]]:
        """The header and the rows; a figure with a goal has it in the last column."""
        columns = self.columns()
        goals = {name: _goals(cells) for name, cells in self.rows.items()}
        last = ["goal"] if any(goals.values()) else []
        lines = [[self.title, *columns, *last]]
        for name, cells in self.rows.items():
            texts = [_text(cells.get(column, "")) for column in columns]
            lines.append([name, *texts, *([goals[name]] if last else [])])
        return lines

    def as_json(self) -> dict[str, Any]:
        """Everything there is to know."""
        return {
            "title": self.title,
            "rows": {
                name: {column: _json(cell) for column, cell in cells.items()}
                for name, cells in self.rows.items()
            },
        }


def markdown(tables: Sequence[Table]) -> str:
    """The tables as Markdown."""
    parts = []
    for table in tables:
        header, *rows = table.texts()
        lines = [header, ["---"] * len(header), *rows]
        parts.append("\n".join(map(_markdown_row, lines)))
    return "\n\n".join(parts)


def _markdown_row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def plain(tables: Sequence[Table]) -> str:
    """The tables with their columns aligned."""
    parts = []
    for table in tables:
        lines = table.texts()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        parts.append("\n".join([rows[0], "─" * len(rows[0]), *rows[1:]]))
    return "\n\n".join(parts)


def _goals(cells: Cells) -> str:
    figures = [cell for cell in cells.values() if isinstance(cell, Figure)]
    return ", ".join(filter(None, (figure.goal_text() for figure in figures)))


def _text(cell: Figure | str) -> str:
    return cell if isinstance(cell, str) else cell.text()


def _json(cell: Figure | str) -> Any:
    return cell if isinstance(cell, str) else cell.as_json()


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
