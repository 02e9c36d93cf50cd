"""Notes on a run and on what is selected of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptavg.run import Run

log = logging.getLogger("ckptavg")
_FEWEST_CYCLES = 2


def note_run(run: Run) -> None:
    """Note what a person should know of how a run was found and read."""
    for note in run.notes:
        log.info(note)
    for path, why in run.left_out:
        log.debug("%s is left out: %s", path, why)
    for checkpoint in run.opened:
        for note in checkpoint.notes:
            log.debug("%s: %s", checkpoint.path, note)
    for note in dict.fromkeys(note for checkpoint in run.opened for note in checkpoint.notes):
        log.info(note)


def note_selection(run: Run, selection: Run, *, ends: str = "at_lr_min()") -> None:
    """Note what a selection of a run took, and that the ends of cycles are another one.

    Args:
        run: All of the run.
        selection: What is averaged of it.
        ends: What takes the ends of cycles, in the caller's words.
    """
    for note in selection.notes[len(run.notes) :]:
        log.info(note)
    note_cycles(run, selection, ends)


def note_cycles(run: Run, selection: Run, ends_by: str) -> None:
    """Note that a selection has more of a cyclical run than the ends of its cycles.

    Checkpoints from the middle of a cycle were saved at a high learning rate, and averages without
    them do better (Izmailov et al. 2018, 3.2).

    Args:
        run: All checkpoints of a training.
        selection: What is averaged of them.
        ends_by: What takes the ends of cycles.
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
            "of a cycle: %s takes the %d at the ends of cycles",
            between, len(selection), ends_by, len(ends),
        )  # fmt: skip
