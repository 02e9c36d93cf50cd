"""Notes and errors about the paths that are left out of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ckptavg.errors import RunError, first_few
from ckptavg.errors.spelling import close_names
from ckptavg.runs.discovery.numbered import step_directory
from ckptavg.runs.discovery.reason import LeftOut, Reason

# Paths that no user expects in a run, or that the user has left out.
_WITHOUT_NOTE = frozenset([Reason.NOT_WEIGHTS, Reason.SKIPPED, Reason.NO_MATCH])
# Reasons that often hold for many paths, which share a note.
_SHARED = frozenset([Reason.SUFFIX, Reason.REPLICA])


def describe_excluded(excluded: Sequence[LeftOut]) -> list[str]:
    """Word the notes about the paths that were left out.

    Paths that no user expects in a run get no note. Equal names below many steps share a note.
    """
    notes: list[str] = []
    groups: dict[object, list[LeftOut]] = defaultdict(list)
    for left_out in excluded:
        if left_out.reason is Reason.REPEATS:
            notes.append(left_out.note)
        elif left_out.reason not in _WITHOUT_NOTE:
            groups[_group_key(left_out)].append(left_out)
    for first, *further in groups.values():
        if further:
            notes.append(f"{first.path} and {len(further)} more are left out: {first.why}")
        else:
            notes.append(first.note)
    return notes


def _group_key(left_out: LeftOut) -> object:
    """Return a key that is equal for the paths that share a note."""
    if left_out.reason in _SHARED:
        return left_out.reason
    if step_directory(left_out.path) is not None:
        return left_out.path.name, left_out.why
    return left_out.path, left_out.why


def describe_no_match(pattern: str, excluded: Sequence[LeftOut]) -> RunError:
    """Word the error for a pattern that no checkpoint matches, with existing names."""
    # Names are shown with as many last parts of the path as the pattern has.
    depth = pattern.count("/") + 1
    names: list[str] = []
    for left_out in excluded:
        if left_out.reason is Reason.NO_MATCH:
            names.append("/".join(str(left_out.path).split("/")[-depth:]))
    close = close_names(pattern, names)
    shown = first_few([name for name in names if name in close] or names)
    hint = f": there are {shown}" if names else ""
    return RunError(f"no checkpoint matches {pattern!r}", f"Quote the pattern, or loosen it{hint}.")
