"""Runs: ordered checkpoints without repeats, with selections."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias, overload

from ckptavg.errors import RunError, UsageError, first_few, short
from ckptavg.errors.printable import printable, step_text
from ckptavg.errors.system import guard_reads
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location, Named, RemotePath, locate
from ckptavg.runs.best import Mode, best_by, choose_criterion
from ckptavg.runs.damaged import Damaged, raise_for
from ckptavg.runs.discovery import find
from ckptavg.runs.discovery.excluded import describe_excluded
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.discovery.reason import LeftOut, Reason
from ckptavg.runs.members import open_members
from ckptavg.runs.rate_cycles import find_minima
from ckptavg.runs.selection_notes import note_restarts

if TYPE_CHECKING:
    import pandas

    from ckptavg.display.tables import Table

Picked = Sequence[Checkpoint]
Pick = Callable[[Picked], Picked]
_PATHS = (str, os.PathLike, RemotePath)
Follow = Callable[[Picked, Damaged], Damaged | None]


@dataclass(frozen=True)
class Run:
    """Ordered checkpoints of one training, or of several trainings one after another.

    Selections return a new run and apply to each training by itself, so ``open_run(a, b).last(1)``
    holds the final checkpoints of both. Iteration gives the checkpoints of all trainings.
    Positions count through all trainings, so ``run[-1]`` is the last checkpoint and ``run[2:5]`` a
    run of three. ``print(run)`` shows a table, and so does a notebook.

    Attributes:
        trainings: The checkpoints of each training, ordered by step.
        excluded: Files that were found and not taken, each with the reason.
        notes: Remarks for the user about the order and the duplicates.
        named: True if each checkpoint was named itself, not found in a directory.
        members: Paths of all found files, whatever a selection takes.
        damaged: Files of each training that cannot be opened, and may belong to the training. Uses
            of all checkpoints raise the error of such a file. A selection that certainly leaves
            out the file does not.
    """

    trainings: tuple[tuple[Checkpoint, ...], ...]
    excluded: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    named: bool = True
    members: tuple[Location, ...] = ()
    damaged: tuple[tuple[Damaged, ...], ...] = ()

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    @overload
    def __getitem__(self, position: int) -> Checkpoint: ...

    @overload
    def __getitem__(self, position: slice) -> Run: ...

    def __getitem__(self, position: int | slice) -> Checkpoint | Run:
        if isinstance(position, slice):
            return self._slice(position)
        if not isinstance(position, SupportsIndex):
            raise TypeError(f"a run takes positions and slices but got {short(repr(position))}")
        checkpoints = self.checkpoints
        if not -len(checkpoints) <= position < len(checkpoints):
            raise IndexError(f"a run of {len(checkpoints)} checkpoints has none at {position}")
        return checkpoints[position]

    def __repr__(self) -> str:
        """Describe the run in a line, for tracebacks: number of checkpoints, first and last."""
        opened = self.opened
        names = short_names([checkpoint.path for checkpoint in (opened[0], opened[-1])])
        ends = names[0] if len(opened) == 1 else f"{names[0]} ... {names[-1]}"
        count = "1 checkpoint" if len(opened) == 1 else f"{len(opened)} checkpoints"
        several = f" of {len(self.trainings)} trainings" if len(self.trainings) > 1 else ""
        return f"<Run of {count}{several}: {printable(ends)}>"

    def __str__(self) -> str:
        from ckptavg.display.terminal import printed_table  # noqa: PLC0415 - only people need it

        return printed_table(self._table())

    def _repr_html_(self) -> str:
        from ckptavg.display.table_html import table_html  # noqa: PLC0415 - only notebooks need it

        return table_html(self._table())

    def to_frame(self) -> pandas.DataFrame:
        """Make a pandas DataFrame: a row per checkpoint, a column per recorded metric.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from ckptavg.display.data_frames import data_frame  # noqa: PLC0415
        from ckptavg.runs.run_table import records_of  # noqa: PLC0415

        return data_frame(records_of(self.opened))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All checkpoints, in order, one training after another.

        Raises:
            CheckpointError: A checkpoint cannot be opened.
        """
        raise_for([*chain(*self.damaged)])
        return self.opened

    @property
    def opened(self) -> tuple[Checkpoint, ...]:
        """Checkpoints that could be opened, one training after another."""
        return tuple(chain(*self.trainings))

    @property
    def left_out(self) -> tuple[tuple[Location, str], ...]:
        """Path and reason in words of each file in ``excluded``."""
        return tuple((left_out.path, left_out.why) for left_out in self.excluded)

    def last(self, count: int) -> Run:
        """Select the last ``count`` checkpoints."""
        _check_positive("last", count)

        def follow(before: Picked, damaged: Damaged) -> Damaged | None:
            """Return a damaged file with the position in the selection; None if outside."""
            if damaged.position is None:
                return damaged
            outside = len(before) - damaged.position >= count
            return (
                None
                if outside
                else replace(damaged, position=max(damaged.position - len(before[:-count]), 0))
            )

        return self._each(lambda c: c[-count:], f"last {count}", follow, asked=count)

    def every(self, stride: int) -> Run:
        """Select every ``stride``-th checkpoint, counted back from the last, which is kept."""
        _check_positive("every", stride)

        def follow(before: Picked, damaged: Damaged) -> Damaged:
            """Return a damaged file with the position in the selection; None if outside."""
            if damaged.position is None:
                return damaged
            # The picks after the damaged file are certain. Before the file they depend on whether
            # the file counts.
            after = len(before[damaged.position :][::-1][::stride])
            return replace(damaged, position=len(before[::-1][::stride]) - after)

        return self._each(lambda c: c[::-1][::stride][::-1], f"every {stride}", follow)

    def cycle(self, length: int, offset: int | None = None) -> Run:
        """Select the checkpoints at positions offset, offset + length, ..., counted from 1.

        Args:
            length: Checkpoints per cycle.
            offset: Position of the first checkpoint; None for the cycle's end, ``length``.
        """
        offset = length if offset is None else offset
        _check_positive("cycle", length)
        _check_positive("the cycle's offset", offset)
        return self._each(lambda c: c[offset - 1 :: length], f"cycle {length}:{offset}")

    def steps(self, first: float | None = None, last: float | None = None) -> Run:
        """Select the checkpoints from step ``first`` to step ``last``, both included.

        Raises:
            RunError: A checkpoint has no step, or no checkpoint is in the range.
        """
        low, high = -math.inf if first is None else first, math.inf if last is None else last

        def pick(checkpoints: Picked) -> Picked:
            """Select the checkpoints within the range of steps."""
            return [c for c in checkpoints if low <= _step(c) <= high]

        def follow(before: Picked, damaged: Damaged) -> Damaged | None:
            """Return a damaged file with the position in the selection; None if outside."""
            if damaged.lies_outside(before, low, high):
                return None
            if damaged.position is None:
                return damaged
            return replace(damaged, position=len(pick(before[: damaged.position])))

        return self._each(pick, f"steps {step_text(low)} to {step_text(high)}", follow)

    def at_lr_min(self) -> Run:
        """Select the checkpoints at minima of the recorded learning rate, the ends included.

        With a constant learning rate, these are all checkpoints. With a cyclical learning rate,
        these are the ends of cycles. If the rates look like rates of the next epoch, the cycles end
        one checkpoint after the minima, and a note says so.

        Raises:
            RunError: A checkpoint records no learning rate.
        """
        run = self._each(_at_lr_min, "minima of the learning rate")
        # A scheduler stepped before the save shifts the ends of cycles by one checkpoint.
        late = [note for training in self.trainings for note in note_restarts(training)]
        return replace(run, notes=(*run.notes, *dict.fromkeys(late)))

    def best(self, count: int, metric: str | None = None, mode: Mode | None = None) -> Run:
        """Select the ``count`` best checkpoints by a recorded metric, in the run's order.

        Args:
            count: Number of checkpoints.
            metric: Name of the metric as in the table of ``inspect``; None for the only metric that
                is recorded.
            mode: ``max`` or ``min``, the better direction. None derives the mode from the name of a
                common metric: ``val_acc`` and ``eval/bleu`` are better high, ``val_loss`` and
                ``wer`` low.

        Raises:
            RunError: A checkpoint does not record the metric.
            UsageError: Several metrics are recorded and no metric is named, or the name does not
                tell the mode.
        """
        _check_positive("best", count)
        criterion = choose_criterion(self.opened, metric, mode)
        run = self._each(lambda c: best_by(criterion, c, count), f"best {count}", asked=count)
        if metric is not None and mode is not None:
            return run
        better = "highest" if criterion.mode == "max" else "lowest"
        note = f"the best {count} are those with the {better} {criterion.metric}"
        return replace(run, notes=(*run.notes, note))

    def sample(self, count: int, seed: int = 0) -> Run:
        """Draw ``count`` checkpoints at random without replacement, in the run's order.

        Raises:
            RunError: There are fewer checkpoints.
        """
        _check_positive("sample", count)
        return self._each(lambda c: _sample(c, count, seed), f"sample {count}")

    def _slice(self, positions: slice) -> Run:
        """Select checkpoints by a slice of positions through all trainings."""
        if (positions.step or 1) < 0:
            raise UsageError("a run keeps its order: the step of a slice has to be positive")
        # By identity, since the positions of a slice count through all trainings.
        selected = {id(checkpoint) for checkpoint in self.checkpoints[positions]}
        start, stop = (("" if p is None else p) for p in (positions.start, positions.stop))
        return self._each(
            lambda c: [checkpoint for checkpoint in c if id(checkpoint) in selected],
            f"[{start}:{stop}]",
        )

    def _table(self) -> Table:
        """Make the table of the run."""
        from ckptavg.runs.run_table import tabulate_run  # noqa: PLC0415

        return tabulate_run(self.opened, self.notes)

    def _each(
        self,
        pick: Pick,
        what: str,
        follow: Follow = lambda _, d: _lost(d),
        asked: int | None = None,
    ) -> Run:
        """Apply a selection to each training.

        Args:
            pick: Function that selects from a training's checkpoints.
            what: The selection in words.
            follow: Function of a training's checkpoints and a damaged file. It returns the file
                with the position in the selection; None if the file is certainly outside.
            asked: Number of checkpoints per training that the selection asks for. A training with
                fewer checkpoints gets a note; None for no note.
        """
        trainings: list[tuple[Checkpoint, ...]] = []
        pending: list[tuple[Damaged, ...]] = []
        outside: list[Damaged] = []
        for training, damaged in zip_longest(self.trainings, self.damaged, fillvalue=()):
            followed = [(d, follow(training, d)) for d in damaged]
            outside += [d for d, inside in followed if inside is None]
            remaining = tuple(inside for _, inside in followed if inside is not None)
            picked = tuple(pick(training))
            # A damaged file may be the only one that the selection would take.
            if not picked:
                raise_for(remaining)
                continue
            trainings.append(picked)
            pending.append(remaining)
        if not trainings:
            raise RunError(
                f"the selection ({what}) leaves none of {len(self.opened)} checkpoints",
                _describe_steps(self.opened),
            )
        excluded = [LeftOut(d.path, Reason.DAMAGED) for d in outside]
        few = [] if asked is None else [c for c in trainings if len(c) < asked]
        fewer = [_note_fewer(what, c, len(trainings)) for c in few]
        return replace(
            self,
            trainings=tuple(trainings),
            excluded=(*self.excluded, *excluded),
            notes=(*self.notes, *describe_excluded(excluded), *fewer),
            damaged=tuple(pending),
        )


def open_run(
    *paths: Named, glob: str | None = None, skip: str | Sequence[str] = (), key: str | None = None
) -> Run:
    """Open the checkpoints below directories, or checkpoints named one by one.

    Named checkpoints from the same directory form one run, so that ``runs/swa/*.pt`` is one run and
    ``runs/*/final.pt`` several. Checkpoints at the same place below directories that are named
    after steps (``checkpoint-*/unet``) are one run, too. Each run is ordered by recorded step, then
    epoch, then the numbers in the names.

    Args:
        paths: Run directories and checkpoints, mixed; paths or URLs (``s3://bucket/run``).
        glob: Shell pattern that the names of checkpoints must match. A pattern with slashes
            (``*/unet``) is matched with as many of the last parts of the paths.
        skip: Shell patterns of the names of checkpoints and directories to leave out.
        key: Dotted path of the entry that holds the weights; None to search for the entry.

    Raises:
        RunError: A path holds no run, or several.
        CheckpointError: A checkpoint cannot be opened, and the position in the run is not certain.
            With a certain position, the run raises the error when used, unless a selection leaves
            out the position.
    """
    if not paths:
        raise UsageError("no path is given")
    with guard_reads(first_few([str(path) for path in paths])):
        patterns = find.Patterns(glob, (skip,) if isinstance(skip, str) else tuple(skip))
        findings = find.find([locate(path) for path in paths], patterns)
    trainings: list[tuple[Checkpoint, ...]] = []
    damaged: list[tuple[Damaged, ...]] = []
    excluded, notes = list(findings.excluded), list[str]()
    for members in findings.groups:
        opened = open_members(members, key, findings.broken)
        excluded += opened.excluded
        notes += opened.notes
        if opened.checkpoints:
            trainings.append(opened.checkpoints)
            damaged.append(opened.damaged)
            # Without a certain position, no selection can leave out the damaged file.
            raise_for([d for d in opened.damaged if d.position is None])
    if not trainings:
        raise RunError(
            f"no checkpoint is left in {first_few([str(path) for path in paths])}", _why(excluded)
        )
    entered = [
        f"{directory} holds no checkpoint itself: {run} is taken"
        for directory, run in findings.entered.items()
    ]
    idle = [
        f"the pattern {pattern!r} skips nothing"
        for pattern in patterns.skip
        if pattern not in findings.skipping
    ]
    notes = [*entered, *idle, *describe_excluded(excluded), *notes]
    everything = (*chain(*findings.groups), *(left_out.path for left_out in excluded))
    return Run(
        tuple(trainings),
        tuple(excluded),
        tuple(dict.fromkeys(notes)),
        findings.named,
        everything,
        tuple(damaged),
    )


RunLike: TypeAlias = "Run | Iterable[Checkpoint] | Iterable[Named] | Named"
"""A run, one or several paths of a run, or checkpoints in order."""


def as_run(run: RunLike) -> Run:
    """Return a run as given, open the run of a path, or make a run of checkpoints in order.

    Raises:
        UsageError: The argument is neither a run, nor paths, nor checkpoints.
    """
    if isinstance(run, Run):
        return run
    if isinstance(run, _PATHS):
        return open_run(run)
    members = tuple(run) if isinstance(run, Iterable) else (run,)
    if members and all(isinstance(member, _PATHS) for member in members):
        return open_run(*(member for member in members if isinstance(member, _PATHS)))
    checkpoints = tuple(member for member in members if isinstance(member, Checkpoint))
    if len(checkpoints) < len(members):
        raise UsageError(
            f"a run is expected, its path, or its checkpoints, but got {short(repr(run))}",
            "Open it first: ckptavg.open_run(PATH).",
        )
    return Run((checkpoints,))


def _note_fewer(what: str, picked: Picked, trainings: int) -> str:
    """Note that a training has fewer checkpoints than a selection asks for."""
    where = f" in {picked[0].path.parent}" if trainings > 1 else ""
    are = "is" if len(picked) == 1 else "are"
    return f"the {what} are asked for, and there {are} only {len(picked)}{where}"


def _describe_steps(checkpoints: Picked) -> str:
    """Word the range of steps of some checkpoints, as a remedy."""
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if not steps:
        return "`ckptavg inspect` shows the run."
    return f"Their steps are {step_text(min(steps))} to {step_text(max(steps))}."


def _why(excluded: Sequence[LeftOut]) -> str:
    """Word the remedy that lists the paths left out, with reasons."""
    return (
        "Left out: "
        + first_few([f"{left_out.path.name} ({left_out.why})" for left_out in excluded])
        + "."
    )


def _check_positive(name: str, value: int) -> None:
    """Refuse a value that is no positive whole number."""
    if not isinstance(value, SupportsIndex):
        raise UsageError(f"{name} is expected to be a whole number but got {short(repr(value))}")
    if value < 1:
        raise UsageError(f"{name} is expected to be at least 1 but got {value}")


def _lost(damaged: Damaged) -> Damaged:
    """Forget the position of a damaged file, after a selection that depends on the file."""
    return replace(damaged, position=None, step=None)


def _step(checkpoint: Checkpoint) -> float:
    """Return the step of a checkpoint, or raise an error without one."""
    if checkpoint.step is None:
        raise RunError(
            f"{checkpoint.path} records no step or epoch and has none in its name",
            "Select by --last, --every or --glob instead.",
        )
    return checkpoint.step


def _at_lr_min(checkpoints: Picked) -> Picked:
    """Select the checkpoints at minima of the learning rate."""
    missing = [str(c.path) for c in checkpoints if c.record.lr is None]
    if missing:
        raise RunError(
            f"no learning rate is recorded in {first_few(missing)}",
            "Select the cycle's ends by position with --cycle C.",
        )
    rates = [checkpoint.record.lr or 0.0 for checkpoint in checkpoints]
    return [checkpoints[position] for position in find_minima(rates)]


def _sample(checkpoints: Picked, count: int, seed: int) -> Picked:
    """Draw checkpoints at random, and keep the run's order."""
    if count > len(checkpoints):
        raise RunError(f"cannot draw {count} of {len(checkpoints)} checkpoints", "Ask for fewer.")
    picked = random.Random(seed).sample(range(len(checkpoints)), count)
    # Sorted, since a run keeps the order of training.
    return [checkpoints[i] for i in sorted(picked)]
