"""A directory → an ordered, de-duplicated run of checkpoints, and selections of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

from ckptavg.display import step_text
from ckptavg.errors import RunError, UsageError, first_few, short
from ckptavg.formats import Checkpoint
from ckptavg.formats.storage import Location, Named, locate
from ckptavg.runs import find, order
from ckptavg.runs.damaged import Damaged, raise_for
from ckptavg.system_errors import guard_reads

Picked = Sequence[Checkpoint]
Pick = Callable[[Picked], Picked]
Follow = Callable[[Picked, Damaged], Damaged | None]


@dataclass(frozen=True)
class Run:
    """The checkpoints of one training in order, or of several trainings one after another.

    Selections return a new run and apply to each training by itself, so ``open_run(a, b).last(1)``
    holds the final checkpoints of both. Iterating gives the checkpoints.

    Attributes:
        trainings: The checkpoints of each training, ordered by step.
        left_out: Files that were found and not taken, and why.
        notes: What a person should know about the order and the duplicates.
        named: Whether each checkpoint was named by itself, not found in a directory.
        members: Paths of all that was found, whatever a selection takes of it.
        damaged: Of each training what cannot be opened, and may belong to it. Whatever needs all
            checkpoints raises the error; a selection that certainly leaves it out does not.
    """

    trainings: tuple[tuple[Checkpoint, ...], ...]
    left_out: tuple[tuple[Location, str], ...] = ()
    notes: tuple[str, ...] = ()
    named: bool = True
    members: tuple[Location, ...] = ()
    damaged: tuple[tuple[Damaged, ...], ...] = ()

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """All checkpoints, one training after another.

        Raises:
            CheckpointError: One cannot be opened.
        """
        raise_for([*chain(*self.damaged)])
        return self.opened

    @property
    def opened(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that can be opened, one training after another."""
        return tuple(chain(*self.trainings))

    def last(self, count: int) -> Run:
        """The last ``count`` checkpoints."""
        _check_positive("last", count)

        def follow(before: Picked, damaged: Damaged) -> Damaged | None:
            if damaged.position is None:
                return damaged
            outside = len(before) - damaged.position >= count
            return (
                None
                if outside
                else replace(damaged, position=max(damaged.position - len(before[:-count]), 0))
            )

        return self._each(lambda c: c[-count:], f"last {count}", follow)

    def every(self, stride: int) -> Run:
        """Every ``stride``-th checkpoint, counted back from the last, which is kept."""
        _check_positive("every", stride)

        def follow(before: Picked, damaged: Damaged) -> Damaged:
            if damaged.position is None:
                return damaged
            # Those after it are picked in any case, those before it perhaps others.
            after = len(before[damaged.position :][::-1][::stride])
            return replace(damaged, position=len(before[::-1][::stride]) - after)

        return self._each(lambda c: c[::-1][::stride][::-1], f"every {stride}", follow)

    def cycle(self, length: int, offset: int | None = None) -> Run:
        """The checkpoints at positions offset, offset + length, ... of the run, counted from 1.

        Args:
            length: Checkpoints a cycle.
            offset: Position of the first one; the cycle's end, ``length``, where None.
        """
        offset = length if offset is None else offset
        _check_positive("cycle", length)
        _check_positive("the cycle's offset", offset)
        return self._each(lambda c: c[offset - 1 :: length], f"cycle {length}:{offset}")

    def steps(self, first: float | None = None, last: float | None = None) -> Run:
        """The checkpoints from step ``first`` to step ``last``, both included.

        Raises:
            RunError: A checkpoint has no step, or none lies between the two.
        """
        low, high = -math.inf if first is None else first, math.inf if last is None else last

        def pick(checkpoints: Picked) -> Picked:
            return [c for c in checkpoints if low <= _step(c) <= high]

        def follow(before: Picked, damaged: Damaged) -> Damaged | None:
            if damaged.lies_outside(before, low, high):
                return None
            if damaged.position is None:
                return damaged
            return replace(damaged, position=len(pick(before[: damaged.position])))

        return self._each(pick, f"steps {step_text(low)} to {step_text(high)}", follow)

    def at_lr_min(self) -> Run:
        """The checkpoints at the minima of the recorded learning rate, the ends included.

        On a constant learning rate that is all of them, on a cyclical one the end of each cycle.

        Raises:
            RunError: A checkpoint records no learning rate.
        """
        return self._each(_at_lr_min, "minima of the learning rate")

    def best(self, count: int, metric: str, mode: str) -> Run:
        """The ``count`` checkpoints that do best on a recorded metric, in the run's order.

        Args:
            count: How many.
            metric: Name of the metric as ``inspect`` shows it.
            mode: ``max`` or ``min``: which is better.

        Raises:
            RunError: A checkpoint does not record the metric.
        """
        _check_positive("best", count)
        if mode not in ("max", "min"):
            raise UsageError(f"mode is expected to be one of max, min but got {mode!r}")
        return self._each(lambda c: _best(c, count, metric, mode), f"best {count}")

    def sample(self, count: int, seed: int = 0) -> Run:
        """``count`` checkpoints drawn at random without replacement, in the run's order.

        Raises:
            RunError: There are fewer.
        """
        _check_positive("sample", count)
        return self._each(lambda c: _sample(c, count, seed), f"sample {count}")

    def _each(self, pick: Pick, what: str, follow: Follow = lambda _, d: _lost(d)) -> Run:
        """Apply a selection to each training.

        Args:
            pick: Selects of a training's checkpoints.
            what: The selection in words.
            follow: Gives for those checkpoints, and one that cannot be opened, the latter with its
                position in the selection; None if it is certainly outside.
        """
        trainings: list[tuple[Checkpoint, ...]] = []
        pending: list[tuple[Damaged, ...]] = []
        outside: list[Damaged] = []
        for training, damaged in zip_longest(self.trainings, self.damaged, fillvalue=()):
            followed = [(d, follow(training, d)) for d in damaged]
            outside += [d for d, inside in followed if inside is None]
            remaining = tuple(inside for _, inside in followed if inside is not None)
            picked = tuple(pick(training))
            if not picked:
                raise_for(remaining)
                continue
            trainings.append(picked)
            pending.append(remaining)
        if not trainings:
            raise RunError(
                f"the selection ({what}) leaves none of {len(self.opened)} checkpoints",
                "`ckptavg inspect` shows the run's steps.",
            )
        left_out = [(d.path, "cannot be opened, and lies outside the selection") for d in outside]
        return replace(
            self,
            trainings=tuple(trainings),
            left_out=(*self.left_out, *left_out),
            notes=(*self.notes, *find.tell(left_out)),
            damaged=tuple(pending),
        )


def open_run(
    *paths: Named, glob: str | None = None, skip: str | Sequence[str] = (), key: str | None = None
) -> Run:
    """Open the checkpoints below some directories, or named one by one.

    Checkpoints that are named themselves form a run with their neighbours from the same directory,
    so that ``runs/swa/*.pt`` is one run and ``runs/*/final.pt`` several. What lies at the same
    place below directories that are called after steps (``checkpoint-*/unet``) is one run, too.
    Each run is ordered by recorded step, then epoch, then the numbers in the names.

    Args:
        paths: Run directories and checkpoints, mixed; paths or URLs (``s3://bucket/run``).
        glob: Shell pattern that the checkpoints' names must match, or as many of the last parts of
            their paths as it has (``*/unet``).
        skip: Shell patterns of the names of checkpoints to leave out, and of directories.
        key: Dotted path of the entry that holds the weights; found by itself where None.

    Raises:
        RunError: A path holds no run, or several.
        CheckpointError: A checkpoint cannot be opened, and its place in the run is not certain. If
            it is, the run raises this when it is used, unless a selection leaves the place out.
    """
    if not paths:
        raise UsageError("no path is given")
    with guard_reads(first_few([str(path) for path in paths])):
        patterns = find.Patterns(glob, (skip,) if isinstance(skip, str) else tuple(skip))
        found = find.find([locate(path) for path in paths], patterns)
    trainings: list[tuple[Checkpoint, ...]] = []
    damaged: list[tuple[Damaged, ...]] = []
    left_out, notes = list(found.left_out), list[str]()
    for members in found.groups:
        opened = order.open_members(members, key, found.broken)
        left_out += opened.left_out
        notes += opened.notes
        if opened.checkpoints:
            trainings.append(opened.checkpoints)
            damaged.append(opened.damaged)
            raise_for([d for d in opened.damaged if d.position is None])
    if not trainings:
        raise RunError(
            f"no checkpoint is left in {first_few([str(path) for path in paths])}", _why(left_out)
        )
    notes = [*find.tell(left_out), *notes]
    everything = (*chain(*found.groups), *(path for path, _ in left_out))
    return Run(
        tuple(trainings),
        tuple(left_out),
        tuple(dict.fromkeys(notes)),
        found.named,
        everything,
        tuple(damaged),
    )


def as_run(run: Run | Iterable[Checkpoint]) -> Run:
    """The run itself, or a run of these checkpoints in this order.

    Raises:
        UsageError: It is neither, but a path, for example.
    """
    if isinstance(run, Run):
        return run
    checkpoints = tuple(run) if isinstance(run, Iterable) and not isinstance(run, str) else (run,)
    if not all(isinstance(c, Checkpoint) for c in checkpoints):
        raise UsageError(
            f"a run is expected, or its checkpoints, but got {short(repr(run))}",
            "Open it first: ckptavg.open_run(PATH).",
        )
    return Run((checkpoints,))


def _why(left_out: list[tuple[Location, str]]) -> str:
    return "Left out: " + first_few([f"{path.name} ({why})" for path, why in left_out]) + "."


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UsageError(f"{name} is expected to be at least 1 but got {value}")


def _lost(damaged: Damaged) -> Damaged:
    """What cannot be opened, after a selection that it may have changed."""
    return replace(damaged, position=None, step=None)


def _step(checkpoint: Checkpoint) -> float:
    if checkpoint.step is None:
        raise RunError(
            f"{checkpoint.path} records no step or epoch and has none in its name",
            "Select by --last, --every or --glob instead.",
        )
    return checkpoint.step


def _at_lr_min(checkpoints: Picked) -> Picked:
    missing = [str(c.path) for c in checkpoints if c.record.lr is None]
    if missing:
        raise RunError(
            f"no learning rate is recorded in {first_few(missing)}",
            "Select the cycle's ends by position with --cycle C.",
        )
    levels: list[list[Checkpoint]] = []
    for checkpoint in checkpoints:
        if levels and math.isclose(_rate(levels[-1]), _rate([checkpoint]), rel_tol=1e-6):
            levels[-1].append(checkpoint)
        else:
            levels.append([checkpoint])
    rates = [math.inf, *map(_rate, levels), math.inf]
    return [
        checkpoint
        for level, before, after in zip(levels, rates, rates[2:], strict=False)
        if before > _rate(level) < after
        for checkpoint in level
    ]


def _rate(level: Picked) -> float:
    """The recorded learning rate of checkpoints that share it."""
    return level[0].record.lr or 0.0


def _best(checkpoints: Picked, count: int, metric: str, mode: str) -> Picked:
    for checkpoint in checkpoints:
        if metric not in checkpoint.record.metrics:
            known = sorted(checkpoint.record.metrics)
            raise RunError(
                f"{checkpoint.path} records no metric {metric!r}",
                f"It records {first_few(known, 8)}." if known else "It records none at all.",
            )
    sign = -1.0 if mode == "max" else 1.0
    finite = [c for c in checkpoints if math.isfinite(c.record.metrics[metric])]
    ranked = sorted(finite, key=lambda c: sign * c.record.metrics[metric])
    chosen = {id(checkpoint) for checkpoint in ranked[:count]}
    return [checkpoint for checkpoint in checkpoints if id(checkpoint) in chosen]


def _sample(checkpoints: Picked, count: int, seed: int) -> Picked:
    if count > len(checkpoints):
        raise RunError(f"cannot draw {count} of {len(checkpoints)} checkpoints", "Ask for fewer.")
    picked = random.Random(seed).sample(range(len(checkpoints)), count)
    return [checkpoints[i] for i in sorted(picked)]
