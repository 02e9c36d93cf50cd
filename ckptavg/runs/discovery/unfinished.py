"""Directories of unfinished checkpoints, left by a crash during the save."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptavg.errors import RunError
from ckptavg.formats import registry
from ckptavg.formats.format import Unfinished
from ckptavg.formats.huggingface.trainer_state import TRAINER_STATE
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.numbered import find_weights_below

_COPY_AGAIN = (
    "It may have been interrupted while being saved: copy it again, or name the other checkpoints "
    "one by one."
)


def find_unfinished(directories: Sequence[Location]) -> dict[Location, RunError]:
    """Find the directories of unfinished checkpoints, each with an error."""
    errors: dict[Location, RunError] = {}
    for path in directories:
        error = why_unfinished(path)
        if error is not None:
            errors[path] = error
    return errors


def why_unfinished(directory: Location) -> RunError | None:
    """Word the error for a directory whose save was not finished; None for other directories."""
    unfinished = registry.why_unfinished(directory)
    if unfinished is None:
        # The Trainer's own file marks a checkpoint, whatever the format of the weights.
        is_numbered = re.fullmatch(r"checkpoint[-_]\d+", directory.name)
        has_state = is_numbered and (directory / TRAINER_STATE).is_file()
        if not has_state or find_weights_below(directory):
            return None
        unfinished = Unfinished("looks like a checkpoint but holds no weights")
    return RunError(f"{directory} {unfinished.reason}", unfinished.remedy or _COPY_AGAIN)
