"""Suggestions of existing paths near a missing path."""

from __future__ import annotations

from ckptavg.errors import first_few
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.io.paths import Location


def suggest_neighbours(path: Location) -> str:
    """Suggest existing paths that are similar to a missing path or nearby, as a remedy."""
    missing, lower_names = path, list[str]()
    while not missing.parent.is_dir():
        if missing.parent == missing:
            return "Check its first part, and what your credentials let you see."
        lower_names.insert(0, missing.name)
        missing = missing.parent
    parent = missing.parent
    below = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    if not below:
        return f"{parent} is empty."
    # The name is listed, and yet the path does not exist.
    if missing.name in below:
        return f"{missing} is a link to a path that does not exist."
    if close := close_names(missing.name, below):
        return did_you_mean([str(_descend(parent / name, lower_names)) for name in close])
    return f"{parent} holds {first_few([str(parent / name) for name in below], 5)}."


def _descend(path: Location, names: list[str]) -> Location:
    """Append names to a path as long as the path exists."""
    for name in names:
        if not (path / name).exists():
            break
        path = path / name
    return path
