"""Logger of the library, whose records can also be collected as notes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ckptavg.errors.printable import printable

_collected: ContextVar[tuple[list[str], ...]] = ContextVar("collected", default=())


class _NotesLogger(logging.Logger):
    """Logger whose notes can be collected at any level that the application has set."""

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's own name
        """Return True if a record of this level is handled or collected."""
        return super().isEnabledFor(level) or (level >= logging.INFO and bool(_collected.get()))

    def handle(self, record: logging.LogRecord) -> None:
        """Collect the text of a record, and handle the record if its level is enabled."""
        if record.levelno >= logging.INFO:
            text = printable(record.getMessage())
            # Collections may be nested: a note goes to the outer as well as to the inner.
            for notes in _collected.get():
                if text not in notes:
                    notes.append(text)
        if super().isEnabledFor(record.levelno):
            super().handle(record)


class PrintableRecords(logging.Filter):
    """Filter that makes messages printable before any handler gets the record."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replace the message and the arguments of a record by the printable text."""
        record.msg, record.args = printable(record.getMessage()), None
        return True


log = logging.getLogger("ckptavg")
# The application may have made the logger already, to set its level: change its class in place.
log.__class__ = _NotesLogger
# Without a handler, Python would print warnings of a library to stderr.
log.addHandler(logging.NullHandler())
log.addFilter(PrintableRecords())


@contextmanager
def collect_notes() -> Iterator[list[str]]:
    """Collect the notes and warnings of this thread, each text once.

    The levels of loggers do not change.
    """
    notes: list[str] = []
    token = _collected.set((*_collected.get(), notes))
    try:
        yield notes
    finally:
        _collected.reset(token)
