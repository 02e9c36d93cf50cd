"""The logger of the library's notes, whose records any handler may show."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ckptavg.errors.printable import printable

_collected: ContextVar[tuple[list[str], ...]] = ContextVar("collected", default=())


class _NotesLogger(logging.Logger):
    """Logger whose notes may be collected, whatever level anybody has set."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's own name
        """Tell whether a record of this level goes anywhere."""
        return super().isEnabledFor(level) or (level >= logging.INFO and bool(_collected.get()))

    def handle(self, record: logging.LogRecord) -> None:
        """Add a record's text to the collected notes, and hand it on if its level is wanted."""
        if record.levelno >= logging.INFO:
            text = printable(record.getMessage())
            for notes in _collected.get():
                if text not in notes:
                    notes.append(text)
        if super().isEnabledFor(record.levelno):
            super().handle(record)


class PrintableRecords(logging.Filter):
    """Makes messages printable, whoever's handler gets them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Put the finished message in the place of the record's own."""
        record.msg, record.args = printable(record.getMessage()), None
        return True


log = logging.getLogger("ckptavg")
# The application may have made the logger already, to set its level.
log.__class__ = _NotesLogger
log.addHandler(logging.NullHandler())
log.addFilter(PrintableRecords())


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect what this thread notes and warns of, each text once; loggers' levels stay."""
    notes: list[str] = []
    token = _collected.set((*_collected.get(), notes))
    try:
        yield notes
    finally:
        _collected.reset(token)
