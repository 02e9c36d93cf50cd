"""Tables, JSON and progress: the only room that draws."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
from rich.text import Text
from rich.theme import Theme

from ckptavg.cli.lasting_stream import LastingStream
from ckptavg.cli.wording import for_shell
from ckptavg.display.json_text import json_text
from ckptavg.display.table_layout import Line, lay_out, wrap_note
from ckptavg.display.tables import NOTHING, Column, Kind, Table, rows_of_texts
from ckptavg.errors.printable import printable, step_text, three_digits

_NUMBER = re.compile(r"–||-?\d[\d.,e+-]*( [kMGT]?B)?|-?inf|nan")
_PROSE = 24  # characters of a cell that may go on in further lines, if it has several words
# Both read on white and on black: these have a contrast of 4 or more with either ...
_MANY_COLORS = {"best": "bold color(29)", "note": "color(31)", "warning": "color(130)"}
# ... and these are what 16 colors have to offer, whichever shades a terminal makes of them.
_FEW_COLORS = {"best": "bold magenta", "note": "magenta", "warning": "red"}
_WEIGHTS = {"title": "bold", "head": "bold", "significant": "bold"}
_OF_PROGRESS = {"download": "best", "remaining": "note", "data.speed": "warning"}
# What an encoding such as ASCII has instead of the characters of a table.
_PLAIN = str.maketrans("─…–Δ", "-~-d")


class Report:
    """Output of a command: the result on stdout, notes and progress on stderr.

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
        """Show the library's log records while the command runs."""
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
        self, columns: Sequence[str | Column], rows: Sequence[Sequence[str]], *, title: str = ""
    ) -> None:
        """Print a table on stdout, numbers flush right. Nothing with ``as_json``.

        Args:
            columns: Titles, or columns; the kind of a title's column follows from the cells.
            rows: Texts of the cells.
            title: Text above the table.
        """
        self.draw(Table(title, _columns(columns, rows), rows_of_texts(rows)))

    def draw(self, table: Table) -> None:
        """Print a table on stdout, as wide as the terminal. Nothing with ``as_json``."""
        if self.as_json:
            return
        has_bold = self._out.color_system is not None
        for line in lay_out(table, _width(self._out), has_bold=has_bold):
            self._out.print(self._styled(line), soft_wrap=True)
        self.line("")

    def _styled(self, line: Line) -> Text:
        styles = _styles(self._out)
        replaced: dict[int, int] = {}
        if not _has_unicode(self._out):
            replaced = _PLAIN
        text = Text()
        for piece in line:
            text.append(piece.text.translate(replaced), styles.get(piece.style or "", ""))
        return text

    def line(self, text: str) -> None:
        """Print a line on stdout. Nothing with ``as_json``."""
        if self.as_json:
            return
        for line in wrap_note(printable(for_shell(text)), _width(self._out)):
            self._out.print(Text(line), soft_wrap=True)

    def remark(self, text: str) -> None:
        """Print a line on stderr, even with ``--quiet``."""
        for line in wrap_note(printable(for_shell(text)), _width(self._err)):
            self._err.print(Text(line), soft_wrap=True)

    def result(self, value: Any) -> None:
        """Print the result as JSON on stdout, with ``as_json``."""
        if self.as_json:
            self._out.file.write(json_text(value, ascii_only=not _has_unicode(self._out)))
            self._out.file.flush()

    @contextmanager
    def bytes_progress(self, what: str) -> Iterator[Any]:
        """Draw a bar of bytes, rate and time left, and yield the callback that moves the bar."""
        columns = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with self._bar(*columns) as move:
            yield lambda done, total: move(what, done, total)

    @contextmanager
    def samples_progress(self) -> Iterator[Any]:
        """Draw a bar of samples, rate and time left per phase, and yield the callback."""
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
            """Move the bar of a phase.

            Args:
                phase: Name of the phase.
                done: Bytes or samples so far.
                total: Bytes or samples in all; 0 if unknown.
            """
            if phase not in tasks:
                tasks[phase] = bar.add_task(escape(printable(phase)), total=total or None)
            bar.update(tasks[phase], completed=done, total=total or None)

        with bar:
            yield move


def rate_text(speed: float) -> str:
    """Format a rate in samples per second."""
    return f"{three_digits(speed)} samples/s"


def count_text(count: int, noun: str) -> str:
    """Format a count and a noun."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def number_text(value: float | None) -> str:
    """Format a recorded number: whole numbers in full, a dash for None."""
    if value is None:
        return NOTHING
    return step_text(value)


def _is_number(cell: str) -> bool:
    return bool(_NUMBER.fullmatch(cell))


def _columns(titles: Sequence[str | Column], rows: Sequence[Sequence[str]]) -> tuple[Column, ...]:
    """Make columns of titles, each of the kind of the cells."""
    columns = []
    for i, title in enumerate(titles):
        if isinstance(title, Column):
            columns.append(title)
            continue
        cells = [row[i] for row in rows]
        columns.append(Column(title, _kind_of(cells, is_first=i == 0)))
    return tuple(columns)


def _kind_of(cells: Sequence[str], *, is_first: bool) -> Kind:
    """Return the kind of a column by the texts of the cells."""
    if cells and all(map(_is_number, cells)):
        return "number"
    if is_first:
        return "name"
    if any(map(_is_prose, cells)):
        return "prose"
    return "text"


def _is_prose(cell: str) -> bool:
    return len(cell) > _PROSE and " " in cell


def _width(console: Console) -> int | None:
    """Return the width of a terminal; None where lines may be of any length."""
    if not console.is_terminal:
        return None
    return console.width


def _has_unicode(console: Console) -> bool:
    return (console.encoding or "utf-8").startswith("utf")


def _styles(console: Console) -> dict[str, str]:
    """Return the styles of marked cells, as far as the terminal has colors."""
    if console.color_system in (None, "standard", "windows"):
        return _WEIGHTS | _FEW_COLORS
    return _WEIGHTS | _MANY_COLORS


def _console(stream: Any) -> Console:
    console = Console(file=stream, highlight=False)
    if stream.isatty():
        styles = _styles(console)
        theme = Theme({f"progress.{name}": styles[word] for name, word in _OF_PROGRESS.items()})
        return Console(file=stream, highlight=False, theme=theme)
    # Forced colors (FORCE_COLOR) make a terminal of a pipe, which has no width and no progress.
    colors: Any = console.color_system
    return Console(file=stream, highlight=False, force_terminal=False, color_system=colors)


class _NoteHandler(logging.Handler):
    """Prints the library's notes, each once."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        word = "note"
        if record.levelno >= logging.WARNING:
            word = "warning"
        message = f"{word}: {for_shell(record.getMessage())}"
        if message in self._shown:
            return
        self._shown.add(message)
        first, *further_lines = wrap_note(message, _width(self._console))
        text = Text.assemble(
            (f"{word}:", _styles(self._console)[word]), first.removeprefix(f"{word}:")
        )
        self._console.print(text, soft_wrap=True)
        for line in further_lines:
            self._console.print(Text(line), soft_wrap=True)


class _Rate(ProgressColumn):
    """Samples per second."""

    def render(self, task: Task) -> Text:
        """Draw the rate of a task; nothing before the rate is known."""
        if not task.speed:
            return Text()
        return Text(rate_text(task.speed))
