"""What of an input's other contents goes out again: plain values and a few known harmless types.

A checkpoint holds more than weights, and what loads it wants some of that back: hyperparameters,
arguments, the epoch. Nothing else of an input may leave under our name: not its other tensors,
which are not those of the average, and no object whose class is not on the list below.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import types
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ckptavg.errors import first_few, short
from ckptavg.formats.checkpoint import DTYPES
from ckptavg.formats.metric_names import is_metric
from ckptavg.formats.safe_pickle.values import Global, Opaque, Refused, TensorView, name_of
from ckptavg.formats.training_record import OPTIMIZER_KEYS, TRAINING_STATE, holds_weights, number
from ckptavg.formats.tree import join

_LONGEST_NAME = 1000  # characters: below long names many entries would take much memory
_DEEPEST = 100  # levels; a pickler goes down by recursion
_DEEPEST_METRIC = 4
_MOST_NAMES = 30  # in a note
_SCALARS = (str, bytes, int, float, bool, type(None))
_DROPPED = object()
_MEASURED = object()  # dropped, as all of it was measured on the input
_CALLBACKS = "callbacks"  # whose states Lightning keeps by their names
_CALLBACK_SCORES = frozenset(["best_model_score", "current_score", "best_score"])


def _namespace(cls: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def make(_: Any, state: Any) -> Any:
        if any(isinstance(name, str) and name.startswith("__") for name in state):
            raise ValueError("names that a pickler looks up would be called by it")
        return cls(**{name: value for name, value in state.items() if isinstance(name, str)})

    return make


def _path(args: Any, _: Any) -> Any:
    """A path of this system's own kind, which one of the other's is not."""
    return pathlib.PurePath(*args) if os.name == "nt" else pathlib.PosixPath(*args)


def _built(cls: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda args, _: cls(*args)


def _uuid(_: Any, state: Any) -> Any:
    return uuid.UUID(int=state["int"])


# Every type that goes out besides plain values: how one is made of its pickled parts.
HARMLESS: dict[tuple[str, str], Callable[[Any, Any], Any]] = {
    ("argparse", "Namespace"): _namespace(argparse.Namespace),
    ("types", "SimpleNamespace"): _namespace(types.SimpleNamespace),
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "PurePosixPath"): _built(pathlib.PurePosixPath),
    ("pathlib", "WindowsPath"): _built(pathlib.PureWindowsPath),
    ("pathlib", "PureWindowsPath"): _built(pathlib.PureWindowsPath),
    ("datetime", "datetime"): _built(datetime.datetime),
    ("datetime", "date"): _built(datetime.date),
    ("datetime", "time"): _built(datetime.time),
    ("datetime", "timedelta"): _built(datetime.timedelta),
    ("datetime", "timezone"): _built(datetime.timezone),
    ("uuid", "UUID"): _uuid,
    ("torch", "device"): _built(torch.device),
}
HARMLESS |= {
    ("pathlib._local", name): HARMLESS["pathlib", name]
    for _, name in [*HARMLESS]
    if ("pathlib", name) in HARMLESS
}  # where Python 3.13 keeps them
_PLAIN = {("torch", "device")}  # of these, what torch.load's safe default reads


@dataclass
class Keeper:
    """Goes through a saved object and keeps what may go out again.

    Args:
        key: Dotted path of the entry that holds the weights.
        plain: Keep only what ``torch.load`` reads by its safe default.
        tensor: What stands for a tensor in the output, given the tensor and whether it stands
            among other values; None if it may not go out.
        replaced: What to put in the place of an object, by the object's identity.
        networks: Dotted paths below the key, where it holds several networks.
        momentary: Names of recorded numbers that are true of the input alone.

    Attributes:
        dropped: Dotted names of what was not kept.
        measured: Dotted names of metrics of the input, which are not those of the output.
    """

    key: str
    plain: bool
    tensor: Callable[[TensorView, bool], Any]
    replaced: Mapping[int, Any]
    networks: Sequence[str] = ()
    momentary: Collection[str] = ()
    dropped: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    _done: dict[int, tuple[Any, int]] = field(default_factory=dict)
    _reached: int = 0

    @property
    def notes(self) -> list[str]:
        """What a person should know of what was not kept."""
        notes: list[str] = []
        if self.dropped:
            names = first_few(self.dropped, _MOST_NAMES)
            notes.append(f"not taken over from the last checkpoint: {names}")
        if self.measured:
            names = first_few(self.measured, _MOST_NAMES)
            notes.append(f"measured on the last checkpoint, so not taken over: {names}")
        return notes

    def whole(self, saved: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Any:
        """What was saved, without what may not go out."""
        if isinstance(saved, dict):
            return self.entries(saved)
        return type(saved)(self.elements(saved))

    def elements(self, values: Sequence[Any], prefix: str = "", depth: int = 0) -> list[Any]:
        """The elements of a list; None stands for one that may not go out."""
        kept: list[Any] = []
        for index, value in enumerate(values):
            where = _below(prefix, str(index))
            part = self._keep(value, where + ".", depth + 1)
            if part is _DROPPED:
                self.dropped.append(where)
            kept.append(None if part is _DROPPED else part)
        return kept

    def entries(
        self, values: Mapping[Any, Any], prefix: str = "", depth: int = 0
    ) -> dict[Any, Any]:
        """The entries of a dict that may go out, as far as they may."""
        kept: dict[Any, Any] = {}
        # Beside the weights a tensor is a random generator's state, and no weight called "score".
        is_model = holds_weights(values) and not self._leads_to_weights(prefix)
        metrics = depth < _DEEPEST_METRIC and not is_model
        for name, value in values.items():
            where = _below(prefix, short(name))
            if metrics and self._is_measured(where, name, value):
                part = _MEASURED
            elif isinstance(value, TensorView):
                part = _or_dropped(self.tensor(value, True))
            elif self._is_training(prefix, name, value):
                part = _DROPPED
            else:
                part = self._keep(value, where + ".", depth + 1)
            if part is _MEASURED:
                self.measured.append(where)
            elif part is _DROPPED or not isinstance(name, (str, int, float, tuple, type(None))):
                self.dropped.append(where)
            else:
                kept[name] = part
        return kept

    def _is_measured(self, where: str, name: Any, value: Any) -> bool:
        """Whether an entry is a metric of the input, or a callback's state that is kept by one."""
        if not isinstance(name, str):
            return False
        if isinstance(value, dict):
            place = where.removesuffix(short(name)).split(".")
            return _CALLBACKS in place and not _CALLBACK_SCORES.isdisjoint(value)
        scalar = isinstance(value, TensorView) and not value.shape
        if not scalar and number(value) is None:
            return False
        # What stands beside the weights is recorded by its name there.
        beside = self._leads_to_weights(where.removesuffix(name)) and name in self.momentary
        return is_metric(where) or where in self.momentary or beside

    def _is_training(self, prefix: str, name: Any, value: Any) -> bool:
        """Whether an entry beside the weights is an optimizer's or a scheduler's state.

        Only there: a hyperparameter may be called ``optimizer`` too, and so may a name.
        """
        if isinstance(value, _SCALARS) or not isinstance(name, str):
            return False
        return self._leads_to_weights(prefix) and bool(TRAINING_STATE.fullmatch(name))

    def _leads_to_weights(self, prefix: str) -> bool:
        return prefix in self._above_weights

    @cached_property
    def _above_weights(self) -> set[str]:
        """What the dotted paths of entries with weights begin with, up to any of their dots."""
        prefixes = {""}
        for entry in (self.key, *(join(self.key, path) for path in self.networks)):
            dots = (i for i, letter in enumerate(entry[:_LONGEST_NAME]) if letter == ".")
            prefixes.update(entry[: i + 1] for i in dots)
        return prefixes

    def _keep(self, value: Any, prefix: str, depth: int) -> Any:
        if id(value) in self.replaced:
            return self.replaced[id(value)]
        if isinstance(value, _SCALARS):
            return value
        if depth > _DEEPEST:
            return _DROPPED
        if id(value) not in self._done:
            self._done[id(value)] = _DROPPED, 0  # what holds itself
            above, self._reached = self._reached, depth
            part = self._convert(value, prefix, depth)
            self._done[id(value)] = part, self._reached - depth
            self._reached = max(self._reached, above)
        part, levels = self._done[id(value)]
        if depth + levels > _DEEPEST:  # shared with a place that is less deep
            return _DROPPED
        self._reached = max(self._reached, depth + levels)
        return part

    def _convert(self, value: Any, prefix: str, depth: int) -> Any:
        if isinstance(value, dict):
            return self._mapping(value, prefix, depth)
        if isinstance(value, (list, tuple)) and self._leads_to_weights(prefix):
            return type(value)(self.elements(value, prefix, depth))
        if isinstance(value, (list, tuple)):
            parts = [
                self._keep(part, _below(prefix, f"{i}."), depth + 1) for i, part in enumerate(value)
            ]
            return _DROPPED if any(part is _DROPPED for part in parts) else type(value)(parts)
        if isinstance(value, Opaque):
            return self._object(value, prefix, depth)
        return self._leaf(value)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, TensorView):
            return _or_dropped(self.tensor(value, False))
        if isinstance(value, Global) and value.module == "torch" and value.name in DTYPES:
            return getattr(torch, value.name)
        plain = isinstance(value, set) and all(isinstance(part, _SCALARS) for part in value)
        return value if plain else _DROPPED

    def _mapping(self, value: dict[Any, Any], prefix: str, depth: int) -> Any:
        """A dict without what may not go out; none at all if nothing is left.

        None either if it is weights (mostly tensors), of which only small ones would be left and
        pass for a whole, or an optimizer's state, whatever it is called.
        """
        if value.keys() >= OPTIMIZER_KEYS:
            return _DROPPED
        tensors = [v for v in value.values() if isinstance(v, (TensorView, Refused))]
        others = [t for t in tensors if isinstance(t, Refused) or self.tensor(t, False) is None]
        weights = others and 2 * len(tensors) > len(value)
        before, measured = len(self.dropped), len(self.measured)
        kept = {} if weights else self.entries(value, prefix, depth)
        if not value or kept:
            return kept
        # the parent names the whole
        whole = _MEASURED if len(self.measured) - measured == len(value) else _DROPPED
        del self.dropped[before:], self.measured[measured:]
        return whole

    def _object(self, value: Opaque, prefix: str, depth: int) -> Any:
        name = name_of(value.type)
        make = HARMLESS.get(name)
        if make is None or value.items or (self.plain and name not in _PLAIN):
            return _DROPPED
        args = self._keep(value.args, prefix, depth + 1)
        state = self._keep(value.state, prefix, depth + 1)
        try:
            return make(args, state)
        except Exception:  # not the parts that this type is made of
            return _DROPPED


def _below(prefix: str, name: str) -> str:
    """The dotted name of an entry, cut where it is longer than any that leads to weights."""
    return (prefix + name)[:_LONGEST_NAME]


def _or_dropped(value: Any) -> Any:
    return _DROPPED if value is None else value
