"""How a command ends when it is told to: nothing half done stays, and what it says last is true."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

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
def by_interrupts(outputs: list[str]) -> Iterator[None]:
    """Say in one line what a command that was told to end has left, and exit as shells expect.

    Args:
        outputs: What the command was to write.
    """
    before = {path: _stamp(path) for path in outputs}
    try:
        yield
    except KeyboardInterrupt as error:
        told = isinstance(error, Terminated)
        written = [path for path in outputs if _stamp(path) != before[path]]
        state = f"{' and '.join(written)} had been written" if written else "nothing was written"
        click.echo(f"{'Terminated' if told else 'Interrupted'}: {state}.", err=True)
        raise click.exceptions.Exit(143 if told else 130) from None


def _stamp(path: str) -> tuple[int, ...] | None:
    """What tells an output from the one before it; None if there is none."""
    try:
        info = os.lstat(path)
    except (OSError, ValueError):
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns
