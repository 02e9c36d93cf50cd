"""The search for the weights in a saved object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ckptavg.errors import CheckpointError, NoWeightsError, first_few, short
from ckptavg.errors.spelling import did_you_mean
from ckptavg.formats.entry_suggestions import describe, find_close_entries, suggest_entry
from ckptavg.formats.network_entries import (
    KNOWN_ENTRIES,
    find_networks,
    is_average,
    may_hold_networks,
)
from ckptavg.formats.other_weights import note_other_weights, note_swap
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safe_pickle import modules as pickled_module
from ckptavg.formats.safe_pickle.values import Opaque
from ckptavg.formats.training_record import OPTIMIZER_KEYS
from ckptavg.formats.tree import (
    TENSORS,
    Entry,
    children,
    count_tensors,
    entry_within,
    holds_tensors,
    join,
    locate,
    refuse_unknown,
    value_at,
    walk,
)

_PICKLED = "the weights are read from a pickled module, without its class"
# Most entries that a message lists.
_MOST_ENTRIES = 12
# Most networks that a message lists.
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """The weights found in a saved object.

    Attributes:
        key: Dotted path of the entry that holds the weights; empty for the object itself.
        entry: The state dict. For several networks the values of all, by joined path and name.
        notes: Remarks for the user about the choice.
        networks: Dotted path below the key → state dict, for several networks; else empty.
    """

    key: str
    entry: Entry
    notes: Sequence[str] = ()
    networks: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted paths from the saved object to the entries that hold the weights."""
        return tuple(join(self.key, path) for path in self.networks or ("",))

    @property
    def record_key(self) -> str:
        """Path of the first entry: training recorded numbers beside that entry."""
        return self.paths[0]


def find_weights(path: str, tree: Any, key: str | None) -> Weights:
    """Find the weights in a saved object: one state dict, or the state dicts of several networks.

    Args:
        path: The file, for messages.
        tree: The saved object.
        key: Dotted path of the entry, if named by the user.

    Returns:
        The weights, with unknown objects that are made of tensors marked as refused.

    Raises:
        CheckpointError: The named entry does not exist, or no entry can be identified as the
            weights.
        NoWeightsError: The object or the named entry holds no weights.
    """
    weights = _find_named(path, tree, key) if key is not None else _find_likely(path, tree)
    networks = {name: refuse_unknown(entry) for name, entry in weights.networks.items()}
    return replace(weights, entry=refuse_unknown(weights.entry), networks=networks)


def _find_likely(path: str, tree: Any) -> Weights:
    """Find the weights without a name, from the surest to the weakest sign.

    Args:
        path: The file, for messages.
        tree: The saved object.

    Raises:
        CheckpointError: No entry can be identified as the weights.
        NoWeightsError: The object holds no weights.
    """
    if count_tensors(tree) == 0:
        raise NoWeightsError(f"{path} holds no tensors ({describe(tree)})", suggest_entry(tree))
    if pickled_module.is_module(tree):
        return Weights("", pickled_module.state_dict(tree), [_PICKLED])
    if isinstance(tree, dict):
        if tree.keys() >= OPTIMIZER_KEYS:
            raise NoWeightsError(f"{path} is an optimizer's state", "Name the model's checkpoint.")
        weights = _find_known(tree)
        if weights is not None:
            return weights
    networks = _find_networks(tree)
    if networks is not None:
        return networks
    if _is_training_state(tree):
        raise NoWeightsError(
            f"{path} holds the state of a training and no weights ({describe(tree)})",
            "Name the model's checkpoint, or an entry by `key`.",
        )
    raise CheckpointError(
        f"{path}: no entry is known to hold the weights ({describe(tree)})", suggest_entry(tree)
    )


def _is_training_state(tree: Any) -> bool:
    """Return True if all tensors belong to optimizers, random generators and the like."""
    visited: set[int] = set()
    # Counted once per part: one part may have very many names, and many parts may share a list.
    counts: dict[int, int] = {}
    holds_any = False
    for name, part in children(tree):
        if id(part) not in counts:
            counts[id(part)] = count_tensors(part, visited)
        if not counts[id(part)]:
            continue
        holds_any = True
        if isinstance(part, (Opaque, *TENSORS)) or may_hold_networks(name, part):
            return False
    return holds_any


def _find_known(tree: Mapping[Any, Any]) -> Weights | None:
    """Find the weights of an object that is a state dict or has an entry of a known name."""
    distinct = {id(value): value for value in tree.values()}
    if holds_tensors(tree) and not any(map(holds_tensors, distinct.values())):
        return _with_nested("", tree, [])
    for name in KNOWN_ENTRIES:
        if holds_tensors(tree.get(name)):
            return _with_nested(name, tree[name], note_other_weights(tree, name))
    # The EMA is the model where only the EMA was kept.
    for name in (*KNOWN_ENTRIES, "ema"):
        if pickled_module.is_module(tree.get(name)):
            notes = [_PICKLED, *note_other_weights(tree, name)]
            return Weights(name, pickled_module.state_dict(tree[name]), notes)
    # Otherwise each training state may have an entry "model" of its own.
    states: list[str] = []
    for name in tree:
        if isinstance(name, str) and holds_tensors(entry_within(tree, name, "model")):
            states.append(name)
    trained = [name for name in states if not is_average(name)] or states[:1]
    if len(trained) == 1:
        return _with_nested(f"{trained[0]}.model", tree[trained[0]]["model"], [])
    return None


def _find_networks(tree: Any, key: str = "") -> Weights | None:
    """Find the weights of all networks below an entry; return None if no network is found.

    A single network is treated as a plain state dict. Several networks share a table, with the path
    of each network in front of the names.

    Args:
        tree: The value of the entry.
        key: Dotted path of the entry.
    """
    entries = find_networks(tree)
    names = entries.names()
    if not entries.networks or names is None:
        return None
    notes: list[str] = []
    for path, entry in entries.networks.items():
        value = value_at(tree, path)
        if pickled_module.is_module(value):
            notes = [_PICKLED]
        elif value is not entry:
            # With dots in names, the path leads to another value than the network.
            return None
    notes += _note_averages(entries.averages, key)
    if len(entries.networks) == 1:
        ((path, entry),) = entries.networks.items()
        return Weights(join(key, path), entry, notes)
    return Weights(key, names, [_note_networks(entries.networks, key), *notes], entries.networks)


def _note_networks(networks: Mapping[str, Entry], key: str) -> str:
    """Make the note that a file holds several networks.

    Args:
        networks: Dotted path below the key → state dict.
        key: Dotted path of the entry that is searched.
    """
    paths = [join(key, path) for path in networks]
    # Only the names that are shown are made printable, since there may be very many.
    for i, path in enumerate(paths[:_MOST_SHOWN]):
        paths[i] = short(path) or "the file itself"
    shown = first_few(paths, _MOST_SHOWN)
    return f"{len(paths)} networks, each averaged at its own place: {shown} (`key` picks one)"


def _note_averages(averages: Mapping[str, Any], key: str) -> list[str]:
    """Make a note about running averages that are left out.

    Args:
        averages: Dotted path below the key → running average.
        key: Dotted path of the entry that is searched.
    """
    # By identity: one average may be held under very many names.
    copies = {id(part): (path, part) for path, part in averages.items()}
    shown: list[str] = []
    for path, part in islice(copies.values(), _MOST_ENTRIES):
        if count_tensors(part):
            shown.append(short(join(key, path)))
    if not shown:
        return []
    return [f"left out as running averages: {first_few(shown)} (see `key`)"]


def _with_nested(key: str, entry: Entry, notes: Sequence[str]) -> Weights:
    """Make weights of a state dict, with nested state dicts as separate networks.

    Args:
        key: Dotted path of the state dict.
        entry: The state dict.
        notes: Remarks for the user about the choice of the entry.
    """
    nested = _find_networks(entry, key)
    if nested is None or "" not in nested.networks:
        return Weights(key, entry, notes)
    return Weights(key, nested.entry, [*notes, *nested.notes], nested.networks)


def _find_named(path: str, tree: Any, key: str) -> Weights:
    """Find the weights in an entry that the user names.

    Args:
        path: The file, for messages.
        tree: The saved object.
        key: Dotted path of the entry.

    Raises:
        CheckpointError: The entry does not exist, or holds no named tensors.
        NoWeightsError: The entry is the state of an optimizer.
    """
    located = locate(tree, key)
    if located is None:
        raise CheckpointError(
            f"{path} has no entry {key!r} ({describe(tree)})",
            did_you_mean(find_close_entries(tree, key)) or "Choose one by `key`.",
        )
    if _is_optimizer_state(located.value):
        weights = _find_known(tree) if isinstance(tree, dict) else None
        suggestions = [weights.key] if weights is not None and weights.key else []
        raise NoWeightsError(
            f"{path}: the entry {key!r} is an optimizer's state, not weights",
            did_you_mean(suggestions) or "Choose another one by `key`.",
        )
    if located.pickled or holds_tensors(located.entry):
        return Weights(key, located.entry, note_swap(tree, key))
    networks = _find_networks(located.value, key)
    if networks is not None:
        return networks
    raise CheckpointError(
        f"{path}: the entry {key!r} holds no tensors by name ({describe(tree)})",
        did_you_mean(find_close_entries(tree, key)) or "Choose another one by `key`.",
    )


def _is_optimizer_state(value: Any) -> bool:
    """Return True for the state of an optimizer, or a list of states as Lightning keeps."""
    states = value if isinstance(value, list) else [value]
    return bool(states) and all(
        isinstance(state, dict) and state.keys() >= OPTIMIZER_KEYS for state in states
    )


def describe_other_entries(tree: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """Describe the entries that a saved object holds besides the weights, with tensor counts.

    Args:
        tree: The saved object.
        paths: Dotted paths of the entries that hold the weights.
    """
    levels: dict[str, Any] = {}
    for path in paths:
        levels |= dict(walk(tree, path) or ())
    homes = set(paths)
    shown: list[str] = []
    for above, level in levels.items():
        if above in homes:
            continue
        count = 0
        for name, value in children(level):
            path = join(above, name)
            if name != PROVENANCE and path not in levels and count < _MOST_ENTRIES:
                shown.append(_describe_entry(path, count_tensors(value)))
                count += 1
    return tuple(shown)


def _describe_entry(path: str, count: int) -> str:
    """Describe an entry by path and number of tensors."""
    if not count:
        return short(path)
    return f"{short(path)} ({count} tensor{'s' * (count != 1)})"
