"""The configuration of a model, ``config.json``, in the model's directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.huggingface import layout
from ckptavg.formats.huggingface.format import HUGGINGFACE
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location


def configured_directory(checkpoint: Checkpoint) -> Location | None:
    """Find the directory whose ``config.json`` describes a checkpoint's model, else None."""
    directory = checkpoint.path
    if directory.name in layout.WEIGHT_FILES:
        # A file of weights with a default name belongs to the model directory that holds the file.
        directory = directory.parent
    elif checkpoint.format is not HUGGINGFACE:
        return None
    if not (directory / layout.CONFIG).is_file():
        return None
    return directory


def read_configuration(directory: Location) -> Mapping[str, Any]:
    """Read a directory's ``config.json``; return an empty dict if the file is no JSON object."""
    try:
        configuration = bounded_json.read(directory / layout.CONFIG)
    except (OSError, ValueError, CheckpointError):
        return {}
    if not isinstance(configuration, dict):
        return {}
    return configuration
