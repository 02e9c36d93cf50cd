"""The numbers that training recorded beside the weights: step, epoch, learning rate, metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import PurePath, PureWindowsPath
from typing import Any, TypeVar

from ckptavg.formats.checkpoint import Record
from ckptavg.formats.metric_names import SETTINGS, is_bookkeeping
from ckptavg.formats.safe_pickle.values import TensorView

Number = TypeVar("Number", int, float)

# Names of the step counter, in the order of trial.
STEP_NAMES = (
    "global_step", "global_steps", "step", "steps", "iter_num", "iteration", "iter", "num_updates",
    "train_step", "current_step", "total_steps", "batch_idx_train", "cur_step", "cur_iter",
    "current_iter", "global_iter", "train_iter", "n_iter", "num_iter", "iterations", "num_steps",
    "completed_steps", "steps_run", "num_timesteps", "timesteps",
)  # fmt: skip
EPOCH_NAMES = (
    "epoch", "epochs", "current_epoch", "cur_epoch", "completed_epochs", "epochs_done",
    "epochs_run", "epoch_idx", "epoch_num", "ep",
)  # fmt: skip
# Entries in which trainers keep counters that are not beside the weights.
_CLOCKS = (
    "meta", "trainer_state", "train_state", "training_state", "trainer", "progress",
    "train_progress", "state", "extra_state", "reporter", "counters", "info",
)  # fmt: skip
# Levels below the weights' neighbours at which counters are searched.
_DEEPEST_CLOCK = 2
# Entries with the state of an optimization, which does not fit averaged weights. The settings of
# an optimizer and fairseq's history of optimizers hold no such state.
TRAINING_STATE = re.compile(
    r"(?i)(?=.*(?:optim|sched|(?<!up)(?<!down)scaler)).*(?<!config)(?<!cfg)(?<!args)(?<!params)(?<!history)(?<!name)"
)
# Keys of an optimizer's state dict, by which the state is recognized under any name.
OPTIMIZER_KEYS = frozenset(["state", "param_groups"])
LR_NAMES = ("lr", "learning_rate")
OPTIMIZER_NAMES = (
    "optimizer", "optimizer_state_dict", "optimizer_states", "optim", "optimizers",
    "last_optimizer_state",
)  # fmt: skip
# Entries that hold no metrics, whatever the contents.
_NOT_METRICS = SETTINGS | frozenset([
    "callbacks", "checkpoint_parallel_dimensions", "dp_world_size", "loops", "mp_world_size",
    "rng", "rng_state", "saver", "timestamp", "train_iterator", *STEP_NAMES, *EPOCH_NAMES,
    *LR_NAMES, *OPTIMIZER_NAMES,
])  # fmt: skip
# Most metrics, and most tensors of one number that are read from a file.
_MOST_METRICS = 200
# Most entries that are looked at, since a file can hold one dict under very many names.
_MOST_LOOKED_AT = 100_000
# Characters in the name of a metric.
_LONGEST_NAME = 200


def from_tree(
    tree: Any,
    weights_key: str,
    file_name: str = "",
    read: Callable[[TensorView], float | None] = lambda _: None,
) -> Record:
    """Build the record of a ``torch.save`` file.

    Args:
        tree: The saved object.
        weights_key: Dotted path of the entry that holds the weights.
        file_name: The file's name, under which some trainers list the file's score.
        read: Function that returns the value of a 0-d tensor, since some trainers record numbers as
            tensors.

    Returns:
        The record; without metrics from nested entries if the object itself is the state dict.
    """
    if not isinstance(tree, dict):
        return Record()
    if weights_key == "":
        return _from_mapping({k: v for k, v in tree.items() if number(v) is not None})
    neighbours = _entries_beside(tree, weights_key)
    numbers = _Numbers(read)
    record = _from_mapping({k: numbers.plain(v) for k, v in neighbours.items()}, numbers)
    monitored = _monitored(neighbours.get("callbacks"), file_name, numbers)
    return replace(record, metrics={**record.metrics, **monitored})


class _Numbers:
    """A converter of recorded values to numbers, with a limit on the tensors that are read."""

    def __init__(self, read: Callable[[TensorView], float | None]) -> None:
        self._read, self._left = read, _MOST_METRICS

    def plain(self, value: Any) -> Any:
        """Return the number in a 0-d tensor, and any other value unchanged."""
        if not isinstance(value, TensorView) or value.shape or not self._left:
            return value
        # Each tensor costs a read of the file, so an untrusted file gets a limited number.
        self._left -= 1
        return self._read(value)


def _entries_beside(tree: Mapping[Any, Any], weights_key: str) -> dict[Any, Any]:
    """Collect the entries beside the weights, and beside each entry around the weights."""
    neighbours: dict[Any, Any] = {}
    entries: Any = tree
    for part in weights_key.split("."):
        if not isinstance(entries, dict):
            break
        neighbours |= {name: value for name, value in entries.items() if name != part}
        entries = entries.get(part)
    return neighbours


def _monitored(callbacks: Any, file_name: str, numbers: _Numbers) -> dict[str, float]:
    """Collect the scores that Lightning's ModelCheckpoint keeps, by the name of the metric.

    Each instance of ModelCheckpoint lists the files that are kept, with scores. Only the score
    listed for this file is taken: an instance that did not write this file may hold the current
    score of an earlier file.
    """
    scores: dict[str, float] = {}
    if not isinstance(callbacks, dict):
        return scores
    files_left = _MOST_LOOKED_AT
    for state in islice(callbacks.values(), _MOST_METRICS):
        if not isinstance(state, dict) or not isinstance(state.get("monitor"), str):
            continue
        scored_files = state.get("best_k_models")
        if not isinstance(scored_files, dict) or len(scored_files) > files_left:
            continue
        files_left -= len(scored_files)
        for path, score in scored_files.items():
            if isinstance(path, str) and last_part(path) == file_name:
                value = number(numbers.plain(score))
                if value is not None:
                    scores[state["monitor"]] = float(value)
    return scores


def last_part(path: str) -> str:
    """Return the file's name in a path, even if the checkpoint was written on Windows."""
    if "\\" in path:
        return PureWindowsPath(path).name
    return PurePath(path).name


def from_metadata(metadata: Mapping[str, str]) -> Record:
    """Build the record of a safetensors file from the numbers in the metadata."""
    values: dict[str, Any] = {}
    for name, text in metadata.items():
        try:
            values[name] = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            continue
    return _from_mapping(values)


def number(value: Any) -> float | None:
    """Return a value that is a number within the range of a float, else None (for a bool too)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # A float ends at 2**1024, and a pickle can hold an int of any size.
    if isinstance(value, int) and abs(value) >= 2**1000:
        return None
    return value


def finite(value: Any) -> float | None:
    """Return a finite number; return None for any other value."""
    converted = number(value)
    if converted is None or not math.isfinite(converted):
        return None
    return converted


def whole_number(value: Any) -> int | None:
    """Return a whole number as an integer; return None for any other value."""
    converted = number(value)
    if converted is None or not math.isfinite(converted) or converted != int(converted):
        return None
    return int(converted)


def _from_mapping(values: Mapping[Any, Any], numbers: _Numbers | None = None) -> Record:
    values = {**_clock(values), **values}
    step, epoch = _position(values, numbers)
    # Some trainers write a negative epoch at the end of training.
    if epoch is not None and epoch < 0:
        epoch = None
    return Record(step, epoch, _learning_rate(values), _metrics(values, numbers))


def _position(
    values: Mapping[Any, Any], numbers: _Numbers | None
) -> tuple[int | None, float | None]:
    """Find step and epoch among values, or in the nested entries that hold counters."""
    step: int | None = None
    epoch: float | None = None
    # Level by level, so that the counters nearest to the weights are taken.
    level = [values]
    for _ in range(_DEEPEST_CLOCK + 1):
        for entries in level:
            plain = _plain_counters(entries, numbers)
            if step is None:
                step = _first(whole_number, STEP_NAMES, plain)
            if epoch is None:
                epoch = _first(finite, EPOCH_NAMES, plain)
        level = _clocks_below(level)
    return step, epoch


def _plain_counters(entries: Mapping[Any, Any], numbers: _Numbers | None) -> dict[str, Any]:
    """Select the entries with names of steps and epochs, as numbers."""
    counters: dict[str, Any] = {}
    for name in (*STEP_NAMES, *EPOCH_NAMES):
        if name in entries:
            counters[name] = numbers.plain(entries[name]) if numbers else entries[name]
    return counters


def _clocks_below(level: Sequence[Mapping[Any, Any]]) -> list[Mapping[Any, Any]]:
    """List the nested entries that hold counters, and are no state of an optimizer."""
    clocks: list[Mapping[Any, Any]] = []
    for entries in level:
        for name in _CLOCKS:
            entry = entries.get(name)
            if isinstance(entry, dict) and not OPTIMIZER_KEYS & entry.keys():
                clocks.append(entry)
    return clocks


def _first(
    convert: Callable[[Any], Number | None], names: Sequence[str], values: Mapping[Any, Any]
) -> Number | None:
    """Return the first value that converts to a number, in the order of the names."""
    for name in names:
        value = convert(values.get(name))
        if value is not None:
            return value
    return None


def _clock(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Find step and epoch in Composer's timestamp or fairseq's history."""
    timestamp, history = values.get("timestamp"), values.get("optimizer_history")
    if isinstance(timestamp, dict):
        timestamp = timestamp.get("Timestamp", timestamp)
    if isinstance(timestamp, dict):
        return {"step": timestamp.get("batch"), "epoch": timestamp.get("epoch")}
    if isinstance(history, list) and history and isinstance(history[-1], dict):
        return {"num_updates": history[-1].get("num_updates")}
    return {}


def _learning_rate(values: Mapping[Any, Any]) -> float | None:
    """Find the learning rate, beside the weights or in the first group of an optimizer."""
    for name in LR_NAMES:
        rate = finite(_first_element(values.get(name)))
        if rate is not None:
            return rate
    for name in OPTIMIZER_NAMES:
        optimizer = _first_element(values.get(name))
        if isinstance(optimizer, dict) and "param_groups" not in optimizer:
            # Several optimizers by name: the first counts.
            optimizer = next(iter(optimizer.values()), None)
        if isinstance(optimizer, dict):
            groups = optimizer.get("param_groups")
            if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], dict):
                return finite(groups[0].get("lr"))
    return None


def _first_element(value: Any) -> Any:
    """Return the first element of a list or a tuple, and any other value unchanged."""
    return value[0] if isinstance(value, (list, tuple)) and value else value


def _metrics(values: Mapping[Any, Any], numbers: _Numbers | None) -> dict[str, float]:
    """Collect the other numbers by dotted name, three levels deep."""
    metrics: dict[str, float] = {}
    looked_at = 0
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", values)]
    while waiting and len(metrics) < _MOST_METRICS and looked_at < _MOST_LOOKED_AT:
        prefix, entries = waiting.pop()
        looked_at += len(entries)
        # Numbers in a nested state dict belong to a network, and are no metrics.
        if prefix and holds_weights(entries):
            continue
        for name, value in entries.items():
            if not isinstance(name, str) or len(name) > _LONGEST_NAME or name in _NOT_METRICS:
                continue
            if isinstance(value, dict):
                if prefix.count(".") < 2 and not TRAINING_STATE.fullmatch(name):
                    waiting.append((f"{prefix}{name}.", value))
                continue
            plain = numbers.plain(value) if numbers else value
            if number(plain) is not None and not is_bookkeeping(name):
                metrics[prefix + name] = float(plain)
    return metrics


def holds_weights(entries: Mapping[Any, Any]) -> bool:
    """Return True if a tensor with at least one dimension is among some entries."""
    return any(isinstance(value, TensorView) and value.shape for value in entries.values())
