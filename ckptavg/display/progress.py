"""Progress of long work, shown by a bar, by tqdm or rich, or by a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

from ckptavg.errors import UsageError, short

PhaseProgress = Callable[[str, int, int], None]
"""Function called as ``progress(phase, done, total)``; total is 0 if unknown."""


class Bar(Protocol):
    """Bar of tqdm, or ``Progress`` of rich."""

    @property
    def update(self) -> Callable[..., object]:
        """Method that moves the bar."""


ProgressLike: TypeAlias = bool | Callable[..., object] | Bar | None
"""Type of every ``progress`` parameter.

None or False shows no progress, and True shows a bar. A bar of tqdm or the class of such a bar,
rich's ``Progress``, and a function ``progress(phase, done, total)`` are accepted, too. A function
of two parameters is called with ``(done, total)``."""

Unit = Literal["bytes", "samples"]


@contextmanager
def open_progress(progress: ProgressLike, unit: Unit) -> Iterator[PhaseProgress | None]:
    """Open a display of the progress of several phases.

    Args:
        progress: Any value of a ``progress`` parameter.
        unit: Unit of the counts.

    Yields:
        The function to call with phase, done and total; None if no progress is shown.

    Raises:
        UsageError: The value cannot show progress.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _rich_progress(unit) as bars:
            yield _RichPhases(bars)
    # By attributes, not by classes: neither tqdm nor rich has to be imported.
    elif hasattr(progress, "add_task"):
        yield _RichPhases(progress)
    elif isinstance(progress, type) and hasattr(progress, "update"):
        phases = _BarPerPhase(progress, unit)
        try:
            yield phases
        finally:
            phases.close()
    elif hasattr(progress, "update") and hasattr(progress, "n"):
        yield _OneBar(progress)
    else:
        yield _as_phase_progress(progress)


@contextmanager
def open_phase(
    progress: ProgressLike, phase: str, unit: Unit
) -> Iterator[Callable[[int, int], None] | None]:
    """Open a display of the progress of a single phase.

    Args:
        progress: Any value of a ``progress`` parameter.
        phase: Name of the phase.
        unit: Unit of the counts.

    Yields:
        The function to call with done and total; None if no progress is shown.

    Raises:
        UsageError: The value cannot show progress.
    """
    with open_progress(progress, unit) as opened:
        if opened is None:
            yield None
            return

        def report(done: int, total: int) -> None:
            """Report the progress of the phase."""
            opened(phase, done, total)

        yield report


def _as_phase_progress(progress: Any) -> PhaseProgress:
    """Adapt a function of two or three parameters to a function of three."""
    if not callable(progress):
        raise UsageError(
            "progress is expected to be True, a bar of tqdm or a function of (phase, done, total) "
            f"but got {short(progress)}"
        )
    try:
        signature = inspect.signature(progress)
    # Functions written in C have no signature.
    except (TypeError, ValueError):
        return progress  # type: ignore[no-any-return]
    if _takes(signature, 3):
        return progress  # type: ignore[no-any-return]
    if _takes(signature, 2):
        return lambda _, done, total: progress(done, total)
    raise UsageError(
        "a function for progress is expected to take (phase, done, total), or (done, total), "
        f"but takes {signature}"
    )


def _takes(signature: inspect.Signature, count: int) -> bool:
    """Return True if a function can be called with a number of positional arguments."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class _OneBar:
    """Single bar of tqdm that is reset for each phase."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._phase: str | None = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        bar = self._bar
        if phase != self._phase:
            self._phase = phase
            if hasattr(bar, "reset"):
                bar.reset(total or None)
            if hasattr(bar, "set_description"):
                bar.set_description(phase)
            # A reset without a total keeps the total of the phase before.
            bar.total = None
        if total:
            bar.total = total
        # Bars of tqdm take the difference, not the count.
        bar.update(done - bar.n)


class _BarPerPhase:
    """Bars of a class like tqdm, a separate bar per phase."""

    def __init__(self, make: Callable[..., Any], unit: Unit) -> None:
        self._make = make
        self._settings: dict[str, Any] = {"unit": unit}
        if unit == "bytes":
            self._settings = {"unit": "B", "unit_scale": True}
        self._bars: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._bars:
            self._bars[phase] = self._make(desc=phase, total=total or None, **self._settings)
        bar = self._bars[phase]
        bar.update(done - bar.n)

    def close(self) -> None:
        """Close the bars in the present state."""
        for bar in self._bars.values():
            bar.close()


class _RichPhases:
    """Tasks in a ``Progress`` of rich, a separate task per phase."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total or None)
        self._bars.update(self._tasks[phase], completed=done, total=total or None)


def _rich_progress(unit: Unit) -> Any:
    """Make a bar on stderr or in the cell of a notebook."""
    # Imported here: only callers that want a bar should wait for the import.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = {"bytes": DownloadColumn, "samples": MofNCompleteColumn}[unit]()
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
