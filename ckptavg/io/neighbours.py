"""Suggestions of existing paths near a missing path."""

from __future__ import annotations

from ckptavg.errors import first_few
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.io.paths import Location


def suggest_neighbours(path: Location) -> str:
    """Suggest existing paths that are similar to a missing path or nearby, as a remedy."""
    line = [path, *path.parents]
    above = next((i for i, p in enumerate(line[1:], 1) if p.is_dir()), None)
    if above is None:
        return "Check its first part, and what your credentials let you see."
    parent, missing = line[above], line[above - 1]
    below = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    lower_parts = [p.name for p in reversed(line[: above - 1])]
    # The name is listed, and yet the path does not exist.
    if missing.name in below:
        return "It is a link to what is gone."
    if close := close_names(missing.name, below):
        return did_you_mean([str(_existing(parent / name, lower_parts)) for name in close])
    names = [str(parent / name) for name in below]
    return f"{parent} holds {first_few(names, 5)}." if names else f"{parent} is empty."


def _existing(path: Location, rest: list[str]) -> Location:
    """Append names to a path as long as the path exists."""
    for name in rest:
        if not (path / name).exists():
            break
        path = path / name
    return path
