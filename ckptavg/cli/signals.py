"""Ends of commands by SIGTERM and Ctrl-C: no partial output, and a line that says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from ckptavg.errors import PeerError
from ckptavg.errors.printable import printable

_LAST = 3  # signals; this one is for a command that does not come to its end
_BY_SIGNAL = 128  # and the signal's number: the exit code that shells give


class Terminated(KeyboardInterrupt):
    """SIGTERM of launchers and schedulers, which ends a command as Ctrl-C does."""


class Signals:
    """Handlers by which SIGTERM and Ctrl-C unwind the stack, once.

    The next signal does not disturb the cleaning; a third does what it always did.

    Attributes:
        first: The signal that came first; None as long as none has.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self._count = 0
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as called
        """Take a signal.

        Raises:
            KeyboardInterrupt: It is the first.
        """
        self._count += 1
        if os.getpid() != self._process or self._count >= _LAST:  # a child has a copy of handlers
            signal.signal(number, _DEFAULT_HANDLERS[number])
            signal.raise_signal(number)
        elif self._count == 1:
            self.first = signal.Signals(number)
            raise _EXCEPTIONS[self.first]


_WORDS = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Terminated"}
_EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
_DEFAULT_HANDLERS: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


@contextmanager
def unwind_on_signals() -> Iterator[Signals]:
    """Handle SIGTERM and Ctrl-C by ``Signals``, unless handlers are installed already.

    A signal that is ignored, or has another handler, is left as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Signals()
        return
    handlers = {number: signal.getsignal(number) for number in _DEFAULT_HANDLERS}
    for handler in handlers.values():
        outer = getattr(handler, "__self__", None)
        if isinstance(outer, Signals):
            yield outer
            return
    signals = Signals()
    ours = [number for number, handler in handlers.items() if handler == _DEFAULT_HANDLERS[number]]
    try:
        for number in ours:
            signal.signal(number, signals.handle)
        yield signals
    finally:
        for number in ours:
            signal.signal(number, _DEFAULT_HANDLERS[number])


@contextmanager
def report_interrupt(
    outputs: Sequence[str] | None, signals: Signals | None = None
) -> Iterator[None]:
    """Report an interrupted command's outputs in one line, and exit as shells expect.

    Args:
        outputs: Paths that the command was to write; None where unknown.
        signals: The signals that came: other code may swallow or replace an interrupt.
    """
    before = {path: _stamp(path) for path in outputs or ()}
    number: signal.Signals | None = None
    try:
        yield
    except Terminated:
        number = signal.SIGTERM
    except KeyboardInterrupt:
        number = signal.SIGINT
    except Exception as error:
        # The death of another process tells more than the signal that its launcher sends for it.
        if signals is None or signals.first is None or isinstance(error.__cause__, PeerError):
            raise
        number = signals.first
    else:
        if signals is not None:
            number = signals.first
    if number is None:
        return
    text = _WORDS[number]
    if outputs is not None:
        text += f": {_describe_written(before)}"
    click.echo(printable(f"{text}."), err=True)
    raise click.exceptions.Exit(_BY_SIGNAL + number) from None


def _describe_written(before: Mapping[str, object]) -> str:
    """Name the outputs that have changed since their stamps were taken."""
    written = [path for path, stamp in before.items() if _stamp(path) != stamp]
    if not written:
        return "nothing was written"
    return f"{' and '.join(written)} had been written"


def _stamp(path: str) -> tuple[int, ...] | None:
    """Return the identity of an output's file; None without a file."""
    try:
        info = os.stat(os.path.realpath(path))
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns
