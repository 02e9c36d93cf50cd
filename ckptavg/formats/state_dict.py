"""The search for the weights in a saved object, and the bare names of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ckptavg.errors import CheckpointError, NoWeightsError, first_few, short
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.formats.network_entries import (
    find_networks,
    is_average,
    is_network,
    may_hold_networks,
)
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safe_pickle import modules as pickled_module
from ckptavg.formats.safe_pickle.values import Opaque, TensorView
from ckptavg.formats.training_record import OPTIMIZER_KEYS, TRAINING_STATE
from ckptavg.formats.tree import (
    LONGEST_NAME,
    TENSORS,
    Entry,
    children,
    count_tensors,
    holds_tensors,
    join,
    locate,
    refuse_unknown,
    value_at,
    walk,
)

# Entries in which trainers keep the weights, in the order in which they are tried.
KNOWN_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "weights",
    "model_state",
    "network",
    "params",
)
# Prefixes that DDP, torch.compile, FSDP and activation checkpointing add.
LEADING_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# The prefixes that are dropped inside a name too. There `module.` may be the model's own.
INNER_WRAPPERS = LEADING_WRAPPERS[1:]
# Counters of updates beside `module.` in averaged models: torch's AveragedModel, mmengine's.
TORCH_COUNTER, MMENGINE_COUNTER = "n_averaged", "steps"
COUNTERS = (TORCH_COUNTER, MMENGINE_COUNTER)

_PICKLED = "the weights are read from a pickled module, without its class"
_MODULE_DROPPED = (
    "'module.' in front of every name is taken for DDP's wrapper and dropped; where it is the "
    "model's own, write a .pth or .ckpt, which keeps the names as they are"
)
_LIGHTNING_TRAINED = "current_model_state"
_AVERAGED_IN_PLACE = (
    "'state_dict' holds a running average, as Lightning's WeightAveraging keeps it; "
    "the weights as trained are under --key current_model_state"
)
_MMENGINE_EMA = "ema_state_dict"
_MMENGINE_SWAPPED = (
    "mmengine's EMAHook swaps the two on saving: 'state_dict' holds the moving average, "
    "'ema_state_dict' the weights as trained (--key ema_state_dict)"
)
_MMCV_SWAPPED = (
    "each weight NAME has another as ema_NAME beside it: mmcv's EMAHook swaps the two at the end "
    "of an epoch, and NAME then is the moving average, ema_NAME the weight as trained"
)
# Levels below the saved object at which entries are suggested.
_DEEPEST_ENTRY = 3
# Most entries that a message lists.
_MOST_ENTRIES = 12


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
    weights = _find_weights(path, tree, key)
    networks = {name: refuse_unknown(entry) for name, entry in weights.networks.items()}
    return replace(weights, entry=refuse_unknown(weights.entry), networks=networks)


def _find_weights(path: str, tree: Any, key: str | None) -> Weights:
    if key is not None:
        return _named_entry(path, tree, key)
    if count_tensors(tree) == 0:
        raise NoWeightsError(f"{path} holds no tensors ({_describe(tree)})", _suggest(tree))
    # From the surest to the weakest sign: a whole module, known entries, then any networks.
    if pickled_module.is_module(tree):
        return Weights("", pickled_module.state_dict(tree), [_PICKLED])
    if isinstance(tree, dict):
        if tree.keys() >= OPTIMIZER_KEYS:
            raise NoWeightsError(f"{path} is an optimizer's state", "Name the model's checkpoint.")
        if (weights := _find_known(tree)) is not None:
            return weights
    if (networks := _find_networks(tree)) is not None:
        return networks
    if _is_training_state(tree):
        raise NoWeightsError(
            f"{path} holds the state of a training and no weights ({_describe(tree)})",
            "Name the model's checkpoint, or an entry with --key.",
        )
    raise CheckpointError(
        f"{path}: no entry is known to hold the weights ({_describe(tree)})", _suggest(tree)
    )


def _is_training_state(tree: Any) -> bool:
    """Return True if all tensors belong to optimizers, random generators and the like."""
    parts = children(tree)
    # Counted once per part: one part may have very many names, and many parts may share a list.
    distinct = {id(part): part for _, part in parts}
    visited: set[int] = set()
    counts = {identifier: count_tensors(part, visited) for identifier, part in distinct.items()}
    holders = [(name, part) for name, part in parts if counts[id(part)]]
    return bool(holders) and not any(
        isinstance(part, (Opaque, *TENSORS)) or may_hold_networks(name, part)
        for name, part in holders
    )


def _find_known(tree: Mapping[Any, Any]) -> Weights | None:
    """Find the weights of an object that is a state dict or has an entry of a known name."""
    distinct = {id(value): value for value in tree.values()}
    if holds_tensors(tree) and not any(map(holds_tensors, distinct.values())):
        return _with_nested("", tree, [])
    for name in KNOWN_ENTRIES:
        if holds_tensors(tree.get(name)):
            return _with_nested(name, tree[name], _note_other_weights(tree, name))
    # The EMA is the model where only the EMA was kept.
    for name in (*KNOWN_ENTRIES, "ema"):
        if pickled_module.is_module(tree.get(name)):
            notes = [_PICKLED, *_note_other_weights(tree, name)]
            return Weights(name, pickled_module.state_dict(tree[name]), notes)
    # Otherwise each training state may have an entry "model" of its own.
    states = [
        name
        for name in tree
        if isinstance(name, str) and holds_tensors(_entry(tree, name, "model"))
    ]
    trained = [name for name in states if not is_average(name)] or states[:1]
    if len(trained) == 1:
        return _with_nested(f"{trained[0]}.model", tree[trained[0]]["model"], [])
    return None


def _find_networks(tree: Any, key: str = "") -> Weights | None:
    """Find the weights of all networks below an entry; return None if no network is found.

    A single network is treated as a plain state dict. Several networks share a table, with the path
    of each network in front of the names.
    """
    entries = find_networks(tree)
    names = entries.names()
    values = {path: value_at(tree, path) for path in entries.networks}
    modules = {path for path, value in values.items() if pickled_module.is_module(value)}
    # A path is misleading if names with dots lead to another value than the network.
    misled = [p for p, e in entries.networks.items() if values[p] is not e and p not in modules]
    if not entries.networks or names is None or misled:
        return None
    notes = [_PICKLED] if modules else []
    # By identity: one average may be held under very many names.
    copies = {id(part): (path, part) for path, part in entries.averages.items()}
    some = islice(copies.values(), _MOST_ENTRIES)
    if averages := [path for path, part in some if count_tensors(part)]:
        shown = first_few([short(join(key, path)) for path in averages])
        notes.append(f"left out as running averages: {shown} (--key)")
    if len(entries.networks) == 1:
        ((path, entry),) = entries.networks.items()
        return Weights(join(key, path), entry, notes)
    shown = first_few([short(join(key, path)) or "the file itself" for path in entries.networks])
    count = len(entries.networks)
    several = f"{count} networks, each averaged at its own place: {shown} (--key picks one)"
    return Weights(key, names, [several, *notes], entries.networks)


def _with_nested(key: str, entry: Entry, notes: Sequence[str]) -> Weights:
    """Make weights of a state dict, with nested state dicts as separate networks."""
    nested = _find_networks(entry, key)
    if nested is None or "" not in nested.networks:
        return Weights(key, entry, notes)
    return Weights(key, nested.entry, [*notes, *nested.notes], nested.networks)


def _entry(tree: Mapping[Any, Any], name: str, inner: str) -> Any:
    """Return the value under an inner name in an entry; None if there is no such value."""
    below = tree.get(name)
    return below.get(inner) if isinstance(below, dict) else None


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
        entries = [] if above in homes else children(level)
        named = [(join(above, name), value) for name, value in entries if name != PROVENANCE]
        for name, value in [part for part in named if part[0] not in levels][:_MOST_ENTRIES]:
            count = count_tensors(value)
            count_text = f" ({count} tensor{'s' * (count != 1)})" if count else ""
            shown.append(f"{short(name)}{count_text}")
    return tuple(shown)


def identity(view: TensorView) -> object:
    """Return a key that is equal for views of the very same elements."""
    return view.storage, view.dtype.name, view.offset, view.shape, view.stride


def bare_names(names: list[str]) -> dict[str, str]:
    """Map stored names to bare names, which the model has without wrappers.

    DDP, torch.compile, FSDP and activation checkpointing add wrappers. A wrapper in front is
    dropped if every name has that wrapper, repeatedly. Inside a name the latter three are dropped
    too. The counter of an averaged model is dropped together with the wrapper. All names are left
    unchanged if bare names would collide.
    """
    bare = dict(zip(names, names, strict=True))
    while wrapper := _common_wrapper([b for b in bare.values() if b not in COUNTERS]):
        bare = {name: b[len(wrapper) :] for name, b in bare.items() if b not in COUNTERS}
    bare = {name: _without_inner(b) for name, b in bare.items()}
    if len(set(bare.values())) < len(bare) or "" in bare.values():
        return dict(zip(names, names, strict=True))
    return bare


def bare_network_names(networks: Mapping[str, list[str]]) -> dict[str, str]:
    """Map stored names to bare names, network by network, since each may have another wrapper.

    Args:
        networks: Dotted path → stored names.

    Returns:
        Stored name → bare name, both with the network's path in front.
    """
    bare: dict[str, str] = {}
    for path, names in networks.items():
        name_pairs = bare_names(names).items()
        bare |= {join(path, stored): join(path, name) for stored, name in name_pairs}
    if len(set(bare.values())) < len(bare):
        return {join(path, name): join(path, name) for path in networks for name in networks[path]}
    return bare


def note_wrapper(names: list[str]) -> list[str]:
    """Make a note if the dropped prefix ``module.`` may be part of the model.

    DDP's wrapper is named ``module``, but some models name a network so too.
    """
    bare = bare_names(names)
    dropped = {stored[: len(stored) - len(name)] for stored, name in bare.items()}
    # A dropped counter proves that the prefix is a wrapper.
    if len(bare) < len(names) or dropped in (set(), {""}):
        return []
    return [_MODULE_DROPPED] if not {d.replace("module.", "") for d in dropped} - {""} else []


def _common_wrapper(names: list[str]) -> str | None:
    wrappers = (w for w in LEADING_WRAPPERS if all(n.startswith(w) for n in names))
    return next(wrappers, None) if names else None


def _without_inner(name: str) -> str:
    parts = [part for part in name.split(".") if part + "." not in INNER_WRAPPERS]
    return ".".join(parts)


def _named_entry(path: str, tree: Any, key: str) -> Weights:
    located = locate(tree, key)
    if located is None:
        raise CheckpointError(
            f"{path} has no entry {key!r} ({_describe(tree)})",
            did_you_mean(_close_keys(tree, key)) or "Choose one with --key.",
        )
    if _is_optimizer_state(located.value):
        weights = _find_known(tree) if isinstance(tree, dict) else None
        suggestions = [weights.key] if weights is not None and weights.key else []
        raise NoWeightsError(
            f"{path}: the entry {key!r} is an optimizer's state, not weights",
            did_you_mean(suggestions) or "Choose another one with --key.",
        )
    notes = _note_swap(tree, key)
    if located.pickled or holds_tensors(located.entry):
        return Weights(key, located.entry, notes)
    if (networks := _find_networks(located.value, key)) is not None:
        return networks
    raise CheckpointError(
        f"{path}: the entry {key!r} holds no tensors by name ({_describe(tree)})",
        did_you_mean(_close_keys(tree, key)) or "Choose another one with --key.",
    )


def _is_optimizer_state(value: Any) -> bool:
    """Return True for the state of an optimizer, or a list of states as Lightning keeps."""
    states = value if isinstance(value, list) else [value]
    return bool(states) and all(
        isinstance(state, dict) and state.keys() >= OPTIMIZER_KEYS for state in states
    )


def _note_other_weights(tree: Mapping[Any, Any], chosen: str) -> list[str]:
    names = [name for name in tree if isinstance(name, str) and name != chosen]
    # By identity: one entry may be held under very many names.
    entries = {id(tree[name]): tree[name] for name in names}
    networks = {same for same, entry in entries.items() if is_network(entry)}
    likely = [
        name
        for name in names
        if _sounds_like_weights(name)
        or (id(tree[name]) in networks and may_hold_networks(name, tree[name]))
    ]
    alternatives = [
        name
        for name in likely[:_MOST_ENTRIES]
        if count_tensors(tree[name]) and not _is_same(tree[name], tree[chosen])
    ]
    # fairseq keeps the EMA here.
    if count_tensors(_entry(tree, "extra_state", "ema")):
        alternatives.append("extra_state.ema")
    notes = _note_swap(tree, chosen)
    if notes:
        alternatives = [
            name for name in alternatives if name not in (_MMENGINE_EMA, _LIGHTNING_TRAINED)
        ]
    if alternatives:
        shown = first_few(alternatives)
        notes.append(f"weights are taken from {chosen!r}; {shown} also holds some (--key)")
    return notes


def _note_swap(tree: Any, chosen: str) -> list[str]:
    """Make a note if a trainer keeps a running average in the place of the weights."""
    if not isinstance(tree, dict) or chosen not in ("state_dict", _MMENGINE_EMA):
        return []
    average = tree.get(_MMENGINE_EMA)
    if isinstance(average, dict) and MMENGINE_COUNTER in average and "state_dict" in tree:
        return [_MMENGINE_SWAPPED]
    if chosen == "state_dict" and _LIGHTNING_TRAINED in tree:
        return [_AVERAGED_IN_PLACE]
    return [_MMCV_SWAPPED] if _holds_mmcv_copies(tree.get(chosen)) else []


def _holds_mmcv_copies(entry: Any) -> bool:
    """Return True if each copy ``ema_NAME`` has a weight beside, named with dots as underscores."""
    names = [name for name in entry if isinstance(name, str)] if isinstance(entry, dict) else []
    copies = [name for name in names if name.startswith("ema_")]
    underscored = {name.replace(".", "_") for name in names}
    return bool(copies) and all(name.removeprefix("ema_") in underscored for name in copies)


def _is_same(one: Any, other: Any) -> bool:
    """Return True if two state dicts hold the very same tensors, under any names."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    identities = [
        {identity(v) for v in entry.values() if isinstance(v, TensorView)} for entry in (one, other)
    ]
    return identities[0] == identities[1]


def _sounds_like_weights(name: str) -> bool:
    averaged = any(word in name.lower() for word in ("ema", "avg", "average", "swa"))
    return name in KNOWN_ENTRIES or averaged


def _describe(tree: Any) -> str:
    if not isinstance(tree, dict):
        kind = repr(tree) if isinstance(tree, Opaque) else f"a {type(tree).__name__}"
        return f"it holds {kind}, not a dict"
    if not tree:
        return "it is an empty dict"
    shown = [
        f"{short(name)}: {count_tensors(value)} tensors"
        for name, value in islice(tree.items(), _MOST_ENTRIES)
    ]
    more = len(tree) - len(shown)
    return "its entries are " + ", ".join(shown) + (f" and {more} more" if more else "")


def _close_keys(tree: Any, key: str) -> list[str]:
    """List the entries with tensors whose dotted paths resemble a mistyped path."""
    entries = tree.state if isinstance(tree, Opaque) else tree
    if not isinstance(entries, dict):
        return []
    names = islice((name for name in entries if isinstance(name, str)), _MOST_ENTRIES)
    states = [name for name in names if not TRAINING_STATE.fullmatch(name)]
    top = [name for name in states if count_tensors(entries[name])]
    return [path for path in close_names(key, [*_entry_paths(entries), *top]) if path != key]


def _suggest(tree: Any) -> str:
    entries = tree.state if isinstance(tree, Opaque) else tree
    paths = _entry_paths(entries) if isinstance(entries, dict) else []
    if paths:
        return f"Name the entry with --key, for instance --key {paths[0]}."
    return "Save model.state_dict() with torch.save, or name another file."


def _entry_paths(tree: Mapping[Any, Any]) -> list[str]:
    """List the dotted paths of entries that hold named tensors, most tensors first."""
    visited: set[int] = set()
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", tree)]
    counted_paths: list[tuple[int, str]] = []
    while waiting:
        prefix, entries = waiting.pop()
        for name, value in entries.items():
            typed = isinstance(name, str) and len(name) <= LONGEST_NAME
            if not typed or not isinstance(value, dict) or id(value) in visited:
                continue
            visited.add(id(value))
            if holds_tensors(value):
                tensor_count = sum(isinstance(v, TENSORS) for v in value.values())
                counted_paths.append((-tensor_count, prefix + name))
            elif prefix.count(".") < _DEEPEST_ENTRY:
                waiting.append((f"{prefix}{name}.", value))
    return [path for _, path in sorted(counted_paths)]
