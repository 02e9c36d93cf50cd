"""Which entry of a saved object holds the weights, and under which bare names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ckptavg.errors import CheckpointError, NoWeightsError, first_few, short
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.network_entries import (
    find_networks,
    is_average,
    is_network,
    may_hold_networks,
)
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
LEADING_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
INNER_WRAPPERS = LEADING_WRAPPERS[1:]
# Models of averages count their updates beside `module.`: torch's AveragedModel, and mmengine's.
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
_DEEPEST_ENTRY = 3
_MOST_ENTRIES = 12  # that a message lists


@dataclass(frozen=True)
class Weights:
    """The weights that were found in a saved object.

    Attributes:
        key: Dotted path of the entry that holds them; empty if the object itself does.
        entry: The state dict; of several networks what they hold, by path and name joined.
        notes: What a person should know about the choice.
        networks: Dotted path below the key → state dict, where there are several networks.
    """

    key: str
    entry: Entry
    notes: Sequence[str] = ()
    networks: Mapping[str, Entry] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """Dotted paths of the entries that hold them, from the object on."""
        return tuple(join(self.key, path) for path in self.networks or ("",))

    @property
    def record_key(self) -> str:
        """The path beside which training recorded its numbers: that of the first entry."""
        return self.paths[0]


def find_weights(path: str, tree: Any, key: str | None) -> Weights:
    """Find the weights in what a file holds: one state dict, or those of several networks.

    Args:
        path: The file, for messages.
        tree: What was saved.
        key: Dotted path of the entry, if the user named one.

    Raises:
        CheckpointError: There is no such entry, or none that can be told to hold the weights.
    """
    weights = _find_weights(path, tree, key)
    networks = {name: refuse_unknown(entry) for name, entry in weights.networks.items()}
    return replace(weights, entry=refuse_unknown(weights.entry), networks=networks)


def _find_weights(path: str, tree: Any, key: str | None) -> Weights:
    if key is not None:
        return _named_entry(path, tree, key)
    if count_tensors(tree) == 0:
        raise NoWeightsError(f"{path} holds no tensors ({_describe(tree)})", _suggest(tree))
    if pickled_module.is_module(tree):
        return Weights("", pickled_module.state_dict(tree), [_PICKLED])
    if isinstance(tree, dict):
        if tree.keys() >= OPTIMIZER_KEYS:
            raise NoWeightsError(f"{path} is an optimizer's state", "Name the model's checkpoint.")
        if (known := _find_known(tree)) is not None:
            return known
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
    """Tell whether all tensors are those of optimizers, random generators and the like."""
    parts = children(tree)
    # One part may stand under very many names, and very many parts may share a list.
    distinct = {id(part): part for _, part in parts}
    visited: set[int] = set()
    counts = {identifier: count_tensors(part, visited) for identifier, part in distinct.items()}
    holders = [(name, part) for name, part in parts if counts[id(part)]]
    return bool(holders) and not any(
        isinstance(part, (Opaque, *TENSORS)) or may_hold_networks(name, part)
        for name, part in holders
    )


def _find_known(tree: Mapping[Any, Any]) -> Weights | None:
    """The weights where an object is a state dict, or holds one where trainers put it."""
    distinct = {id(value): value for value in tree.values()}
    if holds_tensors(tree) and not any(map(holds_tensors, distinct.values())):
        return _with_nested("", tree, [])
    for name in KNOWN_ENTRIES:
        if holds_tensors(tree.get(name)):
            return _with_nested(name, tree[name], _note_other_weights(tree, name))
    for name in (*KNOWN_ENTRIES, "ema"):  # where only the EMA was kept, it is the model
        if pickled_module.is_module(tree.get(name)):
            notes = [_PICKLED, *_note_other_weights(tree, name)]
            return Weights(name, pickled_module.state_dict(tree[name]), notes)
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
    """The weights of every network below an entry; None where there is none.

    A single one is like any other state dict, several share a table by their paths.
    """
    entries = find_networks(tree)
    names = entries.names()
    values = {path: value_at(tree, path) for path in entries.networks}
    modules = {path for path, value in values.items() if pickled_module.is_module(value)}
    misled = [p for p, e in entries.networks.items() if values[p] is not e and p not in modules]
    if not entries.networks or names is None or misled:
        return None
    notes = [_PICKLED] if modules else []
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
    """A state dict with those that are nested in it, as networks of their own."""
    nested = _find_networks(entry, key)
    if nested is None or "" not in nested.networks:
        return Weights(key, entry, notes)
    return Weights(key, nested.entry, [*notes, *nested.notes], nested.networks)


def _entry(tree: Mapping[Any, Any], name: str, inner: str) -> Any:
    """What stands under a name in an entry, where there is such."""
    below = tree.get(name)
    return below.get(inner) if isinstance(below, dict) else None


def beside(tree: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """What a saved object holds besides the weights, entry by entry, and in how many tensors.

    Args:
        tree: What was saved.
        paths: Dotted paths of the entries that hold the weights.
    """
    levels: dict[str, Any] = {}
    for path in paths:
        levels |= dict(walk(tree, path) or ())
    homes = set(paths)
    shown: list[str] = []
    for above, level in levels.items():
        others = [] if above in homes else children(level)
        named = [(join(above, name), value) for name, value in others if name != PROVENANCE]
        for name, value in [part for part in named if part[0] not in levels][:_MOST_ENTRIES]:
            count = count_tensors(value)
            held = f" ({count} tensor{'s' * (count != 1)})" if count else ""
            shown.append(f"{short(name)}{held}")
    return tuple(shown)


def identity(view: TensorView) -> object:
    """Equal for views of the very same elements."""
    return view.storage, view.dtype.name, view.offset, view.shape, view.stride


def bare_names(names: list[str]) -> dict[str, str]:
    """Names as a wrapper-free model has them: stored name → bare name.

    The wrappers that DDP, torch.compile, FSDP and activation checkpointing add are dropped in front
    where every name bears them, repeatedly, and the latter three inside a name too. The counter of
    an averaged model goes with its wrapper. Names that would collide are left as they are.
    """
    bare = dict(zip(names, names, strict=True))
    while wrapper := _common_wrapper([b for b in bare.values() if b not in COUNTERS]):
        bare = {name: b[len(wrapper) :] for name, b in bare.items() if b not in COUNTERS}
    bare = {name: _without_inner(b) for name, b in bare.items()}
    if len(set(bare.values())) < len(bare) or "" in bare.values():
        return dict(zip(names, names, strict=True))
    return bare


def bare_network_names(networks: Mapping[str, list[str]]) -> dict[str, str]:
    """Bare names of the tensors of several networks, each without its own wrapper.

    Args:
        networks: Dotted path → stored names.

    Returns:
        Stored name → bare name, both with the network's path in front.
    """
    bare: dict[str, str] = {}
    for path, names in networks.items():
        own = bare_names(names).items()
        bare |= {join(path, stored): join(path, name) for stored, name in own}
    if len(set(bare.values())) < len(bare):
        return {join(path, name): join(path, name) for path in networks for name in networks[path]}
    return bare


def note_wrapper(names: list[str]) -> list[str]:
    """A note where a prefix is dropped from the names that may be the model's own.

    A wrapper is called ``module`` by DDP, and so is the network in some people's models.
    """
    bare = bare_names(names)
    dropped = {stored[: len(stored) - len(name)] for stored, name in bare.items()}
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
    place = locate(tree, key)
    if place is None:
        raise CheckpointError(
            f"{path} has no entry {key!r} ({_describe(tree)})",
            did_you_mean(_close_keys(tree, key)) or "Choose one with --key.",
        )
    if _is_optimizer_state(place.value):
        known = _find_known(tree) if isinstance(tree, dict) else None
        found = [known.key] if known is not None and known.key else []
        raise NoWeightsError(
            f"{path}: the entry {key!r} is an optimizer's state, not weights",
            did_you_mean(found) or "Choose another one with --key.",
        )
    notes = _note_swap(tree, key)
    if place.pickled or holds_tensors(place.entry):
        return Weights(key, place.entry, notes)
    if (networks := _find_networks(place.value, key)) is not None:
        return networks
    raise CheckpointError(
        f"{path}: the entry {key!r} holds no tensors by name ({_describe(tree)})",
        did_you_mean(_close_keys(tree, key)) or "Choose another one with --key.",
    )


def _is_optimizer_state(value: Any) -> bool:
    """Tell the state of an optimizer, or a list of such, as Lightning keeps them."""
    states = value if isinstance(value, list) else [value]
    return bool(states) and all(
        isinstance(state, dict) and state.keys() >= OPTIMIZER_KEYS for state in states
    )


def _note_other_weights(tree: Mapping[Any, Any], chosen: str) -> list[str]:
    names = [name for name in tree if isinstance(name, str) and name != chosen]
    entries = {id(tree[name]): tree[name] for name in names}
    networks = {same for same, entry in entries.items() if is_network(entry)}
    likely = [
        name
        for name in names
        if _sounds_like_weights(name)
        or (id(tree[name]) in networks and may_hold_networks(name, tree[name]))
    ]
    others = [
        name
        for name in likely[:_MOST_ENTRIES]
        if count_tensors(tree[name]) and not _is_same(tree[name], tree[chosen])
    ]
    if count_tensors(_entry(tree, "extra_state", "ema")):  # fairseq's
        others.append("extra_state.ema")
    notes = _note_swap(tree, chosen)
    if notes:
        others = [name for name in others if name not in (_MMENGINE_EMA, _LIGHTNING_TRAINED)]
    if others:
        shown = first_few(others)
        notes.append(f"weights are taken from {chosen!r}; {shown} also holds some (--key)")
    return notes


def _note_swap(tree: Any, chosen: str) -> list[str]:
    """A note where a trainer keeps a running average in the place of the weights."""
    if not isinstance(tree, dict) or chosen not in ("state_dict", _MMENGINE_EMA):
        return []
    average = tree.get(_MMENGINE_EMA)
    if isinstance(average, dict) and MMENGINE_COUNTER in average and "state_dict" in tree:
        return [_MMENGINE_SWAPPED]
    if chosen == "state_dict" and _LIGHTNING_TRAINED in tree:
        return [_AVERAGED_IN_PLACE]
    return [_MMCV_SWAPPED] if _holds_mmcv_copies(tree.get(chosen)) else []


def _holds_mmcv_copies(entry: Any) -> bool:
    """Whether each copy ``ema_NAME`` has its weight beside it, named without dots in it."""
    names = [name for name in entry if isinstance(name, str)] if isinstance(entry, dict) else []
    copies = [name for name in names if name.startswith("ema_")]
    known = {name.replace(".", "_") for name in names}
    return bool(copies) and all(name.removeprefix("ema_") in known for name in copies)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two state dicts hold the very same tensors, under whatever names."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return False
    held = [
        {identity(v) for v in entry.values() if isinstance(v, TensorView)} for entry in (one, other)
    ]
    return held[0] == held[1]


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
    """List the entries with tensors whose dotted paths are like a mistyped one."""
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
    """Dotted paths of the entries that hold tensors by name, most tensors first."""
    seen: set[int] = set()
    waiting: list[tuple[str, Mapping[Any, Any]]] = [("", tree)]
    found: list[tuple[int, str]] = []
    while waiting:
        prefix, entries = waiting.pop()
        for name, value in entries.items():
            typed = isinstance(name, str) and len(name) <= LONGEST_NAME
            if not typed or not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if holds_tensors(value):
                held = sum(isinstance(v, TENSORS) for v in value.values())
                found.append((-held, prefix + name))
            elif prefix.count(".") < _DEEPEST_ENTRY:
                waiting.append((f"{prefix}{name}.", value))
    return [path for _, path in sorted(found)]
