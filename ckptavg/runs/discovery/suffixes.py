"""Checkpoints under other suffixes: ``model.pt.ep5``, ``epoch_3.PTH``, ``ckpt_1.tar``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ckptavg.formats.file_formats import begins_as_checkpoint, find_suffix
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import (
    has_suffix,
    is_alias_name,
    matches,
    stem_of,
    why_no_weights,
)

# Files of a directory whose first bytes are read: it may be a data set of images.
_MOST_LOOKED_INTO = 1000
# Endings that editors, downloads and careful people give to copies beside a file.
_SET_ASIDE = re.compile(r"(~|\.(bak|backup|old|orig|te?mp|part|partial|incomplete|swp))$", re.I)


def split_by_suffix(
    files: Sequence[Location], pattern: str | None, *, alone: bool = True
) -> tuple[list[Location], list[Location]]:
    """Split the files of a directory into files of the run and files passed over.

    Files with other suffixes than a checkpoint's belong to the run in three cases: the user's
    pattern matches, no file has a checkpoint's suffix, or the files are a numbered series and all
    files with a checkpoint's suffix have names without a step, such as ``model.pt``.

    Args:
        files: All files of the directory.
        pattern: The user's shell pattern, if any.
        alone: True if no directory beside the files is a checkpoint.

    Returns:
        The files of the run, whose names are not checked yet; and the files passed over, whose
        first bytes are those of checkpoints.
    """
    members: list[Location] = []
    candidates: list[Location] = []
    for path in files:
        if has_suffix(path):
            members.append(path)
        elif not why_no_weights(_bare_stem(path)):
            candidates.append(path)
    if pattern is not None:
        for path in candidates:
            if matches(path, pattern) and _may_hold_weights(path):
                members.append(path)
        return members, []
    saved = [path for path in candidates[:_MOST_LOOKED_INTO] if _is_saved(path)]
    if alone and not members:
        members = [path for path in saved if not _is_set_aside(path)]
    elif alone and not any(map(_is_step, members)):
        members += _find_series(candidates, saved)
    selected = set(members)
    return members, [path for path in saved if path not in selected]


def _is_step(path: Location) -> bool:
    """Return True if a name is that of a checkpoint with a step."""
    return not is_alias_name(path) and not why_no_weights(stem_of(path))


def _find_series(files: Sequence[Location], saved: Sequence[Location]) -> list[Location]:
    """Find the files of numbered series in which several files begin like checkpoints.

    Damaged files of such a series are included, so that they are reported and not passed over.

    Args:
        files: All files with other suffixes than a checkpoint's.
        saved: Those of the files whose first bytes are those of checkpoints.
    """
    counts = Counter(_mask_numbers(path) for path in saved if not _is_set_aside(path))
    return [path for path in files if counts[_mask_numbers(path)] > 1]


def _mask_numbers(path: Location) -> str:
    """Replace the numbers in a name by stars."""
    return re.sub(r"\d+", "*", path.name)


def _bare_stem(path: Location) -> str:
    """Return the beginning of a name, before the first suffix of a checkpoint."""
    end = find_suffix(path.name)
    if end is None:
        return path.name
    return path.name[:end].lower()


def _may_hold_weights(path: Location) -> bool:
    """Return True if the name has a checkpoint's suffix anywhere, or the first bytes match."""
    return find_suffix(path.name) is not None or _is_saved(path)


def _is_saved(path: Location) -> bool:
    """Return True if a file is a checkpoint, by the first bytes, or by name for a remote file."""
    # The first bytes of each remote file would cost a request.
    if not isinstance(path, Path):
        return find_suffix(path.name) is not None
    return path.is_file() and begins_as_checkpoint(path)


def _is_set_aside(path: Location) -> bool:
    """Return True if a name marks a copy that was set aside."""
    return _SET_ASIDE.search(path.name) is not None
