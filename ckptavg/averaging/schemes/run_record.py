"""Records of a run's checkpoints, from which schemes compute coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ckptavg.errors import RunError
from ckptavg.formats.snapshot_widths import width_of

if TYPE_CHECKING:
    from ckptavg.runs.run import Run

Steps = Sequence[float | None]


@dataclass(frozen=True)
class RunRecord:
    """Records of the checkpoints of a run, oldest first, one training after another.

    Attributes:
        steps: Positions in training; None where unknown.
        metrics: Recorded numbers per checkpoint, by dotted name; empty if none are known.
        widths: Relative standard deviations of EMA snapshots, as recorded or in the names; None
            for checkpoints without. Empty if none are known.
        paths: Paths of the checkpoints, for messages; empty if unknown.
        lengths: Number of checkpoints of each training; empty for a single training.
    """

    steps: tuple[float | None, ...]
    metrics: tuple[Mapping[str, float], ...] = ()
    widths: tuple[float | None, ...] = ()
    paths: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    @classmethod
    def of_run(cls, run: Run) -> RunRecord:
        """Collect the records of a run.

        Raises:
            CheckpointError: A checkpoint cannot be opened.
        """
        checkpoints = run.checkpoints
        return cls(
            tuple(checkpoint.step for checkpoint in checkpoints),
            tuple(checkpoint.record.metrics for checkpoint in checkpoints),
            tuple(width_of(checkpoint) for checkpoint in checkpoints),
            tuple(str(checkpoint.path) for checkpoint in checkpoints),
            tuple(map(len, run.trainings)),
        )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_empty(self) -> bool:
        """True if nothing is known of the checkpoints but their number."""
        return not self.paths and set(self.steps) <= {None}

    def describe(self, position: int) -> str:
        """Name the checkpoint at a position: the path, or the position in words."""
        if self.paths:
            return self.paths[position]
        if position == len(self) - 1:
            return "the last checkpoint"
        return f"checkpoint {position + 1} of {len(self)}"

    def split_steps(self) -> list[Steps]:
        """Split the steps into those of each training."""
        parts: list[Steps] = []
        start = 0
        for length in self.lengths or (len(self),):
            parts.append(self.steps[start : start + length])
            start += length
        return parts


def require_increasing(record: RunRecord, scheme: str, remedy: str) -> list[float]:
    """Return the steps of a run, each of which must be known and greater than the one before.

    Args:
        record: Records of the run.
        scheme: The scheme, or the option of a scheme, that needs the steps.
        remedy: How to do without the steps.

    Raises:
        RunError: A step is unknown or not greater.
    """
    # Between equal steps the decay is 1, so that the later checkpoint would get the coefficient 0.
    known = [step for step in record.steps if step is not None]
    if len(known) == len(record) and all(a < b for a, b in pairwise(known)):
        return known
    # Parts of one training go on from each other and have passed the test above.
    if len(record.lengths) > 1 and len(known) == len(record):
        raise RunError(
            f"{scheme} needs the steps of one training, and those of {len(record.lengths)} runs "
            "do not go on from each other",
            f"Average the runs one by one; {remedy}",
        )
    raise RunError(
        f"{scheme} needs a step for every checkpoint, each greater than the one before",
        f"`ckptavg inspect` shows the steps; {remedy}",
    )
