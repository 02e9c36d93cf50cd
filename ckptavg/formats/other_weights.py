"""Notes about further weights beside the chosen ones, such as running averages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptavg.errors import first_few
from ckptavg.formats.network_entries import KNOWN_ENTRIES, is_network, may_hold_networks
from ckptavg.formats.safe_pickle.values import TensorView
from ckptavg.formats.tree import count_tensors, entry_within, identity
from ckptavg.formats.wrappers import MMENGINE_COUNTER

_AVERAGE_WORDS = ("ema", "avg", "average", "swa")
# The EMA of fairseq: an entry, and a name in the entry.
_FAIRSEQ_EMA = ("extra_state", "ema")
_LIGHTNING_TRAINED = "current_model_state"
_AVERAGED_IN_PLACE = (
    "'state_dict' holds a running average, as Lightning's WeightAveraging keeps it; "
    "the weights as trained are under `key='current_model_state'`"
)
_MMENGINE_EMA = "ema_state_dict"
_MMENGINE_SWAPPED = (
    "mmengine's EMAHook swaps the two on saving: 'state_dict' holds the moving average, "
    "'ema_state_dict' the weights as trained (`key='ema_state_dict'`)"
)
_MMCV_SWAPPED = (
    "each weight NAME has another as ema_NAME beside it: mmcv's EMAHook swaps the two at the end "
    "of an epoch, and NAME then is the moving average, ema_NAME the weight as trained"
)
# Most entries that are counted.
_MOST_ENTRIES = 12


def note_other_weights(tree: Mapping[Any, Any], chosen: str) -> list[str]:
    """Make notes about entries that hold weights too, beside the chosen entry.

    Args:
        tree: The saved object.
        chosen: Name of the entry that is taken.
    """
    notes = note_swap(tree, chosen)
    alternatives: list[str] = []
    for name in _likely_entries(tree, chosen)[:_MOST_ENTRIES]:
        if notes and name in (_MMENGINE_EMA, _LIGHTNING_TRAINED):
            # The note about the swap names this entry.
            continue
        if count_tensors(tree[name]) and not _hold_same_tensors(tree[name], tree[chosen]):
            alternatives.append(name)
    if count_tensors(entry_within(tree, *_FAIRSEQ_EMA)):
        alternatives.append(".".join(_FAIRSEQ_EMA))
    if alternatives:
        shown = first_few(alternatives)
        notes.append(f"weights are taken from {chosen!r}; others are in {shown} (see `key`)")
    return notes


def _likely_entries(tree: Mapping[Any, Any], chosen: str) -> list[str]:
    """List the entries besides the chosen one that may hold weights, by name or contents."""
    names = [name for name in tree if isinstance(name, str) and name != chosen]
    # By identity: one entry may be held under very many names.
    entries = {id(tree[name]): tree[name] for name in names}
    networks = {identifier for identifier, entry in entries.items() if is_network(entry)}
    likely: list[str] = []
    for name in names:
        is_other_network = id(tree[name]) in networks and may_hold_networks(name, tree[name])
        if is_other_network or _sounds_like_weights(name):
            likely.append(name)
    return likely


def note_swap(tree: Any, chosen: str) -> list[str]:
    """Make a note if a trainer keeps a running average in the place of the weights.

    Args:
        tree: The saved object.
        chosen: Name of the entry that is taken.
    """
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
    if not isinstance(entry, dict):
        return False
    names = [name for name in entry if isinstance(name, str)]
    copies = [name for name in names if name.startswith("ema_")]
    underscored = {name.replace(".", "_") for name in names}
    return bool(copies) and all(name.removeprefix("ema_") in underscored for name in copies)


def _hold_same_tensors(first: Any, second: Any) -> bool:
    """Return True if two state dicts hold the very same tensors, under any names."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return False
    return _identities(first) == _identities(second)


def _identities(entry: Mapping[Any, Any]) -> set[object]:
    return {identity(value) for value in entry.values() if isinstance(value, TensorView)}


def _sounds_like_weights(name: str) -> bool:
    return name in KNOWN_ENTRIES or any(word in name.lower() for word in _AVERAGE_WORDS)
