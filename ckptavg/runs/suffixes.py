"""Checkpoints under other suffixes: ``model.pt.ep5``, ``epoch_3.PTH``, ``ckpt_1.tar``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ckptavg.formats.beginning import begins_as_checkpoint
from ckptavg.formats.storage import Location
from ckptavg.runs.file_names import SUFFIXES, is_alias_name, matches, stem_of, why_not

PASSED_OVER = "its suffix is none of the usual ones; name it, or match it by --glob"
_MOST_LOOKED_INTO = 1000  # files of a directory
_ANY_SUFFIX = re.compile(r"\.(safetensors|pth|pt|ckpt|bin|tar|pyth)(?![a-z])", re.IGNORECASE)
# What editors, downloads and careful people leave beside a file.
_SET_ASIDE = re.compile(r"(~|\.(bak|backup|old|orig|te?mp|part|partial|incomplete|swp))$", re.I)


def split_by_suffix(
    files: Sequence[Location], pattern: str | None, *, alone: bool = True
) -> tuple[list[Location], list[Location]]:
    """Split the files of a directory into those that a run is made of, and those passed over.

    Other suffixes than the usual ones count where a pattern matches, where no file has a usual one,
    or where a numbered series has no other checkpoints beside it than such as ``model.pt``.

    Args:
        files: All files.
        pattern: Shell pattern that the user has given.
        alone: Whether no checkpoint but these is in the directory.

    Returns:
        The former, of which the names may yet say that they are none, and the latter, which begin
        as checkpoints do.
    """
    usual = [path for path in files if path.name.endswith(SUFFIXES)]
    others = [path for path in files if not path.name.endswith(SUFFIXES)]
    others = [path for path in others if not why_not(_bare_stem(path))]
    if pattern is not None:
        matching = [path for path in others if matches(path, pattern) and _may_hold_weights(path)]
        return [*usual, *matching], []
    saved = [path for path in others[:_MOST_LOOKED_INTO] if _is_saved(path)]
    if alone and all(is_alias_name(path) or why_not(stem_of(path)) for path in usual):
        taken = _series(others, saved) if usual else [p for p in saved if not _is_set_aside(p)]
    else:
        taken = []
    return [*usual, *taken], [path for path in saved if path not in {*taken}]


def _series(files: Sequence[Location], saved: Sequence[Location]) -> list[Location]:
    """The files of numbered series of which several begin as checkpoints do: torn ones, too."""
    begun = Counter(_masked(path) for path in saved if not _is_set_aside(path))
    series = {name for name, count in begun.items() if count > 1}
    return [path for path in files if _masked(path) in series]


def _masked(path: Location) -> str:
    return re.sub(r"\d+", "*", path.name)


def _bare_stem(path: Location) -> str:
    """The name in front of a checkpoint's suffix, and of whatever follows that."""
    suffix = _ANY_SUFFIX.search(path.name)
    return path.name if suffix is None else path.name[: suffix.start()].lower()


def _may_hold_weights(path: Location) -> bool:
    return _ANY_SUFFIX.search(path.name) is not None or _is_saved(path)


def _is_saved(path: Location) -> bool:
    """Whether a file is a checkpoint: by its first bytes, or where those cost a request by name."""
    if not isinstance(path, Path):
        return _ANY_SUFFIX.search(path.name) is not None
    return path.is_file() and begins_as_checkpoint(path)


def _is_set_aside(path: Location) -> bool:
    return _SET_ASIDE.search(path.name) is not None
