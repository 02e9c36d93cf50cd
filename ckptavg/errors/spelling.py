"""Remedies for mistyped names: the known names that are like them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from itertools import islice

_MOST_NAMES = 10_000  # compared
_LONGEST_NAME = 200  # characters; comparing takes quadratic time
_LIKENESS = 0.6  # of 1, as difflib counts it
_WORD = re.compile(r"[^\W_]+")
_WILDCARDS = re.compile(r"[*?]|\[[^]]*\]")


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """List the known names that a mistyped one may have been meant for, the likeliest first.

    Case makes no difference. A name that says less is like those that have its words, as ``acc`` is
    like ``val_acc``; a dotted one is like its own end, as ``model.fc`` is like ``fc``.

    Args:
        name: The name that is not known.
        known: The names that are.
        count: Names to list at most.
    """
    if not name or len(name) > _LONGEST_NAME:
        return []
    by_lower: dict[str, str] = {}
    for other in islice(known, _MOST_NAMES):
        if len(other) <= _LONGEST_NAME:
            by_lower.setdefault(other.lower(), other)
    lower = name.lower()
    if lower in by_lower:
        return [by_lower[lower]]
    words = _words(lower)
    fuller = [other for other in by_lower if words and words <= _words(other)]
    fuller.sort(key=lambda other: len(_words(other)))
    alike = difflib.get_close_matches(lower, list(by_lower), count, _LIKENESS)
    ends = [other for other in by_lower if lower.endswith(f".{other}")]
    close = dict.fromkeys([*fuller, *alike, *ends])
    return [by_lower[other] for other in close][:count]


def did_you_mean(names: Sequence[str]) -> str:
    """Word the remedy that offers some names; empty where there are none."""
    if not names:
        return ""
    *others, last = names
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"


def close_patterns(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """List patterns like one that matches none of some dotted names, which match some of them.

    Args:
        pattern: A shell pattern.
        names: The names that it should match, as of tensors.
        count: Patterns to list at most.
    """
    names = list(islice(names, _MOST_NAMES))
    bare = _WILDCARDS.sub("", pattern).strip(".")
    if not bare:
        return []
    for wider in (f"{bare}.*", f"*.{bare}", f"*.{bare}.*", f"*{bare}*"):
        if _matches_any(wider, names):
            return [wider]
    parts = _parts(names)
    inner = bare
    while "." in inner:
        inner = inner.partition(".")[2]
        if inner in parts and _matches_any(other := _replace(pattern, bare, inner), names):
            return [other]
    depth = bare.count(".")
    close = close_names(bare, [part for part in parts if part.count(".") == depth], count)
    corrected: list[str] = []
    for part in close or close_names(bare, parts, count):
        replaced = _replace(pattern, bare, part)
        matching = [p for p in (replaced, f"*.{replaced}") if _matches_any(p, names)]
        corrected += matching[:1]
    return list(dict.fromkeys(corrected))


def _parts(names: Iterable[str]) -> list[str]:
    """List what dotted names consist of: their beginnings, and each part by itself."""
    parts: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        parts |= dict.fromkeys(".".join(segments[:end]) for end in range(1, len(segments) + 1))
        parts |= dict.fromkeys(segments)
    return list(parts)


def _replace(pattern: str, bare: str, part: str) -> str:
    """Put a part of a name in the place of a pattern's text, with all wildcards around it."""
    if bare in pattern:
        return pattern.replace(bare, part)
    return f"{'*' if _WILDCARDS.match(pattern) else ''}{part}*"


def _words(name: str) -> frozenset[str]:
    return frozenset(_WORD.findall(name))


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
