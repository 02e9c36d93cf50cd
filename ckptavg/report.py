"""Tables, JSON and progress: the only room that draws."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ckptavg.display import printable, step_text
from ckptavg.json_text import json_text
from ckptavg.lasting_stream import LastingStream

_WIDE = 240  # columns where nothing is a terminal, so that no cell is folded
_NAME = 40  # characters of a name that is shown whole, whatever room that leaves to numbers
_COUNT = 1e3
_NUMBER = re.compile(r"–||-?\d[\d.,e+-]*( [kMGT]?B)?|-?inf|nan")


class Report:
    """What a command says: the result on stdout, notes and progress on stderr.

    Args:
        as_json: Print the result as JSON instead of tables.
        verbosity: Below 0 for no notes and no progress, above 0 for details.
        stdout: Where results go.
        stderr: Where notes and progress go.
    """

    def __init__(
        self,
        *,
        as_json: bool = False,
        verbosity: int = 0,
        stdout: Console | None = None,
        stderr: Console | None = None,
    ) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        self._out = stdout or _console(LastingStream(sys.stdout, essential=True))
        self._err = stderr or _console(LastingStream(sys.stderr, essential=False))

    @contextmanager
    def notes(self) -> Iterator[None]:
        """Show what the library logs for as long as the command runs."""
        logger, handler = logging.getLogger("ckptavg"), _NoteHandler(self._err)
        level, propagate = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.propagate = False
        names = {-1: logging.ERROR, 0: logging.INFO}
        logger.setLevel(names.get(max(min(self.verbosity, 1), -1), logging.DEBUG))
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate
            logger.setLevel(level)

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = ""
    ) -> None:
        """A table on stdout; columns of numbers are set flush right. Nothing with ``as_json``."""
        if self.as_json:
            return
        if title:
            self._out.print(Text(printable(title), "bold"), soft_wrap=True)
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for i, name in enumerate(columns):
            right = bool(rows) and all(_is_number(row[i]) for row in rows)
            whole = not i and max((len(row[0]) for row in rows), default=0) <= _NAME
            drawn.add_column(
                Text(printable(name)),
                justify="right" if right else "left",
                overflow="fold",
                no_wrap=whole,
            )
        for row in rows:
            drawn.add_row(*(Text(printable(cell)) for cell in row))
        self._out.print(drawn)
        self._out.print()

    def line(self, text: str) -> None:
        """A line on stdout. Nothing with ``as_json``."""
        if not self.as_json:
            self._out.print(Text(printable(text)), soft_wrap=True)

    def remark(self, text: str) -> None:
        """A line on stderr, however quiet the command is to be."""
        self._err.print(Text(printable(text)), soft_wrap=True)

    def result(self, value: Any) -> None:
        """The result as JSON on stdout, with ``as_json``."""
        if self.as_json:
            unicode = (self._out.encoding or "utf-8").startswith("utf")
            self._out.file.write(json_text(value, ascii_only=not unicode))
            self._out.file.flush()

    @contextmanager
    def bytes_progress(self, what: str) -> Iterator[Any]:
        """A bar of bytes, rate and time left; gives the callback that moves it."""
        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with self._bar(*columns) as move:
            yield lambda done, total: move(what, done, total)

    @contextmanager
    def samples_progress(self) -> Iterator[Any]:
        """A bar of samples, rate and time left for each phase; gives the callback."""
        with self._bar(MofNCompleteColumn(), _Rate(), TimeRemainingColumn()) as move:
            yield move

    @contextmanager
    def _bar(self, *columns: ProgressColumn) -> Iterator[Any]:
        shown = self._err.is_terminal and self.verbosity >= 0
        bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), *columns,
            console=self._err, disable=not shown, transient=True,
        )  # fmt: skip
        tasks: dict[str, Any] = {}

        def move(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(escape(printable(phase)), total=total or None)
            bar.update(tasks[phase], completed=done, total=total or None)

        with bar:
            yield move


def size_text(count: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if float(f"{count:.3g}") < _COUNT:
            return f"{count:.3g} {unit}"
        count /= _COUNT
    return f"{_three_digits(count)} TB"


def rate_text(speed: float) -> str:
    """Samples a second."""
    return f"{_three_digits(speed)} samples/s"


def _three_digits(value: float) -> str:
    """A positive number, to three digits but without an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= _COUNT else f"{rounded:.3g}"


def counted(count: int, thing: str) -> str:
    """A count and its noun."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def number_text(value: float | None) -> str:
    """A recorded number, short, but whole ones in full; a dash where there is none."""
    return "–" if value is None else step_text(value)


def _is_number(cell: str) -> bool:
    return bool(_NUMBER.fullmatch(cell))


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


class _NoteHandler(logging.Handler):
    """Prints the library's notes, one line each."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        serious = record.levelno >= logging.WARNING
        word, style = ("warning", "yellow") if serious else ("note", "cyan")
        text = Text.assemble((f"{word}: ", style), record.getMessage())
        self._console.print(text, soft_wrap=True)


class _Rate(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> Text:
        return Text(rate_text(task.speed) if task.speed else "")
