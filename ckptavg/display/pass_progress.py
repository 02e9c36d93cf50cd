"""Progress over all passes that score points, and the time that they take."""

from __future__ import annotations

from ckptavg.display.progress import PhaseProgress

_MINUTE, _HOUR = 60, 3600


class PassProgress:
    """Progress of a phase over all passes, in samples times points.

    Args:
        progress: The display.
        points: Number of points of all passes.
    """

    def __init__(self, progress: PhaseProgress, points: int) -> None:
        self._progress = progress
        self._points = points
        self._done, self._size = 0, 0

    def begin(self, done: int, size: int) -> None:
        """Begin a pass.

        Args:
            done: Number of points of all passes before.
            size: Number of points of this pass.
        """
        self._done, self._size = done, size

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show the progress of a phase.

        Args:
            phase: Name of the phase.
            done: Samples of this pass.
            total: Samples per pass; 0 where unknown.
        """
        if not total:
            self._progress(phase, done * self._size, 0)
            return
        self._progress(phase, total * self._done + done * self._size, total * self._points)


def duration_text(seconds: float) -> str:
    """Format a duration in words, to the precision of an estimate."""
    for unit, name in ((_HOUR, "hour"), (_MINUTE, "minute"), (1, "second")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.0f} {name}s"
    return "a second"
