"""Suggestions of similar known names for mistyped names."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice

_MOST_NAMES = 10_000  # that are compared
# In characters: comparing takes time quadratic in the length.
_LONGEST_NAME = 200
_LIKENESS = 0.6  # between 0 and 1, as ``difflib`` measures similarity
_WORD = re.compile(r"[^\W_]+")
_WILDCARDS = re.compile(r"[*?]|\[[^]]*\]")


def close_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """List the known names that are most similar to a mistyped name, the most similar first.

    Case is ignored. A short name is similar to a name with the same words and more, as ``acc`` to
    ``val_acc``. A dotted name is similar to its own end, as ``model.fc`` to ``fc``.

    Args:
        name: The unknown name.
        known: The known names.
        count: Greatest number of names to list.

    Returns:
        At most ``count`` names; none for an empty name or a name of more than 200 characters.
    """
    if not name or len(name) > _LONGEST_NAME:
        return []
    by_lower: dict[str, str] = {}
    for candidate in islice(known, _MOST_NAMES):
        if len(candidate) <= _LONGEST_NAME:
            by_lower.setdefault(candidate.lower(), candidate)
    lower = name.lower()
    if lower in by_lower:
        return [by_lower[lower]]
    words = _words(lower)
    # Names with all the words come first: difflib misses those that are much longer.
    fuller = [candidate for candidate in by_lower if words and words <= _words(candidate)]
    fuller.sort(key=lambda candidate: len(_words(candidate)))
    alike = difflib.get_close_matches(lower, list(by_lower), count, _LIKENESS)
    ends = [candidate for candidate in by_lower if lower.endswith(f".{candidate}")]
    close = dict.fromkeys([*fuller, *alike, *ends])
    return [by_lower[candidate] for candidate in close][:count]


def did_you_mean(names: Sequence[str]) -> str:
    """Format names as a question for a remedy; return an empty text for no names."""
    if not names:
        return ""
    *earlier, last = names
    if not earlier:
        return f"Did you mean {last}?"
    return f"Did you mean {', '.join(earlier)} or {last}?"


def close_patterns(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """List corrections of a shell pattern that matches none of the dotted names.

    Each listed pattern matches a name at least.

    Args:
        pattern: A shell pattern that matches no name.
        names: Dotted names to match, as of tensors.
        count: Greatest number of patterns to list.

    Returns:
        At most ``count`` patterns.
    """
    names = list(islice(names, _MOST_NAMES))
    bare = _WILDCARDS.sub("", pattern).strip(".")
    if not bare:
        return []
    # Missing wildcards are the likeliest mistake, and the cheapest to try.
    for wider in (f"{bare}.*", f"*.{bare}", f"*.{bare}.*", f"*{bare}*"):
        if _matches_any(wider, names):
            return [wider]
    parts = _parts(names)
    # Then a prefix that the names do not have, such as module.
    inner = bare
    while "." in inner:
        inner = inner.partition(".")[2]
        if inner in parts and _matches_any(candidate := _replace(pattern, bare, inner), names):
            return [candidate]
    # Then a typing mistake: parts with as many segments come first.
    depth = bare.count(".")
    close = close_names(bare, [part for part in parts if part.count(".") == depth], count)
    corrected: list[str] = []
    for part in close or close_names(bare, parts, count):
        replaced = _replace(pattern, bare, part)
        for candidate in (replaced, f"*.{replaced}"):
            if _matches_any(candidate, names):
                corrected.append(candidate)
                break
    return list(dict.fromkeys(corrected))


def _parts(names: Iterable[str]) -> list[str]:
    """List the beginnings of dotted names, and each segment by itself."""
    parts: dict[str, None] = {}
    for name in names:
        segments = name.split(".")
        parts |= dict.fromkeys(accumulate(segments, "{}.{}".format))
        parts |= dict.fromkeys(segments)
    return list(parts)


def _replace(pattern: str, bare: str, part: str) -> str:
    """Replace the literal text of a pattern by part of a name, and keep the wildcards around."""
    if bare in pattern:
        return pattern.replace(bare, part)
    if _WILDCARDS.match(pattern):
        return f"*{part}*"
    return f"{part}*"


def _words(name: str) -> frozenset[str]:
    """Return the words of a name, which underscores and punctuation separate."""
    return frozenset(_WORD.findall(name))


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Return True if a shell pattern matches a name at least."""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
