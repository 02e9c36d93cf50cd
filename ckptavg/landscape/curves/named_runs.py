"""Runs that share a figure, each under a name, on one axis of steps."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeAlias

from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location
from ckptavg.landscape.landscape import Landmark
from ckptavg.runs.damaged import raise_for
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.runs.selection_notes import note_run

log = logging.getLogger("ckptavg")

RunsLike: TypeAlias = "RunLike | Iterable[Run] | Mapping[str, RunLike]"
"""A run, several runs, or runs by name; a run of several trainings is several runs."""


@dataclass(frozen=True)
class NamedRun:
    """Checkpoints of a training, under a name.

    Attributes:
        name: Name in the figure.
        run: The selected checkpoints, all of one training.
        start: Position of the first checkpoint among those of all runs in the figure.
    """

    name: str
    run: Run
    start: int

    def __len__(self) -> int:
        return len(self.run)


def name_runs(runs: RunsLike) -> tuple[NamedRun, ...]:
    """Open runs, and name each by its directory unless it comes with a name.

    Raises:
        UsageError: A name stands for several trainings, or there is no run.
        CkptavgError: A run cannot be opened.
    """
    opened: list[Run] = []
    names: list[str] = []
    if isinstance(runs, Mapping):
        for name, value in runs.items():
            trainings = _split(as_run(value))
            if len(trainings) > 1:
                raise UsageError(
                    f"{name} stands for {len(trainings)} trainings", "Give each its own name."
                )
            opened += trainings
            names.append(str(name))
    else:
        for run in _runs_in(runs):
            opened += _split(run)
        names = _directory_names(opened)
    if not opened:
        raise UsageError("no run is given")
    named: list[NamedRun] = []
    start = 0
    for name, run in zip(names, opened, strict=True):
        named.append(NamedRun(name, run, start))
        start += len(run)
    return tuple(named)


def join_runs(runs: Sequence[NamedRun]) -> Run:
    """Return all checkpoints as one run, a training per named run."""
    first = runs[0].run
    members = tuple(member for named in runs for member in named.run.members)
    trainings = tuple(named.run.checkpoints for named in runs)
    return replace(
        first, trainings=trainings, members=members, named=all(named.run.named for named in runs)
    )


def _runs_in(runs: RunsLike) -> list[Run]:
    """List the runs of an argument that is no mapping."""
    if isinstance(runs, (str, Run)) or not isinstance(runs, Iterable):
        return [as_run(runs)]
    # An iterator cannot be looked at twice.
    members: list[Any] = list(runs)
    if any(isinstance(member, Run) for member in members):
        return [as_run(member) for member in members]
    return [as_run(members)]


def _split(run: Run) -> list[Run]:
    """Divide a run into trainings, after its notes.

    Raises:
        CheckpointError: A checkpoint cannot be opened.
    """
    note_run(run)
    # All checkpoints are used, so a damaged file is an error.
    raise_for([*chain(*run.damaged)])
    return [replace(run, trainings=(training,), damaged=()) for training in run.trainings]


def _directory_names(runs: Sequence[Run]) -> list[str]:
    """Name runs by their directories, numbered where several are in one."""
    directories = [_directory_of(run.checkpoints) for run in runs]
    names = short_names(directories)
    counts = Counter(names)
    numbers: Counter[str] = Counter()
    numbered: list[str] = []
    for name in names:
        if counts[name] == 1:
            numbered.append(name)
            continue
        numbers[name] += 1
        numbered.append(f"{name} {numbers[name]}")
    return numbered


def _directory_of(checkpoints: Sequence[Checkpoint]) -> Location:
    """Return the directory that all checkpoints are in."""
    paths = [path.resolve() for path in paths_of(checkpoints)]
    directory = paths[0].parent
    while directory.parent != directory:
        if all(directory in path.parents for path in paths):
            break
        directory = directory.parent
    return directory


@dataclass(frozen=True)
class StepAxis:
    """Axis of training, common to all runs.

    Attributes:
        title: Title of the axis.
        steps: Coordinate of each checkpoint, all runs one after another.
    """

    title: str
    steps: tuple[float, ...]


def choose_steps(runs: Sequence[NamedRun]) -> StepAxis:
    """Choose the axis: recorded steps, else epochs, else numbers in names, else positions.

    The axis is what all checkpoints have, and what differs within each run. A note tells if that is
    the position.
    """
    checkpoints = join_runs(runs).checkpoints
    recorded = [checkpoint.record.step for checkpoint in checkpoints]
    epochs = [checkpoint.record.epoch for checkpoint in checkpoints]
    numbers: list[float | None] = []
    for checkpoint in checkpoints:
        # A number in a name counts only where nothing is recorded, or steps and epochs would mix.
        is_recorded = checkpoint.record.position is not None
        numbers.append(None if is_recorded else checkpoint.step)
    for title, column in (("step", recorded), ("epoch", epochs), ("number in the name", numbers)):
        steps = [step for step in column if step is not None]
        if len(steps) == len(checkpoints) and _differ_within(runs, steps):
            return StepAxis(title, tuple(steps))
    log.info("the checkpoints do not all record a step or epoch of their own: x is the position")
    positions = [float(number) for named in runs for number in range(1, len(named) + 1)]
    return StepAxis("position in the run", tuple(positions))


def _differ_within(runs: Sequence[NamedRun], steps: Sequence[float]) -> bool:
    """Return True if no two checkpoints of a run have the same step."""
    for named in runs:
        of_run = steps[named.start : named.start + len(named)]
        if len({*of_run}) < len(of_run):
            return False
    return True


def landmarks_of(runs: Sequence[NamedRun], axis: StepAxis) -> list[Landmark]:
    """Return the checkpoints of all runs, not scored yet."""
    checkpoints = join_runs(runs).checkpoints
    landmarks: list[Landmark] = []
    names = short_names(paths_of(checkpoints))
    for name, checkpoint, x in zip(names, checkpoints, axis.steps, strict=True):
        landmarks.append(
            Landmark(name, str(checkpoint.path), checkpoint.step, checkpoint.record.lr, x)
        )
    return landmarks
