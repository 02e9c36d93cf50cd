"""Entries of a saved object that hold a network each: an encoder and a decoder, a GAN's two."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ckptavg.formats import tree
from ckptavg.formats.safe_pickle import modules as pickled_module
from ckptavg.formats.safe_pickle.values import Refused, Sharded, TensorView
from ckptavg.formats.training_record import OPTIMIZER_KEYS, TRAINING_STATE
from ckptavg.formats.tree import Entry

# Levels of entries: trainers nest two or three.
_DEEPEST = 4
# Entries that are looked at, besides the networks' own. Above it the object is no training's.
_MOST_ENTRIES = 100_000
# Names of tensors, each counted as often as it is held: a small pickle can hold one dict often.
_MOST_NAMES = 200_000
_AVERAGES = frozenset(["ema", "avg", "average", "averaged", "swa", "shadow"])
_NO_NETWORKS = frozenset(
    ["rng", "random", "metric", "metrics", "history", "log", "logs", "losses", "grad", "grads",
     "gradients", "momentum"]
)  # fmt: skip
# Words behind one of those that leave it what it is: momentum_buffer, rng_states.
_HOLDERS = frozenset(["state", "states", "dict", "dicts", "buffer", "buffers"])
_PARAMETERS = ("weight", "bias")
_MOST_PARAMETERS = 50  # that are looked at: one dict may stand under very many names
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass
class NetworkEntries:
    """The networks in a saved object.

    Attributes:
        networks: Dotted path → state dict. The empty path is the object itself.
        averages: Dotted path → running average, which is a copy and no further network.
    """

    networks: dict[str, Entry] = field(default_factory=dict)
    averages: dict[str, Any] = field(default_factory=dict)

    def names(self) -> dict[str, Any] | None:
        """Return all values of the networks, by their dotted names in the whole object.

        Returns:
            None if two values have one dotted name.
        """
        inner: set[str] = set()
        for path in self.networks:
            inner.update(tree.prefixes(path))
        joined: dict[str, Any] = {}
        for path, entry in self.networks.items():
            for name, value in entry.items():
                full_name = tree.join(path, name) if isinstance(name, str) else name
                # A container of another network, whose values come under its own path.
                if isinstance(value, (dict, list, tuple)) and full_name in inner:
                    continue
                if full_name in joined:
                    return None
                joined[full_name] = value
        return joined


def find_networks(saved: Any) -> NetworkEntries:
    """Find the entries that are networks, in the order in which they were saved.

    A network holds a float tensor with a dimension. Optimizers, and running averages by their
    names, are no networks. Of an object with more entries than a training saves, none is one.

    Raises:
        MalformedPickle: A module among them holds itself.
    """
    result = NetworkEntries()
    waiting: list[tuple[str, int, Any]] = [("", 0, saved)]
    # By identity: a small pickle can hold one module very many times.
    modules: dict[int, Entry] = {}
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
        # The names within a module's state dict are tensors', not entries'.
        inner = tree.children(entry) if entry is value and depth < _DEEPEST else []
        # Backwards, since the last that waits is looked at first.
        for name, child in reversed(inner):
            if not may_hold_networks(name, child):
                continue
            if is_average(name):
                result.averages[tree.join(path, name)] = child
            else:
                waiting.append((tree.join(path, name), depth + 1, child))
    return result


def is_network(value: Any) -> bool:
    """Tell whether a value holds, by name, at least one float tensor with a dimension."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and _is_weight(entry) for name, entry in value.items()
    )


def is_average(name: str) -> bool:
    """Tell whether an entry is a running average, by its name."""
    return not _AVERAGES.isdisjoint(_words(name))


def may_hold_networks(name: str, value: Any) -> bool:
    """Tell whether an entry may hold networks: no optimizer and no record of training does."""
    if not isinstance(value, (dict, list, tuple)):
        return pickled_module.is_module(value)
    if isinstance(value, dict) and value.keys() >= OPTIMIZER_KEYS:
        return False
    if name.endswith(tree.EXTRA_STATE) or TRAINING_STATE.fullmatch(name):
        return False
    words = [word for word in _words(name) if word not in _HOLDERS]
    if _NO_NETWORKS.isdisjoint(words):
        return True
    # What another word is the subject of, as a momentum_encoder, may be a network yet.
    return words[-1] not in _NO_NETWORKS and _holds_parameters(value)


def _holds_parameters(value: Any) -> bool:
    """Tell whether a value holds floats that are called as layers call their parameters."""
    entries = islice(value.items(), _MOST_PARAMETERS) if isinstance(value, Mapping) else ()
    return any(
        isinstance(name, str) and name.endswith(_PARAMETERS) and _is_weight(entry)
        for name, entry in entries
    )


def _words(name: str) -> list[str]:
    """Split a name at its underscores and capitals into words, in lower case."""
    return [word.lower() for word in _WORD.findall(name[: tree.LONGEST_NAME])]


def _is_weight(value: Any) -> bool:
    """Tell whether a value is a float tensor with a dimension, or a tensor that no reader takes."""
    if isinstance(value, (TensorView, Sharded)):
        return value.dtype.kind != "int" and bool(value.shape)
    return isinstance(value, Refused)
