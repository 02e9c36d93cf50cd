"""Which entry of a saved object holds the weights, and under which bare names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ckptavg.errors import CheckpointError, NoWeightsError, first_few, short
from ckptavg.formats import pickled_module
from ckptavg.formats.inert_values import Opaque, Refused, Sharded, TensorView
from ckptavg.formats.record import OPTIMIZER_KEYS
from ckptavg.formats.table import PROVENANCE

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

TENSORS = (TensorView, Sharded, Refused)
Entry = Mapping[Any, Any]
_PICKLED = "the weights are read from a pickled module, without its class"
_MODULE_DROPPED = (
    "'module.' in front of every name is taken for DDP's wrapper and dropped; where it is the "
    "model's own, write a .pth or .ckpt, which keeps the names as they are"
)
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
_LONGEST_NAME = 500  # characters of a name that could be typed after --key


def find_entry(path: str, tree: Any, key: str | None) -> tuple[str, Entry, list[str]]:
    """Find the state dict in what a file holds.

    Args:
        path: The file, for messages.
        tree: What was saved.
        key: Dotted path of the entry, if the user named one.

    Returns:
        The entry's dotted path (empty for the file itself), the entry, and notes.

    Raises:
        CheckpointError: There is no such entry, or none that can be told to hold the weights.
    """
    if key is not None:
        return key, _named_entry(path, tree, key), _note_swap(tree, key)
    if count_tensors(tree) == 0:
        raise NoWeightsError(f"{path} holds no tensors ({_describe(tree)})", _suggest(tree))
    if pickled_module.is_module(tree):
        return "", pickled_module.state_dict(tree), [_PICKLED]
    if isinstance(tree, dict):
        if tree.keys() >= OPTIMIZER_KEYS:
            raise NoWeightsError(f"{path} is an optimizer's state", "Name the model's checkpoint.")
        distinct = {id(value): value for value in tree.values()}
        if _holds_tensors(tree) and not any(map(_holds_tensors, distinct.values())):
            return "", tree, []
        for name in KNOWN_ENTRIES:
            if _holds_tensors(tree.get(name)):
                return name, tree[name], _note_other_weights(tree, name)
        for name in (*KNOWN_ENTRIES, "ema"):  # where only the EMA was kept, it is the model
            if pickled_module.is_module(tree.get(name)):
                notes = [_PICKLED, *_note_other_weights(tree, name)]
                return name, pickled_module.state_dict(tree[name]), notes
        for name in tree:
            if isinstance(name, str) and _holds_tensors(model := _entry(tree, name, "model")):
                return f"{name}.model", model, []
    raise CheckpointError(
        f"{path}: no entry is known to hold the weights ({_describe(tree)})", _suggest(tree)
    )


def _entry(tree: Mapping[Any, Any], name: str, inner: str) -> Any:
    """What stands under a name in an entry, where there is such."""
    below = tree.get(name)
    return below.get(inner) if isinstance(below, dict) else None


@dataclass(frozen=True)
class Place:
    """Where in a saved object the weights lie.

    Attributes:
        value: The object that holds them.
        entry: The same as a state dict.
        within_dicts: Whether all that it lies in are dicts.
    """

    value: Any
    entry: Entry
    within_dicts: bool

    @property
    def pickled(self) -> bool:
        """Whether the weights are those of a module that was pickled whole."""
        return self.entry is not self.value


def locate(tree: Any, key: str) -> Place | None:
    """Find an entry by its dotted path, whose parts may have dots themselves; None if it is not.

    Raises:
        MalformedPickle: A module at that place holds itself.
    """
    value, rest, within_dicts = tree, key, True
    while rest:
        if isinstance(value, Opaque):
            value, within_dicts = value.state, False
        match = next((k for k in _prefixes(rest) if isinstance(value, dict) and k in value), None)
        if match is None:
            return None
        value, rest = value[match], rest[len(match) + 1 :]
    if pickled_module.is_module(value):
        return Place(value, pickled_module.state_dict(value), within_dicts)
    return Place(value, value, within_dicts)


def beside(tree: Any, key: str) -> tuple[str, ...]:
    """What a saved object holds besides the weights, entry by entry, and in how many tensors."""
    found: list[str] = []
    prefix, rest = "", key
    while rest and isinstance(tree, dict):
        match = next((k for k in _prefixes(rest) if k in tree), "")
        others = islice(
            (n for n in tree if isinstance(n, str) and n not in (match, PROVENANCE)), _MOST_ENTRIES
        )
        for name in others:
            count = count_tensors(tree[name])
            held = f" ({count} tensor{'s' * (count != 1)})" if count else ""
            found.append(f"{prefix}{short(name)}{held}")
        prefix, rest, tree = f"{prefix}{match}.", rest[len(match) + 1 :], tree.get(match)
    return tuple(found)


def identity(view: TensorView) -> object:
    """Equal for views of the very same elements."""
    return view.storage.key, view.dtype.name, view.offset, view.shape, view.stride


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


def note_wrapper(bare: Mapping[str, str], names: list[str]) -> list[str]:
    """What to say of a prefix that was dropped but may be the model's own.

    A wrapper is called ``module`` by DDP, and so is the network in some people's models.
    """
    dropped = {stored[: len(stored) - len(name)] for stored, name in bare.items()}
    if len(bare) < len(names) or dropped in (set(), {""}):
        return []
    return [_MODULE_DROPPED] if not {d.replace("module.", "") for d in dropped} - {""} else []


def count_tensors(tree: Any) -> int:
    """How many tensors a saved value holds. What it holds many times is looked into once."""
    seen: set[int] = set()
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        count += isinstance(value, TENSORS)
        if id(value) in seen or not isinstance(value, (dict, list, tuple, Opaque)):
            continue
        seen.add(id(value))
        if isinstance(value, Opaque):
            waiting.append(value.state)
        else:
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return count


def _common_wrapper(names: list[str]) -> str | None:
    wrappers = (w for w in LEADING_WRAPPERS if all(n.startswith(w) for n in names))
    return next(wrappers, None) if names else None


def _without_inner(name: str) -> str:
    parts = [part for part in name.split(".") if part + "." not in INNER_WRAPPERS]
    return ".".join(parts)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(part, TENSORS) for name, part in value.items()
    )


def _named_entry(path: str, tree: Any, key: str) -> Entry:
    place = locate(tree, key)
    if place is None:
        raise CheckpointError(
            f"{path} has no entry {key!r} ({_describe(tree)})", "Choose one with --key."
        )
    if not place.pickled and not _holds_tensors(place.entry):
        raise CheckpointError(
            f"{path}: the entry {key!r} holds no tensors by name ({_describe(tree)})",
            "Choose another one with --key.",
        )
    return place.entry


def _prefixes(dotted: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a``: keys may themselves contain dots."""
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _note_other_weights(tree: Mapping[Any, Any], chosen: str) -> list[str]:
    likely = [n for n in tree if isinstance(n, str) and n != chosen and _sounds_like_weights(n)]
    others = [
        name
        for name in likely[:_MOST_ENTRIES]
        if count_tensors(tree[name]) and not _is_same(tree[name], tree[chosen])
    ]
    if count_tensors(_entry(tree, "extra_state", "ema")):  # fairseq's
        others.append("extra_state.ema")
    notes = _note_swap(tree, chosen)
    if _MMENGINE_SWAPPED in notes:
        others = [name for name in others if name != _MMENGINE_EMA]
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
    if chosen == "state_dict" and "current_model_state" in tree:
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


def _suggest(tree: Any) -> str:
    paths = _entry_paths(tree) if isinstance(tree, dict) else []
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
            typed = isinstance(name, str) and len(name) <= _LONGEST_NAME
            if not typed or not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if _holds_tensors(value):
                held = sum(isinstance(v, TENSORS) for v in value.values())
                found.append((-held, prefix + name))
            elif prefix.count(".") < _DEEPEST_ENTRY:
                waiting.append((f"{prefix}{name}.", value))
    return [path for _, path in sorted(found)]
