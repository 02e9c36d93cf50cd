"""Entries of a saved object that hold a network each: an encoder and a decoder, a GAN's two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptavg.formats import pickled_module, tree
from ckptavg.formats.inert_values import Refused, Sharded, TensorView
from ckptavg.formats.record import OPTIMIZER_KEYS, TRAINING_STATE
from ckptavg.formats.tree import Entry

_DEEPEST = 4  # levels of entries
_MOST_ENTRIES = 100_000  # that are looked at
_MOST_NAMES = 200_000  # of tensors, each counted as often as it is held
_AVERAGES = frozenset(["ema", "avg", "average", "averaged", "swa", "shadow"])
_NO_NETWORKS = frozenset(
    ["rng", "random", "metric", "metrics", "history", "log", "logs", "losses", "grad", "grads",
     "gradients", "momentum", "exp"]
)  # fmt: skip
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass
class NetworkEntries:
    """The networks in a saved object.

    Attributes:
        networks: Dotted path → state dict; the empty path for the object itself.
        averages: Dotted path → running average, which is no network of its own.
    """

    networks: dict[str, Entry] = field(default_factory=dict)
    averages: dict[str, Any] = field(default_factory=dict)

    def names(self) -> dict[str, Any] | None:
        """What the networks hold, by path and name joined; None if two of them have one name."""
        inner = {above for path in self.networks for above in tree.prefixes(path)}
        joined: dict[str, Any] = {}
        for path, entry in self.networks.items():
            for name, value in entry.items():
                full = tree.join(path, name) if isinstance(name, str) else name
                if isinstance(value, (dict, list, tuple)) and full in inner:
                    continue
                if full in joined:
                    return None
                joined[full] = value
        return joined


def find_networks(saved: Any) -> NetworkEntries:
    """Find the entries that are networks, in the order in which they were saved.

    Optimizers, running averages by their names, and entries without a float of any extent are
    none. Where there are more entries than a training saves, none is found.

    Raises:
        MalformedPickle: A module among them holds itself.
    """
    result = NetworkEntries()
    waiting: list[tuple[str, int, Any]] = [("", 0, saved)]
    modules: dict[int, Entry] = {}  # a module can be held very many times
    looked_at, names = 0, 0
    while waiting:
        path, depth, value = waiting.pop()
        if pickled_module.is_module(value) and id(value) not in modules:
            modules[id(value)] = pickled_module.state_dict(value)
        entry = modules.get(id(value), value)
        if not isinstance(entry, (dict, list, tuple)):
            continue
        looked_at += len(entry)
        if looked_at > _MOST_ENTRIES + names or names > _MOST_NAMES:
            return NetworkEntries()
        if isinstance(entry, dict) and is_network(entry):
            result.networks[path] = entry
            names += len(entry)
        inner = tree.children(entry) if entry is value and depth < _DEEPEST else []
        for name, part in reversed(inner):
            if may_hold_networks(name, part) and is_average(name):
                result.averages[tree.join(path, name)] = part
            elif may_hold_networks(name, part):
                waiting.append((tree.join(path, name), depth + 1, part))
    return result


def is_network(value: Any) -> bool:
    """Whether a value holds, by name, at least one float tensor with a dimension."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and _is_weight(part) for name, part in value.items()
    )


def is_average(name: str) -> bool:
    """Whether an entry's name says that it holds a running average."""
    return not _AVERAGES.isdisjoint(_words(name))


def may_hold_networks(name: str, value: Any) -> bool:
    """Whether an entry may hold networks: no optimizer's does, and no record of the training."""
    if not isinstance(value, (dict, list, tuple)):
        return pickled_module.is_module(value)
    if isinstance(value, dict) and value.keys() >= OPTIMIZER_KEYS:
        return False
    if name.endswith(tree.EXTRA_STATE) or TRAINING_STATE.fullmatch(name):
        return False
    return _NO_NETWORKS.isdisjoint(_words(name))


def _words(name: str) -> set[str]:
    """The words that a name is made of, whether by underscores or by capitals."""
    return {word.lower() for word in _WORD.findall(name[: tree.LONGEST_NAME])}


def _is_weight(value: Any) -> bool:
    if isinstance(value, (TensorView, Sharded)):
        return value.dtype.kind != "int" and bool(value.shape)
    return isinstance(value, Refused)
