"""The record that the Hugging Face Trainer writes into its checkpoints: ``trainer_state.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ckptavg.formats.checkpoint import Record
from ckptavg.formats.metric_names import is_bookkeeping
from ckptavg.formats.training_record import finite, number, whole_number
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location, ancestors

TRAINER_STATE = "trainer_state.json"
# A directory as the Trainer names it.
_TRAINERS = re.compile(r"checkpoint-\d+")
# Levels below the Trainer's directory at which weights may be stored.
_DEEPEST_WEIGHTS = 4


def find_record(directory: Location) -> Record | None:
    """Read the Trainer's record of a checkpoint from the directory, or from one above.

    Among the directories above only a ``checkpoint-500`` counts: the record of a whole run is that
    of the run's last step.
    """
    above = ancestors(directory, _DEEPEST_WEIGHTS)
    homes = [directory, *(parent for parent in above if _TRAINERS.fullmatch(parent.name))]
    for home in homes:
        record = read_record(home)
        if record is not None:
            return record
    return None


def read_record(directory: Location) -> Record | None:
    """Read the Trainer's record in a directory.

    Returns:
        The record; None if there is no ``trainer_state.json``, or if the file is no JSON object.

    Raises:
        CheckpointError: The file cannot be read to the end.
    """
    try:
        state = bounded_json.read(directory / TRAINER_STATE)
    except ValueError:
        return None
    if not isinstance(state, dict):
        return None
    step, epoch = whole_number(state.get("global_step")), finite(state.get("epoch"))
    lr: float | None = None
    metrics: dict[str, float] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        logged = whole_number(entry.get("step")) if isinstance(entry, dict) else None
        if logged is None or step is None or logged > step:
            continue
        # A rate is valid until the next rate. A metric is valid for the weights of one step.
        lr = number(entry.get("learning_rate")) if "learning_rate" in entry else lr
        if logged == step:
            metrics |= _measured(entry)
    return Record(step, epoch, lr, metrics)


def _measured(entry: Mapping[Any, Any]) -> dict[str, float]:
    """Select the metrics in an entry of the Trainer's log."""
    return {
        str(name): float(value)
        for name, value in entry.items()
        if number(value) is not None and not is_bookkeeping(str(name))
    }
