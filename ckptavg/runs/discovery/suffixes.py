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
    why_not,
)

# Files of a directory whose first bytes are read: it may be a data set of images.
_MOST_LOOKED_INTO = 1000
# Endings that editors, downloads and careful people give to copies beside a file.
_SET_ASIDE = re.compile(r"(~|\.(bak|backup|old|orig|te?mp|part|partial|incomplete|swp))$", re.I)


def split_by_suffix(
    files: Sequence[Location], pattern: str | None, *, alone: bool = True
) -> tuple[list[Location], list[Location]]:
    """Split the files of a directory into files of the run and files passed over.

    Files with unusual suffixes belong to the run in three cases: the user's pattern matches, no
    file has a usual suffix, or the files are a numbered series and all files with usual suffixes
    have names without a step, such as ``model.pt``.

    Args:
        files: All files of the directory.
        pattern: The user's shell pattern, if any.
        alone: True if no directory beside the files is a checkpoint.

    Returns:
        The files of the run, whose names are not checked yet; and the files passed over, whose
        first bytes are those of checkpoints.
    """
    usual = [path for path in files if has_suffix(path)]
    candidates = [path for path in files if not has_suffix(path)]
    candidates = [path for path in candidates if not why_not(_bare_stem(path))]
    if pattern is not None:
        matching = [
            path for path in candidates if matches(path, pattern) and _may_hold_weights(path)
        ]
        return [*usual, *matching], []
    saved = [path for path in candidates[:_MOST_LOOKED_INTO] if _is_saved(path)]
    if alone and all(is_alias_name(path) or why_not(stem_of(path)) for path in usual):
        unusual = (
            _find_series(candidates, saved) if usual else [p for p in saved if not _is_set_aside(p)]
        )
    else:
        unusual = []
    return [*usual, *unusual], [path for path in saved if path not in {*unusual}]


def _find_series(files: Sequence[Location], saved: Sequence[Location]) -> list[Location]:
    """Find the files of numbered series in which several files begin like checkpoints.

    Damaged files of such a series are included, so that they are reported and not passed over.

    Args:
        files: All files with unusual suffixes.
        saved: Files with unusual suffixes whose first bytes are those of checkpoints.
    """
    counts = Counter(_mask_numbers(path) for path in saved if not _is_set_aside(path))
    series = {name for name, count in counts.items() if count > 1}
    return [path for path in files if _mask_numbers(path) in series]


def _mask_numbers(path: Location) -> str:
    """Replace the numbers in a name by stars."""
    return re.sub(r"\d+", "*", path.name)


def _bare_stem(path: Location) -> str:
    """Return the beginning of a name, before the first suffix of a checkpoint."""
    end = find_suffix(path.name)
    return path.name if end is None else path.name[:end].lower()


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
