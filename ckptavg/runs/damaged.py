"""Damaged checkpoints: files that cannot be opened, with positions in a run."""

from __future__ import annotations

import bisect
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptavg.errors import CkptavgError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.steps_in_names import NamedStep


@dataclass(frozen=True)
class Damaged:
    """File with a checkpoint's name that cannot be opened.

    Attributes:
        path: The file or directory.
        error: The error of opening it.
        position: Number of the training's opened checkpoints before the file, by the names; None
            where that is not certain.
        step: Step in the name, if the recorded steps of the opened checkpoints agree with the
            steps in the names; else None.
    """

    path: Location
    error: CkptavgError
    position: int | None = None
    step: float | None = None

    def lies_outside(self, ordered: Sequence[Checkpoint], low: float, high: float) -> bool:
        """Return True if the step of the file is certainly outside a range of steps.

        Args:
            ordered: The opened checkpoints, to which the position refers. A step that is not known
                is between the steps of the neighbours.
            low: First step of the range.
            high: Last step of the range, included.
        """
        if self.step is not None:
            return not low <= self.step <= high
        if self.position is None:
            return False
        if self.position > 0:
            step = ordered[self.position - 1].step
            if step is not None and step >= high:
                return True
        if self.position < len(ordered):
            step = ordered[self.position].step
            return step is not None and step <= low
        return False


def raise_for(damaged: Sequence[Damaged]) -> None:
    """Raise the error of the first damaged file, if any, with a hint to leave out the file.

    Raises:
        CkptavgError: There is a damaged file.
    """
    if not damaged:
        return
    first, *further = damaged
    error, message = first.error, first.error.message
    if further:
        names = [file.path.name for file in further]
        message += f" ({first_few(names)} cannot be opened either)"
    leave_out = f"`skip={glob.escape(first.path.name)!r}` leaves it out."
    raise type(error)(message, f"{error.remedy} {leave_out}".strip()) from error


def place_damaged(
    errors: Mapping[Location, CkptavgError],
    ordered: Sequence[Checkpoint],
    named: Mapping[Location, NamedStep],
) -> tuple[Damaged, ...]:
    """Find the positions of damaged files among the checkpoints of a training.

    Positions are certain if all names count in one unit, in the order of the run.

    Args:
        errors: Damaged file → error of opening.
        ordered: The training's checkpoints.
        named: Steps in the names of opened and damaged files; without a value where a name tells
            no step.
    """
    values: list[int] = []
    indices: list[int] = []
    for index, checkpoint in enumerate(ordered):
        value = named[checkpoint.path].value
        if value is not None:
            values.append(value)
            indices.append(index)
    units = {step.unit for step in named.values() if step.value is not None}
    # A step in a name gives a position only if the run is in the order of the names.
    is_certain = len(units) == 1 and all(a < b for a, b in pairwise(values))
    recorded = [ordered[index].step for index in indices]
    placed: list[Damaged] = []
    for path, error in errors.items():
        file = Damaged(path, error)
        value = named[path].value
        if is_certain and value is not None:
            position = _position(value, values, indices, len(ordered))
            if position is not None:
                step = value if recorded == values else None
                file = Damaged(path, error, position, step)
        placed.append(file)
    return tuple(placed)


def _position(value: int, values: Sequence[int], indices: Sequence[int], count: int) -> int | None:
    """Count the checkpoints of a run before a step; None where the count is not certain.

    Args:
        value: The step.
        values: Increasing steps of the checkpoints that have one in their names.
        indices: Indices of these checkpoints in the run, which may have others in between.
        count: Number of the run's checkpoints.
    """
    rank = bisect.bisect_left(values, value)
    # The file may come before or after a checkpoint of the same step.
    if values[rank : rank + 1] == [value]:
        return None
    bounds = [-1, *indices, count]
    before, after = bounds[rank], bounds[rank + 1]
    # A checkpoint without a step in its name may belong on either side.
    if after - before > 1:
        return None
    return after
