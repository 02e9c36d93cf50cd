"""Directories of unfinished checkpoints, left by a crash during the save."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptavg.errors import RunError
from ckptavg.formats.dcp import reader
from ckptavg.formats.huggingface import layout, peft
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.numbered import weights_below


def find_unfinished(directories: Sequence[Location]) -> dict[Location, RunError]:
    """Find the directories of unfinished checkpoints, each with an error."""
    errors = {path: why_unfinished(path) for path in directories}
    return {path: error for path, error in errors.items() if error is not None}


def why_unfinished(directory: Location) -> RunError | None:
    """Word the error for a directory whose save was not finished; None for other directories."""
    numbered = re.fullmatch(r"checkpoint[-_]\d+", directory.name)
    # Without its configuration, an adapter is not recognized as a checkpoint.
    if numbered and any(directory.glob("adapter_model.*")):
        return RunError(
            f"{directory} holds an adapter without its {peft.CONFIG}",
            "Copy that file beside it: it holds the rank and the scale.",
        )
    why = ""
    if any(directory.glob(f"*{reader.SUFFIX}")):
        why = (
            f"holds parts of one model but no {reader.METADATA}, which is written last and says "
            "how they fit"
        )
    elif numbered and (directory / layout.TRAINER_STATE).is_file() and not weights_below(directory):
        why = "looks like a checkpoint but holds no weights"
    if not why:
        return None
    return RunError(
        f"{directory} {why}",
        "It may have been interrupted while being saved: copy it again, or name the other "
        "checkpoints one by one.",
    )
