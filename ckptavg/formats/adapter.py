"""PEFT adapters: a directory with adapter_config.json and the adapter's own tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError, short

LAYOUT = "peft"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (WEIGHTS, "adapter_model.bin")
_MAX_CONFIG = 10_000_000


def weights_file(directory: Path) -> Path | None:
    """The weights of an adapter's directory; None if it is none."""
    if not (directory / CONFIG).is_file():
        return None
    return next((directory / name for name in FILES if (directory / name).is_file()), None)


def configuration(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises:
        CheckpointError: It cannot be read, or is no JSON object.
    """
    path = directory / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG:
            raise ValueError(f"it is larger than {_MAX_CONFIG} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}"[:300]) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def description(config: dict[str, Any]) -> str:
    """What kind of adapter it is, for a note."""
    kind = config.get("peft_type")
    if kind == "LORA" and isinstance(config.get("r"), int):
        return f"a LoRA adapter of rank {config['r']}, which is averaged with its ranks stacked"
    return f"an adapter of type {short(kind)}"
