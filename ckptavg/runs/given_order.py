"""Order in which the user named the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location

if TYPE_CHECKING:
    from ckptavg.runs.run import Run


def list_as_given(run: Run) -> list[Checkpoint]:
    """List the checkpoints of a run in the order in which the user named them.

    A run orders named checkpoints of one directory by step. Checkpoints below one named directory
    stay in the run's order.

    Args:
        run: The run, or a selection of a run.

    Raises:
        CheckpointError: A checkpoint cannot be opened.
    """

    def place(checkpoint: Checkpoint) -> int:
        """Return the place of the given path that names a checkpoint."""
        return _find_place(checkpoint.path, run.paths)

    # The sort is stable.
    return sorted(run.checkpoints, key=place)


def _find_place(path: Location, given: Sequence[Location]) -> int:
    """Find the place of the given path that is, or contains, a path; after all where none does."""
    if path in given:
        return given.index(path)
    parents = list(path.parents)
    for place, directory in enumerate(given):
        if directory in parents:
            return place
    return len(given)
