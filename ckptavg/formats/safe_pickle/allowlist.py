"""Filter for the contents of an input beside the weights: plain values and harmless types.

A checkpoint holds more than weights. Programs that load the output need some of the rest:
hyperparameters, arguments, the epoch. Nothing else of an input may go into an output. Other tensors
may not, since they are not tensors of the average. Objects may not, unless the class is on the list
below.
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

# Characters. Dotted names of many entries below a long name would take much memory.
_LONGEST_NAME = 1000
# Levels. The pickler of the output recurses, and would exceed the recursion limit.
_DEEPEST = 100
_DEEPEST_METRIC = 4
# Names in a note.
_MOST_NAMES = 30
_SCALARS = (str, bytes, int, float, bool, type(None))
_DROPPED = object()
# Marks a value that is dropped because it was measured on the input.
_MEASURED = object()
# Entry in which Lightning keeps the states of callbacks, by name.
_CALLBACKS = "callbacks"
_CALLBACK_SCORES = frozenset(["best_model_score", "current_score", "best_score"])


def _namespace(cls: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Return a builder of namespaces that refuses special names."""

    def make(_: Any, state: Any) -> Any:
        """Build a namespace from the pickled state."""
        if any(isinstance(name, str) and name.startswith("__") for name in state):
            raise ValueError("names that a pickler looks up would be called by it")
        return cls(**{name: value for name, value in state.items() if isinstance(name, str)})

    return make


def _path(args: Any, _: Any) -> Any:
    """Make a path: a pure path on Windows, where a ``PosixPath`` cannot be made."""
    if os.name == "nt":
        return pathlib.PurePath(*args)
    return pathlib.PosixPath(*args)


def _constructor(cls: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    """Return a builder that calls a class with the pickled arguments."""
    return lambda args, _: cls(*args)


def _uuid(_: Any, state: Any) -> Any:
    """Build a UUID from the pickled state."""
    return uuid.UUID(int=state["int"])


# All types that may go out besides plain values, with the function that builds an object from
# the pickled arguments and state.
HARMLESS: dict[tuple[str, str], Callable[[Any, Any], Any]] = {
    ("argparse", "Namespace"): _namespace(argparse.Namespace),
    ("types", "SimpleNamespace"): _namespace(types.SimpleNamespace),
    ("pathlib", "PosixPath"): _path,
    ("pathlib", "PurePosixPath"): _constructor(pathlib.PurePosixPath),
    ("pathlib", "WindowsPath"): _constructor(pathlib.PureWindowsPath),
    ("pathlib", "PureWindowsPath"): _constructor(pathlib.PureWindowsPath),
    ("datetime", "datetime"): _constructor(datetime.datetime),
    ("datetime", "date"): _constructor(datetime.date),
    ("datetime", "time"): _constructor(datetime.time),
    ("datetime", "timedelta"): _constructor(datetime.timedelta),
    ("datetime", "timezone"): _constructor(datetime.timezone),
    ("uuid", "UUID"): _uuid,
    ("torch", "device"): _constructor(torch.device),
}
# Python 3.13 pickles paths under this module.
for _name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"):
    HARMLESS["pathlib._local", _name] = HARMLESS["pathlib", _name]
# Harmless types that the safe default of torch.load reads.
_PLAIN = {("torch", "device")}


@dataclass
class CarryOver:
    """Filter that walks through a saved object and keeps the parts that may go out.

    Args:
        key: Dotted path of the entry that holds the weights.
        plain: True to keep only types that the safe default of ``torch.load`` reads.
        tensor: Function that returns the stand-in for a tensor in the output; None if the tensor
            may not go out. The second argument is True for a tensor among other values.
        replaced: Identity of an object → replacement in the output.
        networks: Dotted paths below the key, if the entry holds several networks.
        momentary: Names of recorded numbers that are true of the input alone.

    Attributes:
        dropped: Dotted names of entries that were not kept.
        measured: Dotted names of metrics that were measured on the input, and are not true of the
            output.
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
        """Notes for the user about entries that were not kept."""
        notes: list[str] = []
        if self.dropped:
            names = first_few(self.dropped, _MOST_NAMES)
            notes.append(f"not taken over from the last checkpoint: {names}")
        if self.measured:
            names = first_few(self.measured, _MOST_NAMES)
            notes.append(f"measured on the last checkpoint, so not taken over: {names}")
        return notes

    def filter_object(self, saved: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> Any:
        """Filter a whole saved object."""
        if isinstance(saved, dict):
            return self.filter_entries(saved)
        return type(saved)(self.filter_elements(saved))

    def filter_elements(self, values: Sequence[Any], prefix: str = "", depth: int = 0) -> list[Any]:
        """Filter the elements of a list, with None in the place of each dropped element.

        Args:
            values: The elements.
            prefix: Dotted path of the list, with a dot at the end; empty for the root.
            depth: Level of the list in the saved object.
        """
        filtered: list[Any] = []
        for index, value in enumerate(values):
            where = _below(prefix, str(index))
            part = self._filter(value, where + ".", depth + 1)
            if part is _DROPPED:
                self.dropped.append(where)
                part = None
            filtered.append(part)
        return filtered

    def filter_entries(
        self, values: Mapping[Any, Any], prefix: str = "", depth: int = 0
    ) -> dict[Any, Any]:
        """Filter the entries of a dict.

        Args:
            values: The dict.
            prefix: Dotted path of the dict, with a dot at the end; empty for the root.
            depth: Level of the dict in the saved object.

        Returns:
            The entries that may go out, themselves filtered.
        """
        filtered: dict[Any, Any] = {}
        # A dict with tensors is a state dict, in which "score" is a weight and no metric. Only in a
        # dict around the weights do tensors belong to random generators and the like.
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
                part = self._filter(value, where + ".", depth + 1)
            if part is _MEASURED:
                self.measured.append(where)
            elif part is _DROPPED or not isinstance(name, (str, int, float, tuple, type(None))):
                self.dropped.append(where)
            else:
                filtered[name] = part
        return filtered

    def _is_measured(self, where: str, name: Any, value: Any) -> bool:
        """Return True for a metric of the input, or the state of a callback that tracks metrics."""
        if not isinstance(name, str):
            return False
        if isinstance(value, dict):
            parents = where.removesuffix(short(name)).split(".")
            return _CALLBACKS in parents and not _CALLBACK_SCORES.isdisjoint(value)
        scalar = isinstance(value, TensorView) and not value.shape
        if not scalar and number(value) is None:
            return False
        # Momentary numbers that stand beside the weights are recorded under the bare name.
        is_momentary = self._leads_to_weights(where.removesuffix(name)) and name in self.momentary
        return is_metric(where) or where in self.momentary or is_momentary

    def _is_training(self, prefix: str, name: Any, value: Any) -> bool:
        """Return True for the state of an optimizer or scheduler that stands beside the weights.

        Elsewhere the name proves nothing: a hyperparameter may be called ``optimizer`` too, and
        its value may be the name of an optimizer.
        """
        if isinstance(value, _SCALARS) or not isinstance(name, str):
            return False
        return self._leads_to_weights(prefix) and bool(TRAINING_STATE.fullmatch(name))

    def _leads_to_weights(self, prefix: str) -> bool:
        """Return True if a dotted prefix is on the way to an entry with weights."""
        return prefix in self._above_weights

    @cached_property
    def _above_weights(self) -> set[str]:
        """All prefixes, up to a dot, of the dotted paths of entries with weights."""
        prefixes = {""}
        for path in ["", *self.networks]:
            entry = join(self.key, path)
            for i, letter in enumerate(entry[:_LONGEST_NAME]):
                if letter == ".":
                    prefixes.add(entry[: i + 1])
        return prefixes

    def _filter(self, value: Any, prefix: str, depth: int) -> Any:
        """Filter a value once, and remember the result by identity.

        A pickle can share a value between many places, so that a walk without memory never ends.
        """
        if id(value) in self.replaced:
            return self.replaced[id(value)]
        if isinstance(value, _SCALARS):
            return value
        if depth > _DEEPEST:
            return _DROPPED
        if id(value) not in self._done:
            # Marked before the descent, so that a container within itself is dropped there.
            self._done[id(value)] = _DROPPED, 0
            above, self._reached = self._reached, depth
            part = self._convert(value, prefix, depth)
            self._done[id(value)] = part, self._reached - depth
            self._reached = max(self._reached, above)
        part, levels = self._done[id(value)]
        # The value was first met at a place that is less deep.
        if depth + levels > _DEEPEST:
            return _DROPPED
        self._reached = max(self._reached, depth + levels)
        return part

    def _convert(self, value: Any, prefix: str, depth: int) -> Any:
        """Filter a value by type."""
        if isinstance(value, dict):
            return self._filter_mapping(value, prefix, depth)
        if isinstance(value, (list, tuple)) and self._leads_to_weights(prefix):
            return type(value)(self.filter_elements(value, prefix, depth))
        if isinstance(value, (list, tuple)):
            return self._filter_sequence(value, prefix, depth)
        if isinstance(value, Opaque):
            return self._filter_placeholder(value, prefix, depth)
        return self._filter_leaf(value)

    def _filter_sequence(self, value: list[Any] | tuple[Any, ...], prefix: str, depth: int) -> Any:
        """Filter a list or a tuple, and drop the whole if an element is dropped."""
        complete = True
        parts: list[Any] = []
        for i, element in enumerate(value):
            part = self._filter(element, _below(prefix, f"{i}."), depth + 1)
            complete = complete and part is not _DROPPED
            parts.append(part)
        if not complete:
            return _DROPPED
        return type(value)(parts)

    def _filter_leaf(self, value: Any) -> Any:
        """Filter a value without children: a tensor, a dtype or a set of scalars."""
        if isinstance(value, TensorView):
            return _or_dropped(self.tensor(value, False))
        if isinstance(value, Global) and value.module == "torch" and value.name in DTYPES:
            return getattr(torch, value.name)
        if isinstance(value, set) and all(isinstance(part, _SCALARS) for part in value):
            return value
        return _DROPPED

    def _filter_mapping(self, value: dict[Any, Any], prefix: str, depth: int) -> Any:
        """Filter a dict, and drop the dict as a whole if nothing is left.

        Dicts of weights (mostly tensors) are dropped as a whole too. Only the small tensors would
        be left, and look like a complete state dict. The state of an optimizer is dropped under
        any name.
        """
        if value.keys() >= OPTIMIZER_KEYS:
            return _DROPPED
        # No early exit: stand-ins are numbered in the order in which tensors are first asked for.
        tensors = [part for part in value.values() if isinstance(part, (TensorView, Refused))]
        withheld = [t for t in tensors if isinstance(t, Refused) or self.tensor(t, False) is None]
        if withheld and 2 * len(tensors) > len(value):
            return _DROPPED
        dropped, measured = len(self.dropped), len(self.measured)
        entries = self.filter_entries(value, prefix, depth)
        if not value or entries:
            return entries
        outcome = _DROPPED
        if len(self.measured) - measured == len(value):
            outcome = _MEASURED
        # The parent records the name of the whole dict instead of the names of the entries.
        del self.dropped[dropped:], self.measured[measured:]
        return outcome

    def _filter_placeholder(self, value: Opaque, prefix: str, depth: int) -> Any:
        """Rebuild an object of a harmless type, or drop the object."""
        name = name_of(value.type)
        make = HARMLESS.get(name)
        if make is None or value.items or (self.plain and name not in _PLAIN):
            return _DROPPED
        args = self._filter(value.args, prefix, depth + 1)
        state = self._filter(value.state, prefix, depth + 1)
        try:
            return make(args, state)
        # The pickled parts are untrusted, and may not be the parts of the type.
        except Exception:
            return _DROPPED


def _below(prefix: str, name: str) -> str:
    """Join the dotted name of an entry, and cut the name at the longest length in use."""
    return (prefix + name)[:_LONGEST_NAME]


def _or_dropped(value: Any) -> Any:
    """Return the mark of a dropped value in the place of None."""
    if value is None:
        return _DROPPED
    return value
