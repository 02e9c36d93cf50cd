"""Entries of a saved object with a network each: encoder and decoder, a GAN's two networks."""

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

# Entries in which trainers keep the weights, in the order in which they are tried.
KNOWN_ENTRIES = (
    "state_dict", "model_state_dict", "model", "module", "net", "weights", "model_state", "network",
    "params",
)  # fmt: skip
# Levels of entries: trainers nest two or three.
_DEEPEST = 4
# Most entries that are looked at, besides the tensors of networks. Training saves fewer.
_MOST_ENTRIES = 100_000
# Most names of tensors. A dict counts each time, since a small pickle can hold one dict often.
_MOST_NAMES = 200_000
# Words in the names of running averages.
_AVERAGES = frozenset(["ema", "avg", "average", "averaged", "swa", "shadow"])
# Words in the names of training state and of records.
_NO_NETWORKS = frozenset(
    ["rng", "random", "metric", "metrics", "history", "log", "logs", "losses", "grad", "grads",
     "gradients", "momentum"]
)  # fmt: skip
# Words that may follow without a change of meaning: momentum_buffer, rng_states.
_HOLDERS = frozenset(["state", "states", "dict", "dicts", "buffer", "buffers"])
_PARAMETERS = ("weight", "bias")
# Names of parameters that are looked at: one dict may be held under very many names.
_MOST_PARAMETERS = 50
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


@dataclass
class NetworkEntries:
    """The networks in a saved object.

    Attributes:
        networks: Dotted path → state dict. The empty path stands for the whole object.
        averages: Dotted path → running average: a copy, not a further network.
    """

    networks: dict[str, Entry] = field(default_factory=dict)
    averages: dict[str, Any] = field(default_factory=dict)

    def names(self) -> dict[str, Any] | None:
        """Join the values of all networks by dotted name in the whole object.

        Returns:
            Dotted name → value; None if two values have the same dotted name.
        """
        inner: set[str] = set()
        for path in self.networks:
            inner.update(tree.prefixes(path))
        joined: dict[str, Any] = {}
        for path, entry in self.networks.items():
            for name, value in entry.items():
                full_name = tree.join(path, name) if isinstance(name, str) else name
                # The container of another network. That network's values have a path of their own.
                if isinstance(value, (dict, list, tuple)) and full_name in inner:
                    continue
                if full_name in joined:
                    return None
                joined[full_name] = value
        return joined


def find_networks(saved: Any) -> NetworkEntries:
    """Find the entries that are networks, in the saved order.

    A network holds at least one float tensor with a dimension. Optimizers are no networks. Entries
    named as running averages are no networks either. An object with more entries than training
    saves gives no networks at all.

    Raises:
        MalformedPickle: A module in the object holds itself.
    """
    result = NetworkEntries()
    waiting: list[tuple[str, int, Any]] = [("", 0, saved)]
    # Keyed by identity: a small pickle can hold one module very many times.
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
        # The state dict of a pickled module has no entries below, only tensors.
        inner = tree.children(entry) if entry is value and depth < _DEEPEST else []
        # In reverse order, since the last waiting entry is looked at first.
        for name, child in reversed(inner):
            if not may_hold_networks(name, child):
                continue
            if is_average(name):
                result.averages[tree.join(path, name)] = child
            else:
                waiting.append((tree.join(path, name), depth + 1, child))
    return result


def is_network(value: Any) -> bool:
    """Return True if a value holds at least one named float tensor with a dimension."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and _is_weight(entry) for name, entry in value.items()
    )


def is_average(name: str) -> bool:
    """Return True if the name of an entry is that of a running average."""
    return not _AVERAGES.isdisjoint(_words(name))


def may_hold_networks(name: str, value: Any) -> bool:
    """Return True if an entry may hold networks: optimizers and records of training do not."""
    if not isinstance(value, (dict, list, tuple)):
        return pickled_module.is_module(value)
    if isinstance(value, dict) and value.keys() >= OPTIMIZER_KEYS:
        return False
    if name.endswith(tree.EXTRA_STATE) or TRAINING_STATE.fullmatch(name):
        return False
    words = [word for word in _words(name) if word not in _HOLDERS]
    if _NO_NETWORKS.isdisjoint(words):
        return True
    # With another word at the end, as in momentum_encoder, the entry may still be a network.
    return words[-1] not in _NO_NETWORKS and _holds_parameters(value)


def _holds_parameters(value: Any) -> bool:
    """Return True if a value holds float tensors with names of parameters (weight, bias)."""
    entries = islice(value.items(), _MOST_PARAMETERS) if isinstance(value, Mapping) else ()
    return any(
        isinstance(name, str) and name.endswith(_PARAMETERS) and _is_weight(entry)
        for name, entry in entries
    )


def _words(name: str) -> list[str]:
    """Split a name at underscores and capitals into lower-case words."""
    return [word.lower() for word in _WORD.findall(name[: tree.LONGEST_NAME])]


def _is_weight(value: Any) -> bool:
    """Return True for a float tensor with a dimension, and for an unsupported tensor."""
    if isinstance(value, (TensorView, Sharded)):
        return value.dtype.kind != "int" and bool(value.shape)
    return isinstance(value, Refused)
