"""What training recorded beside the weights: step, epoch, learning rate, metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ckptavg.formats.storage import Location
from ckptavg.formats.table import Record

STEP_NAMES = (
    "global_step", "step", "steps", "iter_num", "iteration", "iter", "num_updates", "train_step",
    "current_step", "total_steps",
)  # fmt: skip
EPOCH_NAMES = ("epoch", "epochs", "current_epoch")
LR_NAMES = ("lr", "learning_rate")
OPTIMIZER_NAMES = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim", "optimizers")
_NOT_METRICS = frozenset(
    [
        "args",
        "config",
        "cfg",
        "hparams",
        "hyper_parameters",
        "opt",
        "rng",
        "rng_state",
        "scaler",
        "grad_scaler",
        "loops",
        "callbacks",
        "scheduler",
        "lr_scheduler",
        "lr_schedulers",
        "scheduler_state_dict",
        "lr_scheduler_state_dict",
        "version",
        "seed",
    ]
) | frozenset(STEP_NAMES + EPOCH_NAMES + LR_NAMES + OPTIMIZER_NAMES)
_MOST_METRICS = 200
_MOST_LOOKED_AT = 100_000  # entries: a file can hold one dict under very many names
_LONGEST_NAME = 200


def from_tree(tree: Any, weights_key: str) -> Record:
    """Record of a ``torch.save`` file whose weights lie under ``weights_key``."""
    if not isinstance(tree, dict) or weights_key == "":
        top = tree if isinstance(tree, dict) else {}
        return _from_mapping({k: v for k, v in top.items() if number(v) is not None})
    return _from_mapping(
        {k: v for k, v in tree.items() if k != weights_key.split(".", maxsplit=1)[0]}
    )


def from_metadata(metadata: Mapping[str, str]) -> Record:
    """Record of a safetensors file, from the numbers in its metadata."""
    values: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            values[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            continue
    return _from_mapping(values)


def from_trainer_state(path: Location) -> Record | None:
    """Record of a directory written by the Hugging Face Trainer; None where there is none."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(state, dict):
        return None
    step, epoch = whole_number(state.get("global_step")), _finite(state.get("epoch"))
    lr: float | None = None
    metrics: dict[str, float] = {}
    history = state.get("log_history")
    for entry in history if isinstance(history, list) else []:
        if not isinstance(entry, dict) or (number(entry.get("step")) or 0) > (step or math.inf):
            continue
        lr = number(entry.get("learning_rate")) if "learning_rate" in entry else lr
        metrics |= {
            str(k): float(v)
            for k, v in entry.items()
            if number(v) is not None and k not in ("step", "epoch", "learning_rate")
        }
    return Record(step, epoch, lr, metrics)


def number(value: Any) -> float | None:
    """The value if it is a number that a float can hold (a bool is none)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return value if isinstance(value, float) or abs(value) < 2**1000 else None


def _finite(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def whole_number(value: Any) -> int | None:
    """The value as an integer if it is a whole number."""
    found = number(value)
    if found is None or not math.isfinite(found) or found != int(found):
        return None
    return int(found)


def _from_mapping(values: Mapping[Any, Any]) -> Record:
    step = next((s for n in STEP_NAMES if (s := whole_number(values.get(n))) is not None), None)
    epoch = next((e for n in EPOCH_NAMES if (e := _finite(values.get(n))) is not None), None)
    return Record(step, epoch, _learning_rate(values), _metrics(values))


def _learning_rate(values: Mapping[Any, Any]) -> float | None:
    for name in LR_NAMES:
        value = values.get(name)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        if _finite(value) is not None:
            return _finite(value)
    for name in OPTIMIZER_NAMES:
        optimizer = values.get(name)
        if isinstance(optimizer, (list, tuple)) and optimizer:
            optimizer = optimizer[0]
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], dict):
            return _finite(groups[0].get("lr"))
    return None


def _metrics(values: Mapping[Any, Any]) -> dict[str, float]:
    """Every other number by dotted name, down to a few levels."""
    found: dict[str, float] = {}
    looked_at = 0
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", values)]
    while waiting and len(found) < _MOST_METRICS and looked_at < _MOST_LOOKED_AT:
        prefix, entries = waiting.pop()
        looked_at += len(entries)
        for name, value in entries.items():
            if not isinstance(name, str) or len(name) > _LONGEST_NAME:
                continue
            if not prefix and name in _NOT_METRICS:
                continue
            if number(value) is not None:
                found[prefix + name] = float(value)
            elif isinstance(value, dict) and prefix.count(".") < 2:
                waiting.append((f"{prefix}{name}.", value))
    return found
