"""Rules that select checkpoints of a training."""

from __future__ import annotations

import math
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import SupportsIndex

from ckptavg.errors import RunError, UsageError, first_few, short
from ckptavg.errors.printable import step_text
from ckptavg.formats import Checkpoint
from ckptavg.runs.best import Criterion, select_best
from ckptavg.runs.damaged import Damaged
from ckptavg.runs.rate_cycles import find_minima
from ckptavg.runs.window import (
    count_last,
    format_share,
    is_share,
    known_steps,
    note_positions,
    parse_share,
    window_start,
)


class Selection(ABC):
    """Rule that selects checkpoints of one training, in order. Its string is the rule in words."""

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def wanted(self) -> int | None:
        """Number of checkpoints per training that the user asks for; None for any number."""
        return None

    @abstractmethod
    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select from the checkpoints of a training.

        Raises:
            RunError: The checkpoints do not record what the rule needs, or are too few.
        """

    def notes(self, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """Return remarks for the user on the selection from the checkpoints of a training."""
        del checkpoints
        return []

    def follow(self, before: Sequence[Checkpoint], damaged: Damaged) -> Damaged | None:
        """Find the position of a damaged file in the selection.

        The position is lost if the rule depends on the contents of the file.

        Args:
            before: The training's opened checkpoints, among which the file has a position.
            damaged: The file.

        Returns:
            The file with the position in the selection; None if certainly outside.
        """
        del before
        return replace(damaged, position=None, step=None)


@dataclass(frozen=True)
class Last(Selection):
    """Last ``count`` checkpoints."""

    count: int

    def __str__(self) -> str:
        return f"last {self.count}"

    @property
    def wanted(self) -> int:
        """Number of checkpoints per training."""
        return self.count

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the last checkpoints."""
        return checkpoints[-self.count :]

    def follow(self, before: Sequence[Checkpoint], damaged: Damaged) -> Damaged | None:
        """Find the position of a damaged file in the selection; None if outside."""
        if damaged.position is None:
            return damaged
        if len(before) - damaged.position >= self.count:
            return None
        dropped = max(len(before) - self.count, 0)
        return replace(damaged, position=max(damaged.position - dropped, 0))


@dataclass(frozen=True)
class LastShare(Selection):
    """Checkpoints of the last share of training, by their steps, else by their number."""

    share: Fraction

    def __str__(self) -> str:
        return f"last {format_share(self.share)}"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the checkpoints with steps in the last share, one at least."""
        if not checkpoints:
            return checkpoints
        return checkpoints[-count_last(_steps_of(checkpoints), self.share) :]

    def notes(self, checkpoints: Sequence[Checkpoint]) -> list[str]:
        """Return the remark that the share counts checkpoints, where steps are not known."""
        steps = _steps_of(checkpoints)
        if known_steps(steps):
            return []
        return [note_positions(str(self), count_last(steps, self.share), len(steps))]

    def follow(self, before: Sequence[Checkpoint], damaged: Damaged) -> Damaged | None:
        """Find the position of a damaged file in the selection; None if certainly outside.

        A damaged file at the end may be later than the last step that is known, so that the share
        begins later. Then too, a file before the share that is known stays outside.
        """
        known = known_steps(_steps_of(before))
        if not known:
            return super().follow(before, damaged)
        start = float(window_start(known[-1], self.share))
        if damaged.lies_outside(before, math.nextafter(start, math.inf), math.inf):
            return None
        if damaged.position is None:
            return damaged
        dropped = len(before) - len(self.pick(before))
        return replace(damaged, position=max(damaged.position - dropped, 0))


@dataclass(frozen=True)
class Every(Selection):
    """Every ``stride``-th checkpoint, counted back from the last."""

    stride: int

    def __str__(self) -> str:
        return f"every {self.stride}"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the last checkpoint, and those at whole strides before."""
        return checkpoints[::-1][:: self.stride][::-1]

    def follow(self, before: Sequence[Checkpoint], damaged: Damaged) -> Damaged | None:
        """Find the position of a damaged file in the selection."""
        if damaged.position is None:
            return damaged
        # The picks after the damaged file are certain. Before the file they depend on whether the
        # file counts.
        picked = len(range(0, len(before), self.stride))
        after = len(range(damaged.position, len(before), self.stride))
        return replace(damaged, position=picked - after)


@dataclass(frozen=True)
class Cycle(Selection):
    """Checkpoints at positions offset, offset + length, ..., counted from 1."""

    length: int
    offset: int

    def __str__(self) -> str:
        return f"cycle {self.length}:{self.offset}"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select one checkpoint per cycle."""
        return checkpoints[self.offset - 1 :: self.length]


@dataclass(frozen=True)
class Steps(Selection):
    """Checkpoints from step ``low`` to step ``high``, both included."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"steps {step_text(self.low)} to {step_text(self.high)}"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the checkpoints within the range of steps."""
        return [c for c in checkpoints if self.low <= _step_of(c) <= self.high]

    def follow(self, before: Sequence[Checkpoint], damaged: Damaged) -> Damaged | None:
        """Find the position of a damaged file in the selection; None if outside."""
        if damaged.lies_outside(before, self.low, self.high):
            return None
        if damaged.position is None:
            return damaged
        return replace(damaged, position=len(self.pick(before[: damaged.position])))


@dataclass(frozen=True)
class RateMinima(Selection):
    """Checkpoints at minima of the recorded learning rate, the run's ends included."""

    def __str__(self) -> str:
        return "minima of the learning rate"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the checkpoints at the minima."""
        rates: list[float] = []
        missing: list[str] = []
        for checkpoint in checkpoints:
            if checkpoint.record.lr is None:
                missing.append(str(checkpoint.path))
            else:
                rates.append(checkpoint.record.lr)
        if missing:
            raise RunError(
                f"no learning rate is recorded in {first_few(missing)}",
                "Select the cycle's ends by position with `.cycle(C)`.",
            )
        return [checkpoints[position] for position in find_minima(rates)]


@dataclass(frozen=True)
class Best(Selection):
    """Best ``count`` checkpoints by a recorded metric."""

    count: int
    criterion: Criterion

    def __str__(self) -> str:
        return f"best {self.count}"

    @property
    def wanted(self) -> int:
        """Number of checkpoints per training."""
        return self.count

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Select the best checkpoints, in the order of the run."""
        return select_best(self.criterion, checkpoints, self.count)


@dataclass(frozen=True)
class Sample(Selection):
    """Random sample of ``count`` checkpoints without replacement."""

    count: int
    seed: int

    def __str__(self) -> str:
        return f"sample {self.count}"

    def pick(self, checkpoints: Sequence[Checkpoint]) -> Sequence[Checkpoint]:
        """Draw checkpoints, and keep the order of the run."""
        if self.count > len(checkpoints):
            raise RunError(
                f"cannot draw {self.count} of {len(checkpoints)} checkpoints", "Ask for fewer."
            )
        positions = random.Random(self.seed).sample(range(len(checkpoints)), self.count)
        return [checkpoints[position] for position in sorted(positions)]


def choose_last(count: int | str) -> Selection:
    """Make the rule for a number of last checkpoints, or for a share of training.

    Args:
        count: Number of checkpoints, or a percentage such as ``10%``.

    Raises:
        UsageError: The argument is neither.
    """
    if isinstance(count, str) and is_share(count):
        return LastShare(parse_share("last", count))
    return Last(check_positive("last", count))


def check_positive(name: str, value: object) -> int:
    """Return a number from 1 on.

    Args:
        name: Name of the argument, for the message.
        value: The number.

    Raises:
        UsageError: The value is no positive whole number.
    """
    if not isinstance(value, SupportsIndex):
        raise UsageError(f"{name} is expected to be a whole number but got {short(repr(value))}")
    if operator.index(value) < 1:
        raise UsageError(f"{name} is expected to be at least 1 but got {value}")
    return operator.index(value)


def _steps_of(checkpoints: Sequence[Checkpoint]) -> list[float | None]:
    """Return the step of each checkpoint; None where there is none."""
    return [checkpoint.step for checkpoint in checkpoints]


def _step_of(checkpoint: Checkpoint) -> float:
    """Return the step of a checkpoint, or raise an error without one."""
    if checkpoint.step is None:
        raise RunError(
            f"{checkpoint.path} records no step or epoch and has none in its name",
            "Select by `.last()`, `.every()` or `glob` instead.",
        )
    return checkpoint.step
