"""Search for checkpoints below paths, and grouping by training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from ckptavg.errors import RunError
from ckptavg.formats import refuse_partitioned
from ckptavg.formats.registry import find_homes
from ckptavg.io.neighbours import suggest_neighbours
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.directory import DirectorySearch, Findings
from ckptavg.runs.discovery.excluded import describe_no_match
from ckptavg.runs.discovery.file_names import OTHER_STATE, Patterns, matches, stem_of
from ckptavg.runs.discovery.networks import (
    Groups,
    merge_roots,
    refuse_networks,
    split_copies,
    split_weightless,
)
from ckptavg.runs.discovery.numbered import group_by_place
from ckptavg.runs.discovery.ranks import find_replicas
from ckptavg.runs.discovery.reason import Reason


def find(paths: Sequence[Location], patterns: Patterns) -> Findings:
    """Find the checkpoints at or below each path, grouped by training.

    Args:
        paths: Run directories and checkpoints.
        patterns: Selection of the checkpoints.

    Raises:
        RunError: A path does not exist, or holds no run or several.
        CheckpointError: Files are parts of one model.
    """
    findings, listing = Findings(), _Listing()
    search = DirectorySearch(patterns, findings)
    for path in _replace_parts(paths):
        if not path.exists():
            raise RunError(f"{path} does not exist", suggest_neighbours(path))
        members = search.find(path) if path.is_dir() else [path]
        findings.named &= members == [path]
        listing.add(findings.root_of(path), members, search.drop_skipped(members, path))
    groups = merge_roots(group_by_place(listing.homes, listing.apart))
    groups = _select_members(groups, patterns.glob, findings)
    # Parts of one model are sorted out first. The checks below would take a single part for a
    # network of its own, or for a damaged file.
    groups = _drop_replicas(groups, findings)
    groups, copies = split_copies(groups, listing.unnamed)
    findings.exclude(copies, Reason.NAMED_EMA)
    groups, weightless = split_weightless(groups, listing.unnamed)
    findings.exclude(weightless, Reason.NOT_WEIGHTS)
    refuse_networks(groups, listing.unnamed)
    findings.groups = list(groups.values())
    refuse_partitioned(chain(*findings.groups))
    return findings


def _select_members(groups: Groups, pattern: str | None, findings: Findings) -> Groups:
    """Select the members of each run, without duplicates, and record what is left out.

    Raises:
        RunError: No member matches the user's pattern.
    """
    selected: Groups = {}
    for home, members in groups.items():
        if remaining := _select(members, pattern, findings):
            selected[home] = remaining
    if not selected and pattern is not None:
        raise describe_no_match(pattern, findings.excluded)
    return selected


def _select(members: Sequence[Location], pattern: str | None, findings: Findings) -> list[Location]:
    """Select the members of a run, without duplicates, and record what is left out."""
    selected: dict[tuple[Location, str], Location] = {}
    for path in members:
        if pattern is not None and not matches(path, pattern):
            findings.exclude([path], Reason.NO_MATCH, pattern)
        elif len(members) > 1 and path.is_file() and OTHER_STATE.fullmatch(stem_of(path)):
            findings.exclude([path], Reason.NOT_WEIGHTS)
        else:
            # A link counts under the name of the link, since the target may be a member too.
            selected.setdefault((path.parent.resolve(), path.name), path)
    return list(selected.values())


def _drop_replicas(groups: Groups, findings: Findings) -> Groups:
    """Drop the files of ranks that repeat the first rank's file, and record the reason.

    Raises:
        CheckpointError: Files are parts of one model.
    """
    replicas = find_replicas(chain(*groups.values()))
    remaining: Groups = {}
    for home, members in groups.items():
        remaining[home] = []
        of_run = set(members)
        for path in members:
            # A file whose first rank is in another run is no replica.
            if replicas.get(path) in of_run:
                findings.exclude([path], Reason.REPLICA)
            else:
                remaining[home].append(path)
    return remaining


@dataclass
class _Listing:
    """List of checkpoints before grouping.

    Attributes:
        homes: Directory that keeps checkpoints together → the checkpoints.
        apart: Directories below directories of steps, which may hold one network each.
        unnamed: Checkpoints that were found below a directory, not named by the user.
    """

    homes: dict[Location, list[Location]] = field(default_factory=dict)
    apart: set[Location] = field(default_factory=set)
    unnamed: set[Location] = field(default_factory=set)

    def add(
        self, path: Location, members: Sequence[Location], selected: Sequence[Location]
    ) -> None:
        """Add the checkpoints at or below a path.

        Args:
            path: Path that the user gave.
            members: Checkpoints at or below the path.
            selected: Members that are not skipped.
        """
        is_named = members == [path]
        if not is_named:
            self.unnamed.update(selected)
        for member in selected:
            is_direct = not is_named and member in (path, path / member.name)
            home = path if is_direct else member.parent
            # Resolved, so that two paths to one directory make one group.
            home = home.resolve()
            self.homes.setdefault(home, []).append(member)
            if not is_direct and not is_named:
                self.apart.add(home)


def _replace_parts(paths: Sequence[Location]) -> list[Location]:
    """Replace files that are parts of a checkpoint by the directory that is the checkpoint.

    Raises:
        CheckpointError: Only some of a model's shards are named.
    """
    homes = find_homes(paths)
    return list(dict.fromkeys(homes.get(path, path) for path in paths))
