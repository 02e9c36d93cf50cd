"""How a command ends when it is told to: nothing half done stays, and what it says last is true."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from ckptavg.display import printable

_LAST = 3  # signals; this one is for a command that does not come to its end


class Terminated(KeyboardInterrupt):
    """SIGTERM, as launchers and schedulers send it: it ends a command just as Ctrl-C does."""


@contextmanager
def by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C unwind the stack, once: the next one does not disturb the cleaning.

    A third does what it always did. Signals that are ignored, or have a handler, keep that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    usual: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
    }
    owner, received = os.getpid(), 0

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as handlers are called
        nonlocal received
        received += 1
        if os.getpid() != owner or received >= _LAST:  # a child has a copy of the handlers
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        elif received == 1:
            raise kinds[signal.Signals(number)]

    ours = [number for number, handler in usual.items() if signal.getsignal(number) == handler]
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, usual[number])


@contextmanager
def by_interrupts(outputs: Sequence[str] | None) -> Iterator[None]:
    """Say in one line what a command that was told to end has left, and exit as shells expect.

    Args:
        outputs: What the command was to write; None where that is not known.
    """
    before = {path: _stamp(path) for path in outputs or ()}
    try:
        yield
    except KeyboardInterrupt as error:
        word, code = ("Terminated", 143) if isinstance(error, Terminated) else ("Interrupted", 130)
        text = f"{word}." if outputs is None else f"{word}: {_left(before)}."
        click.echo(printable(text), err=True)
        raise click.exceptions.Exit(code) from None


def _left(before: Mapping[str, object]) -> str:
    written = [path for path, stamp in before.items() if _stamp(path) != stamp]
    return f"{' and '.join(written)} had been written" if written else "nothing was written"


def _stamp(path: str) -> tuple[int, ...] | None:
    """What tells an output from the one before it; None if there is none."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns
