"""Runs: ordered checkpoints without repeats, with selections."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias, overload

from ckptavg.errors import RunError, UsageError, first_few, short
from ckptavg.errors.printable import printable, step_text
from ckptavg.errors.system import guard_reads
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location, PathOrUrl, RemotePath, locate
from ckptavg.runs.best import Mode, choose_criterion
from ckptavg.runs.damaged import Damaged, raise_for
from ckptavg.runs.discovery.directory import Findings
from ckptavg.runs.discovery.excluded import describe_excluded
from ckptavg.runs.discovery.file_names import Patterns
from ckptavg.runs.discovery.find import find
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.discovery.reason import LeftOut, Reason
from ckptavg.runs.members import open_members
from ckptavg.runs.selection_notes import note_restarts
from ckptavg.runs.selections import (
    Best,
    Cycle,
    Every,
    RateMinima,
    Sample,
    Selection,
    Steps,
    check_positive,
    choose_last,
)

if TYPE_CHECKING:
    import pandas

    from ckptavg.display.tables import Table

_PATHS = (str, os.PathLike, RemotePath)


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
        damaged: Files of each training that cannot be opened, and may belong to the training. Any
            use of all checkpoints raises the error of such a file. A selection that certainly
            leaves out the file raises no error.
        paths: The paths that were opened, in the order given.
    """

    trainings: tuple[tuple[Checkpoint, ...], ...]
    excluded: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    named: bool = True
    members: tuple[Location, ...] = ()
    damaged: tuple[tuple[Damaged, ...], ...] = ()
    paths: tuple[Location, ...] = ()

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
        if len(opened) == 1:
            count, ends = "1 checkpoint", opened[0].path.name
        else:
            first, last = short_names([opened[0].path, opened[-1].path])
            count, ends = f"{len(opened)} checkpoints", f"{first} ... {last}"
        if len(self.trainings) > 1:
            count += f" of {len(self.trainings)} trainings"
        return f"<Run of {count}: {printable(ends)}>"

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
        from ckptavg.runs.run_table import list_records  # noqa: PLC0415

        return data_frame(list_records(self.opened))

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

    def last(self, count: int | str) -> Run:
        """Select the last ``count`` checkpoints, or those of the last share of training.

        Args:
            count: Number of checkpoints, or a share such as ``"10%"``: the checkpoints with a step
                above 90 % of the last step, which is that of the last checkpoint that earlier
                selections left. Where a step is not known, it is the share of the checkpoints,
                rounded to the nearest number, and a note says so. One checkpoint is selected at
                least.

        Raises:
            UsageError: The argument is neither a number from 1 on nor a share.
        """
        return self._select(choose_last(count))

    def every(self, stride: int) -> Run:
        """Select every ``stride``-th checkpoint, counted back from the last, which is kept."""
        check_positive("every", stride)
        return self._select(Every(stride))

    def cycle(self, length: int, offset: int | None = None) -> Run:
        """Select the checkpoints at positions offset, offset + length, ..., counted from 1.

        Args:
            length: Checkpoints per cycle.
            offset: Position of the first checkpoint; None for the cycle's end, ``length``.
        """
        if offset is None:
            offset = length
        check_positive("cycle", length)
        check_positive("the cycle's offset", offset)
        return self._select(Cycle(length, offset))

    def steps(self, first: float | None = None, last: float | None = None) -> Run:
        """Select the checkpoints from step ``first`` to step ``last``, both included.

        Raises:
            RunError: A checkpoint has no step, or no checkpoint is in the range.
        """
        low = -math.inf if first is None else first
        high = math.inf if last is None else last
        return self._select(Steps(low, high))

    def at_lr_min(self) -> Run:
        """Select the checkpoints at minima of the recorded learning rate, the ends included.

        With a constant learning rate, these are all checkpoints. With a cyclical learning rate,
        these are the ends of cycles. If the rates look like rates of the next epoch, the cycles end
        one checkpoint after the minima, and a note says so.

        Raises:
            RunError: A checkpoint records no learning rate.
        """
        run = self._select(RateMinima())
        # A scheduler stepped before the save shifts the ends of cycles by one checkpoint.
        notes = chain.from_iterable(map(note_restarts, self.trainings))
        return replace(run, notes=(*run.notes, *dict.fromkeys(notes)))

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
        check_positive("best", count)
        criterion = choose_criterion(self.opened, metric, mode)
        run = self._select(Best(count, criterion))
        if metric is not None and mode is not None:
            return run
        direction = {"max": "highest", "min": "lowest"}[criterion.mode]
        note = f"the best {count} are those with the {direction} {criterion.metric}"
        return replace(run, notes=(*run.notes, note))

    def sample(self, count: int, seed: int = 0) -> Run:
        """Draw ``count`` checkpoints at random without replacement, in the run's order.

        Raises:
            RunError: There are fewer checkpoints.
        """
        check_positive("sample", count)
        return self._select(Sample(count, seed))

    def _slice(self, positions: slice) -> Run:
        """Select checkpoints by a slice of positions through all trainings."""
        if (positions.step or 1) < 0:
            raise UsageError("a run keeps its order: the step of a slice has to be positive")
        # The positions of a slice count through all trainings.
        selected = range(len(self.checkpoints))[positions]
        trainings: list[tuple[Checkpoint, ...]] = []
        first = 0
        for training in self.trainings:
            picked = tuple(c for i, c in enumerate(training, first) if i in selected)
            if picked:
                trainings.append(picked)
            first += len(training)
        start = "" if positions.start is None else positions.start
        stop = "" if positions.stop is None else positions.stop
        self._check_any(trainings, f"[{start}:{stop}]")
        return replace(self, trainings=tuple(trainings), damaged=())

    def _table(self) -> Table:
        from ckptavg.runs.run_table import tabulate_run  # noqa: PLC0415

        return tabulate_run(self.opened, self.notes)

    def _select(self, selection: Selection) -> Run:
        """Apply a selection to each training."""
        trainings: list[tuple[Checkpoint, ...]] = []
        pending: list[tuple[Damaged, ...]] = []
        excluded: list[LeftOut] = []
        for training, damaged in zip_longest(self.trainings, self.damaged, fillvalue=()):
            remaining: list[Damaged] = []
            for file in damaged:
                followed = selection.follow(training, file)
                if followed is None:
                    excluded.append(LeftOut(file.path, Reason.DAMAGED))
                else:
                    remaining.append(followed)
            picked = tuple(selection.pick(training))
            if picked:
                trainings.append(picked)
                pending.append(tuple(remaining))
            else:
                # A damaged file may be the only one that the selection would take.
                raise_for(remaining)
        self._check_any(trainings, str(selection))
        notes = [*self.notes, *describe_excluded(excluded), *_note_fewer(selection, trainings)]
        for training in self.trainings:
            notes += selection.notes(training)
        return replace(
            self,
            trainings=tuple(trainings),
            excluded=(*self.excluded, *excluded),
            notes=tuple(dict.fromkeys(notes)),
            damaged=tuple(pending),
        )

    def _check_any(self, trainings: Sequence[Sequence[Checkpoint]], selection: str) -> None:
        """Refuse a selection that leaves no checkpoint of any training.

        Raises:
            RunError: No training has a selected checkpoint.
        """
        if not trainings:
            raise RunError(
                f"the selection ({selection}) leaves none of {len(self.opened)} checkpoints",
                _describe_steps(self.opened),
            )


def open_run(
    *paths: PathOrUrl,
    glob: str | None = None,
    skip: str | Sequence[str] = (),
    key: str | None = None,
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
    for path in paths:
        if not isinstance(path, _PATHS):
            raise UsageError(
                f"a path of a run is expected but got {short(repr(path))}",
                "Pass each path as an argument of its own: ckptavg.open_run(*paths).",
            )
    if isinstance(skip, str):
        skip = [skip]
    directories = first_few(list(map(str, paths)))
    with guard_reads(directories):
        patterns = Patterns(glob, tuple(skip))
        locations = tuple(map(locate, paths))
        findings = find(locations, patterns)
    trainings: list[tuple[Checkpoint, ...]] = []
    damaged: list[tuple[Damaged, ...]] = []
    excluded = list(findings.excluded)
    notes: list[str] = []
    for members in findings.groups:
        opened = open_members(members, key, findings.broken)
        excluded += opened.excluded
        notes += opened.notes
        if opened.checkpoints:
            trainings.append(opened.checkpoints)
            damaged.append(opened.damaged)
            # Without a certain position, no selection can leave out the damaged file.
            raise_for([file for file in opened.damaged if file.position is None])
    if not trainings:
        raise RunError(f"no checkpoint is left in {directories}", _list_excluded(excluded))
    notes = [*_note_search(findings, patterns), *describe_excluded(excluded), *notes]
    return Run(
        tuple(trainings),
        tuple(excluded),
        tuple(dict.fromkeys(notes)),
        findings.named,
        (*chain(*findings.groups), *(left_out.path for left_out in excluded)),
        tuple(damaged),
        locations,
    )


def _note_search(findings: Findings, patterns: Patterns) -> list[str]:
    """Note runs that were found below a directory, and patterns that match nothing."""
    notes: list[str] = []
    for directory, run in findings.entered.items():
        notes.append(f"{directory} holds no checkpoint itself: {run} is taken")
    for pattern in patterns.skip:
        if pattern not in findings.skipping:
            notes.append(f"the pattern {pattern!r} skips nothing")
    return notes


RunLike: TypeAlias = "Run | Iterable[Checkpoint] | Iterable[PathOrUrl] | PathOrUrl"
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
    paths: list[PathOrUrl] = []
    checkpoints: list[Checkpoint] = []
    for member in members:
        if isinstance(member, Checkpoint):
            checkpoints.append(member)
        elif isinstance(member, _PATHS):
            paths.append(member)
    if paths and len(paths) == len(members):
        return open_run(*paths)
    if len(checkpoints) < len(members):
        raise UsageError(
            f"a run is expected, its path, or its checkpoints, but got {short(repr(run))}",
            "Open it first: ckptavg.open_run(PATH).",
        )
    return Run((tuple(checkpoints),))


def _note_fewer(selection: Selection, trainings: Sequence[Sequence[Checkpoint]]) -> list[str]:
    """Note the trainings that have fewer checkpoints than a selection asks for."""
    notes: list[str] = []
    for picked in trainings:
        count = len(picked)
        if selection.wanted is None or count >= selection.wanted:
            continue
        are = "is" if count == 1 else "are"
        where = f" in {picked[0].path.parent}" if len(trainings) > 1 else ""
        notes.append(f"the {selection} are asked for, and there {are} only {count}{where}")
    return notes


def _describe_steps(checkpoints: Sequence[Checkpoint]) -> str:
    """Word the range of steps of some checkpoints, as a remedy."""
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if not steps:
        return "`ckptavg inspect` shows the run."
    return f"Their steps are {step_text(min(steps))} to {step_text(max(steps))}."


def _list_excluded(excluded: Sequence[LeftOut]) -> str:
    """Word the remedy that lists the paths left out, with reasons."""
    return (
        "Left out: "
        + first_few([f"{left_out.path.name} ({left_out.why})" for left_out in excluded])
        + "."
    )
