"""A note on runs whose learning rate is cyclical."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptavg.run import Run

log = logging.getLogger("ckptavg")
_FEWEST_CYCLES = 2


def note_cycles(run: Run, selection: Run) -> None:
    """Note that a selection has more of a cyclical run than the ends of its cycles.

    Checkpoints from the middle of a cycle were saved at a high learning rate, and averages without
    them do better (Izmailov et al. 2018, 3.2).

    Args:
        run: All checkpoints of a training.
        selection: What is averaged of them.
    """
    if len(run.trainings) != 1 or any(run.damaged):
        return
    (checkpoints,) = run.trainings
    if any(checkpoint.record.lr is None for checkpoint in checkpoints):
        return
    ends = run.at_lr_min().checkpoints
    # A warm-up begins at a minimum, too, which ends no cycle.
    cycles = [checkpoint for checkpoint in ends if checkpoint is not checkpoints[0]]
    if len(cycles) < _FEWEST_CYCLES or len(ends) == len(checkpoints):
        return
    paths = {checkpoint.path for checkpoint in ends}
    between = sum(checkpoint.path not in paths for checkpoint in selection.opened)
    if between:
        log.info(
            "the learning rate is cyclical, and %d of %d selected checkpoints are from the middle "
            "of a cycle: --at-lr-min takes the %d at the ends of cycles",
            between, len(selection), len(ends),
        )  # fmt: skip
