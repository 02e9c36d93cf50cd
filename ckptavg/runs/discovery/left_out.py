"""Paths that are left out of a run, with reasons and notes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ckptavg.errors import RunError, first_few
from ckptavg.errors.spelling import close_names
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import NOT_WEIGHTS
from ckptavg.runs.discovery.numbered import step_directory
from ckptavg.runs.discovery.suffixes import PASSED_OVER

LeftOut = tuple[Location, str]
SKIPPED = "skipped, as asked for"
REPLICA = "the same weights as those of the first rank"
NO_MATCH = "does not match "


def tell(left_out: Sequence[LeftOut]) -> list[str]:
    """Word the notes about the paths that were left out.

    Paths that no user expects in a run get no note. Equal names below many steps share a note.
    """
    notes: list[str] = []
    groups: dict[LeftOut | tuple[str, str], list[Location]] = defaultdict(list)
    for path, why in left_out:
        if why.startswith("repeats "):
            notes.append(f"{path} {why} and counts once")
        elif why in (PASSED_OVER, REPLICA):
            groups[("", why)].append(path)
        elif why not in (NOT_WEIGHTS, SKIPPED) and not why.startswith(NO_MATCH):
            groups[(path.name, why) if step_directory(path) else (path, why)].append(path)
    for (_, why), paths in groups.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        notes.append(f"{paths[0]}{more} {'are' if more else 'is'} left out: {why}")
    return notes


def describe_no_match(pattern: str, left_out: Sequence[LeftOut]) -> RunError:
    """Word the error for a pattern that no checkpoint matches, with existing names."""
    # Names are shown with as many last parts of the path as the pattern has.
    depth = pattern.count("/") + 1
    lines = [path for path, why in left_out if why.startswith(NO_MATCH)]
    names = ["/".join(str(path).split("/")[-depth:]) for path in lines]
    close = close_names(pattern, names)
    shown = first_few([name for name in names if name in close] or names)
    hint = f": there are {shown}" if names else ""
    return RunError(f"no checkpoint matches {pattern!r}", f"Quote the pattern, or loosen it{hint}.")
