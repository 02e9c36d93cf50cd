"""Lines of a curve: single checkpoints, and averages of those up to each checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptavg.errors import UsageError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.landscape.curves.named_runs import NamedRun
from ckptavg.landscape.points import PointLike
from ckptavg.landscape.store import Key
from ckptavg.runs.run import Run

CHECKPOINTS, RUNNING = "checkpoints", "running average"

Coefficients = tuple[float, ...]


@dataclass(frozen=True)
class Stretch:
    """Consecutive checkpoints of a run, averaged uniformly: a point of a line.

    Attributes:
        series: Name of the line.
        run: The run.
        start: Position of the first checkpoint in the run.
        stop: Position after the last checkpoint.
    """

    series: str
    run: NamedRun
    start: int
    stop: int

    @property
    def last(self) -> int:
        """Position of the last checkpoint among those of all runs."""
        return self.run.start + self.stop - 1

    def coefficients(self, total: int) -> Coefficients:
        """Return the coefficients over all ``total`` checkpoints of the figure."""
        count = self.stop - self.start
        before = self.run.start + self.start
        after = total - before - count
        return (0.0,) * before + (1 / count,) * count + (0.0,) * after

    def candidate(self, *, recompute: bool) -> Candidate:
        """Return what is scored: a checkpoint as it is, or an average of the checkpoints.

        Args:
            recompute: True to recompute the average's statistics if they are stale.
        """
        part = self.run.run[self.start : self.stop]
        if len(part) == 1:
            return Candidate.of_checkpoint(part[0], recompute=False)
        return average_of(part, recompute=recompute)


def average_of(part: Run, *, recompute: bool) -> Candidate:
    """Return the uniform average of checkpoints.

    Args:
        part: At least two checkpoints.
        recompute: True to recompute the statistics if they are stale.
    """
    candidate = Candidate.of_average(part)
    planned = candidate.average
    if planned is None or planned.batchnorm in ("none", "frozen"):
        return candidate
    return replace(candidate, recompute=recompute)


def list_stretches(runs: Sequence[NamedRun], window: int | None) -> list[Stretch]:
    """List the points of all lines, line after line.

    The running average at a checkpoint is that of all checkpoints so far (Izmailov et al. 2018,
    Algorithm 1): the selection decides with which checkpoint the average begins.

    Args:
        runs: The runs.
        window: Number of checkpoints of the sliding average; None for no such line.
    """
    stretches: list[Stretch] = []
    for run in runs:
        counts = range(1, len(run) + 1)
        name = series_name(runs, run, CHECKPOINTS)
        stretches += [Stretch(name, run, stop - 1, stop) for stop in counts]
        name = series_name(runs, run, RUNNING)
        stretches += [Stretch(name, run, 0, stop) for stop in counts]
        if window is not None:
            name = series_name(runs, run, window_name(window))
            stretches += [Stretch(name, run, stop - window, stop) for stop in counts[window - 1 :]]
    return stretches


def series_name(runs: Sequence[NamedRun], run: NamedRun, line: str) -> str:
    """Name a line: with the run, where there are several.

    Args:
        runs: The runs.
        run: Run that the line is of.
        line: Name of the line within its run.
    """
    if len(runs) == 1:
        return line
    return f"{run.name}: {line}"


def lines_of(runs: Sequence[NamedRun], window: int | None, *, scored: bool) -> list[dict[str, str]]:
    """List the lines of a figure as facts: the name of the series, of the run and of the line.

    Args:
        runs: The runs.
        window: Number of checkpoints of the sliding average; None for no such line.
        scored: True if averages are scored, and not only checkpoints.
    """
    names = [CHECKPOINTS]
    if scored:
        names.append(RUNNING)
    if window is not None:
        names.append(window_name(window))
    lines: list[dict[str, str]] = []
    for run in runs:
        for name in names:
            lines.append({"series": series_name(runs, run, name), "run": run.name, "line": name})
    return lines


def window_name(window: int) -> str:
    """Name the line of the sliding average."""
    return f"average of the last {window}"


def check_window(runs: Sequence[NamedRun], window: int | None) -> None:
    """Refuse runs that are too short for a curve, or for the sliding average.

    Raises:
        UsageError: A run has a single checkpoint, or fewer than the window.
    """
    for run in runs:
        if len(run) < 2:
            raise UsageError(
                f"a curve needs two checkpoints, and {run.name} has a single one",
                "Select more of them.",
            )
    if window is None:
        return
    if not isinstance(window, int) or isinstance(window, bool) or window < 2:
        raise UsageError(f"`window` is expected to be a number from 2 on but is {window!r}")
    for run in runs:
        if window > len(run):
            raise UsageError(
                f"`window={window}` is more than the {len(run)} checkpoints of {run.name}",
                "Choose a smaller one.",
            )


def candidates_by_coefficients(
    stretches: Sequence[Stretch], total: int, *, recompute: bool
) -> dict[Key, PointLike]:
    """Return what is scored, each average once, by coefficients over all checkpoints.

    Args:
        stretches: The points.
        total: Number of all checkpoints.
        recompute: True to recompute stale statistics of averages.
    """
    candidates: dict[Key, PointLike] = {}
    for stretch in stretches:
        key = stretch.coefficients(total)
        if key not in candidates:
            candidates[key] = stretch.candidate(recompute=recompute)
    return candidates
