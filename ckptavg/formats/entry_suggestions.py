"""Descriptions of a saved object for messages, and suggestions of entries to take."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from ckptavg.errors import short
from ckptavg.errors.spelling import close_names
from ckptavg.formats.safe_pickle.values import Opaque
from ckptavg.formats.training_record import TRAINING_STATE
from ckptavg.formats.tree import LONGEST_NAME, TENSORS, count_tensors, holds_tensors

# Levels below the saved object at which entries are suggested.
_DEEPEST_ENTRY = 3
# Most entries that a message lists.
_MOST_ENTRIES = 12


def describe(tree: Any) -> str:
    """Describe a saved object as a clause: the entries, with counts of tensors."""
    if not isinstance(tree, dict):
        kind = repr(tree) if isinstance(tree, Opaque) else f"a {type(tree).__name__}"
        return f"it holds {kind}, not a dict"
    if not tree:
        return "it is an empty dict"
    shown: list[str] = []
    for name, value in islice(tree.items(), _MOST_ENTRIES):
        shown.append(f"{short(name)}: {count_tensors(value)} tensors")
    text = f"its entries are {', '.join(shown)}"
    if len(tree) > len(shown):
        text += f" and {len(tree) - len(shown)} more"
    return text


def find_close_entries(tree: Any, key: str) -> list[str]:
    """List the entries with tensors whose dotted paths resemble a mistyped path.

    Args:
        tree: The saved object.
        key: The mistyped path.
    """
    entries = tree.state if isinstance(tree, Opaque) else tree
    if not isinstance(entries, dict):
        return []
    candidates = _entry_paths(entries)
    for name in islice((name for name in entries if isinstance(name, str)), _MOST_ENTRIES):
        if not TRAINING_STATE.fullmatch(name) and count_tensors(entries[name]):
            candidates.append(name)
    return [path for path in close_names(key, candidates) if path != key]


def suggest_entry(tree: Any) -> str:
    """Word the remedy for an object without known weights: the most likely entry, if any."""
    entries = tree.state if isinstance(tree, Opaque) else tree
    if isinstance(entries, dict) and (paths := _entry_paths(entries)):
        return f"Name the entry by `key`, for instance `key={paths[0]!r}`."
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
    counted_paths.sort()
    return [path for _, path in counted_paths]
