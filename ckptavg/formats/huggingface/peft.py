"""PEFT adapters: directories with ``adapter_config.json`` and the tensors of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptavg.errors import CheckpointError, short
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (WEIGHTS, "adapter_model.bin")
# Settings of variants of LoRA whose merged weights are not linear in the product BA.
_VARIANTS = (
    "use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config",
    "velora_config",
)  # fmt: skip
# Initializations that leave the base model unchanged.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def find_weights(directory: Location) -> Location | None:
    """Return the weights file of an adapter; None if the directory is no adapter."""
    if not (directory / CONFIG).is_file():
        return None
    for name in FILES:
        if (directory / name).is_file():
            return directory / name
    return None


def read_configuration(directory: Location) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: The file cannot be read, or is no JSON object.
    """
    path = directory / CONFIG
    try:
        config = bounded_json.read(path)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}"[:300]) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return config


def describe(config: Mapping[str, Any]) -> str:
    """Describe an adapter for a note: the type, the rank, and obstacles to an average."""
    kind, rank = short(str(config.get("peft_type"))), short(str(config.get("r")))
    if why := why_no_mean(config):
        return f"an adapter of type {kind} that cannot be averaged: it {why}"
    return (
        f"a LoRA adapter of rank {rank}; an average of several is exact, with their ranks stacked"
    )


def why_no_mean(config: Mapping[str, Any]) -> str:
    """Return the reason against averaging adapters of a configuration; empty if there is none.

    The mean of the merged weights then is no adapter of the same kind.
    """
    variants = [name for name in _VARIANTS if config.get(name)]
    start = config.get("init_lora_weights")
    if config.get("peft_type") != "LORA":
        return f"is of type {short(config.get('peft_type'))}, of which no exact mean is known"
    if variants:
        return f"has {', '.join(variants)}, under which the weights are not linear in BA"
    if start not in _PLAIN_STARTS:
        return f"was started by {short(start)}, which changes the base model by its rank"
    if config.get("target_parameters") and config.get("rank_pattern"):
        return "has target_parameters and a rank_pattern, whose ranks cannot be told apart"
    return ""
