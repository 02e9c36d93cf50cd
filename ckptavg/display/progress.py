"""Progress in whatever form a caller wants it: a bar, tqdm's or rich's, or a function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeAlias

from ckptavg.errors import UsageError, short

PhaseProgress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)``; total is 0 where it is not known."""


class Bar(Protocol):
    """A bar of tqdm, or rich's Progress."""

    @property
    def update(self) -> Callable[..., object]:
        """Move the bar."""


ProgressLike: TypeAlias = bool | Callable[..., object] | Bar | None
"""What every function takes as ``progress``: None or False for none, True for a bar, a bar of tqdm
or the class of it, rich's Progress, or a function ``progress(phase, done, total)``. A function that
has two parameters is called with ``(done, total)``."""

Unit = Literal["bytes", "samples"]


@contextmanager
def open_progress(progress: ProgressLike, unit: Unit) -> Iterator[PhaseProgress | None]:
    """Open what shows the progress of several phases; None where nothing does.

    Args:
        progress: As callers give it.
        unit: What is counted.

    Raises:
        UsageError: It is nothing that could show progress.
    """
    if progress is None or progress is False:
        yield None
    elif progress is True:
        with _rich_progress(unit) as bars:
            yield _RichPhases(bars)
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
    """Open what shows the progress of a single phase; gives ``told(done, total)``, or None."""
    with open_progress(progress, unit) as opened:
        if opened is None:
            yield None
            return

        def tell(done: int, total: int) -> None:
            opened(phase, done, total)

        yield tell


def _as_phase_progress(progress: Any) -> PhaseProgress:
    if not callable(progress):
        raise UsageError(
            "progress is expected to be True, a bar of tqdm or a function of (phase, done, total) "
            f"but got {short(progress)}"
        )
    try:
        signature = inspect.signature(progress)
    except (TypeError, ValueError):  # written in C
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
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


class _OneBar:
    """A bar of tqdm's that is set back for each phase."""

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
            bar.total = None
        if total:
            bar.total = total
        bar.update(done - bar.n)


class _BarPerPhase:
    """A bar of a class like tqdm for each phase."""

    def __init__(self, make: Callable[..., Any], unit: Unit) -> None:
        self._make = make
        self._settings = {"unit": "B", "unit_scale": True} if unit == "bytes" else {"unit": unit}
        self._bars: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._bars:
            self._bars[phase] = self._make(desc=phase, total=total or None, **self._settings)
        bar = self._bars[phase]
        bar.update(done - bar.n)

    def close(self) -> None:
        """Leave the bars as they are."""
        for bar in self._bars.values():
            bar.close()


class _RichPhases:
    """A task of rich's Progress for each phase."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total or None)
        self._bars.update(self._tasks[phase], completed=done, total=total or None)


def _rich_progress(unit: Unit) -> Any:
    """Make a bar on stderr, or in a notebook's cell."""
    from rich.console import Console  # noqa: PLC0415 - for those alone that want a bar
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    counts = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
