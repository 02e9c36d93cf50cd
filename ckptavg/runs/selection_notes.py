"""Notes on a run and on a selection from the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckptavg.runs.rate_cycles import find_length, find_minima, find_restarts

if TYPE_CHECKING:
    from ckptavg.formats import Checkpoint
    from ckptavg.runs.run import Run

log = logging.getLogger("ckptavg")
_FEWEST_CYCLES = 2


def note_run(run: Run) -> None:
    """Log the notes about the search for a run and about the opened checkpoints."""
    for note in run.notes:
        log.info(note)
    for left_out in run.excluded:
        log.debug("%s is left out: %s", left_out.path, left_out.why)
    notes: dict[str, None] = {}
    for checkpoint in run.opened:
        for note in checkpoint.notes:
            log.debug("%s: %s", checkpoint.path, note)
            notes.setdefault(note)
    for note in notes:
        log.info(note)


def note_selection(run: Run, selection: Run) -> None:
    """Log the notes of a selection, and advise the ends of cycles where these differ.

    Args:
        run: The whole run.
        selection: Checkpoints of the run to average.
    """
    # The notes of the run come first in the selection, and are logged by ``note_run``.
    for note in selection.notes[len(run.notes) :]:
        log.info(note)
    note_cycles(run, selection)


def note_cycles(run: Run, selection: Run) -> None:
    """Log a note if a selection has more of a cyclical run than the ends of cycles.

    Checkpoints from the middle of a cycle were saved at a high learning rate, and averages without
    them do better (Izmailov et al. 2018, 3.2).

    Args:
        run: All checkpoints of a training.
        selection: Checkpoints of the run to average.
    """
    # With a missing checkpoint, positions in the cycle are not certain.
    if len(run.trainings) != 1 or any(run.damaged):
        return
    (checkpoints,) = run.trainings
    rates = list_rates(checkpoints)
    if not rates:
        return
    after_step = saves_after_step(checkpoints)
    restarts = find_restarts(rates, after_step=after_step)
    ends = restarts or find_minima(rates)
    # The minimum at the beginning of a warm-up ends no cycle. Neighbours with the same rate count
    # once.
    cycles = [position for position in ends if position and position - 1 not in ends]
    if len(cycles) < _FEWEST_CYCLES or len(ends) == len(checkpoints):
        return
    paths = {checkpoints[position].path for position in ends}
    between = sum(checkpoint.path not in paths for checkpoint in selection.opened)
    if between:
        noun = "checkpoints" if selection is run else "selected checkpoints"
        advice = _advise(restarts, len(ends), after_step=after_step)
        log.info(
            "the learning rate is cyclical, and %d of %d %s are from the middle of a cycle%s",
            between, len(selection), noun, advice,
        )  # fmt: skip


def note_restarts(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Word the note that minima of the recorded rate are one checkpoint before cycle ends.

    Args:
        checkpoints: All checkpoints of a training, in order.

    Returns:
        The note; empty where the minima are the ends.
    """
    after_step = saves_after_step(checkpoints)
    restarts = find_restarts(list_rates(checkpoints), after_step=after_step)
    if not restarts:
        return []
    why = "the last checkpoint records the highest rate: if training saves after scheduler.step(),"
    if after_step:
        why = "Lightning saves after the scheduler's step:"
    return [f"{why} the cycles end one checkpoint after these minima"]


def saves_after_step(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return True if rates are known to be rates of the next epoch, as with Lightning."""
    return all(
        "pytorch-lightning_version" in checkpoint.other_entries for checkpoint in checkpoints
    )


def list_rates(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """Return the learning rate of each checkpoint; empty if a checkpoint records no rate."""
    rates: list[float] = []
    for checkpoint in checkpoints:
        if checkpoint.record.lr is None:
            return []
        rates.append(checkpoint.record.lr)
    return rates


def _advise(restarts: Sequence[int], count: int, *, after_step: bool) -> str:
    """Word the selection that takes the ends of cycles.

    Args:
        restarts: Positions of cycle ends that record the next cycle's first rate, if any.
        count: Number of cycle ends.
        after_step: True if the ends are known to record the next cycle's first rate.
    """
    if not restarts:
        return f": `.at_lr_min()` takes the {count} at the ends of cycles"
    length, offset = find_length(restarts), restarts[0] + 1
    if length is None:
        return ""
    selection = f".cycle({length})" if offset == length else f".cycle({length}, {offset})"
    advice = f": `{selection}` takes the {count} at the ends of cycles"
    if after_step:
        return advice
    return f"{advice}, if training saves after scheduler.step()"
