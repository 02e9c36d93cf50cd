"""Search for checkpoints below paths, and grouping by training."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ckptavg.errors import RunError
from ckptavg.formats import is_checkpoint_directory, refuse_partitioned
from ckptavg.formats.registry import component_names, find_homes, is_nested_state
from ckptavg.io.neighbours import suggest_neighbours
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.excluded import describe_no_match
from ckptavg.runs.discovery.file_names import (
    OTHER_STATE,
    is_alias_name,
    matches,
    natural,
    stem_of,
    why_not,
)
from ckptavg.runs.discovery.nearby import find_only_run, holds_checkpoints, runs_below
from ckptavg.runs.discovery.networks import (
    Groups,
    refuse_networks,
    split_copies,
    split_weightless,
    with_roots,
)
from ckptavg.runs.discovery.numbered import (
    group_by_place,
    is_series,
    mask_step,
    place_of,
    weights_below,
)
from ckptavg.runs.discovery.ranks import are_parts, find_replicas
from ckptavg.runs.discovery.reason import LeftOut, Reason
from ckptavg.runs.discovery.suffixes import split_by_suffix
from ckptavg.runs.discovery.unfinished import find_unfinished, why_unfinished


@dataclass
class Findings:
    """Paths of the checkpoints of each training, before any is opened.

    Attributes:
        groups: The paths, training by training.
        excluded: Paths that are not opened.
        named: True if the user named each of the paths.
        broken: Errors of members that hold no weights, although the names look like checkpoints.
        entered: Directory that is no run → the only run below, which is taken.
        skipping: Patterns that have skipped a path.
    """

    groups: list[list[Location]]
    excluded: list[LeftOut]
    named: bool = True
    broken: dict[Location, RunError] = field(default_factory=dict)
    entered: dict[Location, Location] = field(default_factory=dict)
    skipping: set[str] = field(default_factory=set)

    def root_of(self, path: Location) -> Location:
        """Return the run that is taken for a directory: the only run below, or the directory."""
        while path in self.entered:
            path = self.entered[path]
        return path


@dataclass(frozen=True)
class Patterns:
    """Shell patterns by which a user selects the checkpoints of a run.

    A pattern with slashes, such as ``unet/*``, is matched with as many of a path's last names.

    Attributes:
        glob: Pattern that a checkpoint must match; None admits all.
        skip: Patterns that neither a checkpoint nor a directory on the way to it may match.
    """

    glob: str | None = None
    skip: tuple[str, ...] = ()

    def skipping(self, path: Location, root: Location) -> set[str]:
        """Return the patterns that skip a checkpoint, or a directory below the root."""
        if not self.skip:
            return set()
        line = [path]
        # Names above the root do not count. The name of the root counts only for the root itself.
        while root not in (line[-1], line[-1].parent) and line[-1].parent != line[-1]:
            line.append(line[-1].parent)
        return {p for p in self.skip if any(matches(ancestor, p) for ancestor in line)}


def find(paths: Sequence[Location], patterns: Patterns) -> Findings:
    """Find the checkpoints at or below each path, grouped by training.

    Args:
        paths: Run directories and checkpoints.
        patterns: Selection of the checkpoints.

    Raises:
        RunError: A path does not exist, or holds no run or several.
        CheckpointError: Files are parts of one model.
    """
    findings, listing = Findings([], []), _Listing()
    for path in _replace_parts(paths):
        if not path.exists():
            raise RunError(f"{path} does not exist", suggest_neighbours(path))
        members = _members(path, patterns, findings) if path.is_dir() else [path]
        findings.named &= members == [path]
        selected = _without_skipped(members, path, patterns, findings)
        listing.add(findings.root_of(path), members, selected)
    groups = with_roots(group_by_place(listing.homes, listing.apart))
    groups = {home: _select(members, patterns.glob, findings) for home, members in groups.items()}
    if not any(groups.values()) and patterns.glob is not None:
        raise describe_no_match(patterns.glob, findings.excluded)
    groups = {home: members for home, members in groups.items() if members}
    # Parts of one model are sorted out first. The checks below would take a single part for a
    # network of its own, or for a damaged file.
    groups = _without_replicas(groups, findings)
    groups, copies = split_copies(groups, listing.unnamed)
    findings.excluded += [LeftOut(path, Reason.NAMED_EMA) for path in copies]
    groups, weightless = split_weightless(groups, listing.unnamed)
    findings.excluded += [LeftOut(path, Reason.NOT_WEIGHTS) for path in weightless]
    refuse_networks(groups, listing.unnamed)
    findings.groups = list(groups.values())
    refuse_partitioned(chain(*findings.groups))
    return findings


def _without_replicas(groups: Groups, findings: Findings) -> Groups:
    """Drop the files of ranks that repeat the first rank's file, and record the reason.

    Raises:
        CheckpointError: Files are parts of one model.
    """
    replicas = find_replicas(chain(*groups.values()))
    remaining: Groups = {}
    for home, members in groups.items():
        together = set(members)
        remaining[home] = []
        for path in members:
            # A file whose first rank is in another run is no replica.
            if replicas.get(path) in together:
                findings.excluded.append(LeftOut(path, Reason.REPLICA))
            else:
                remaining[home].append(path)
    return remaining


def _without_skipped(
    paths: Sequence[Location], root: Location, patterns: Patterns, findings: Findings
) -> list[Location]:
    """Drop the paths that a pattern skips, and record the reason."""
    remaining: list[Location] = []
    for path in paths:
        if skipping := patterns.skipping(path, root):
            findings.skipping |= skipping
            findings.excluded.append(LeftOut(path, Reason.SKIPPED))
        else:
            remaining.append(path)
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
            # Resolved, so that two paths to one directory make one group.
            home = (path if is_direct else member.parent).resolve()
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


def _select(members: list[Location], pattern: str | None, findings: Findings) -> list[Location]:
    """Select the members of a run, without duplicates."""
    selected: dict[tuple[Location, str], Location] = {}
    for path in members:
        if pattern is not None and not matches(path, pattern):
            findings.excluded.append(LeftOut(path, Reason.NO_MATCH, pattern))
        elif len(members) > 1 and path.is_file() and OTHER_STATE.fullmatch(stem_of(path)):
            findings.excluded.append(LeftOut(path, Reason.NOT_WEIGHTS))
        else:
            # A link counts under the name of the link, since the target may be a member too.
            selected.setdefault((path.parent.resolve(), path.name), path)
    return list(selected.values())


def _members(directory: Location, patterns: Patterns, findings: Findings) -> list[Location]:
    """Find the checkpoints of a directory: the directory itself, or checkpoints below.

    Raises:
        RunError: There is no checkpoint, or several runs below, or an unfinished checkpoint.
    """
    shown = sorted((p for p in directory.iterdir() if not p.name.startswith(".")), key=natural)
    below = _without_skipped(shown, directory, patterns, findings)
    itself = is_checkpoint_directory(directory)
    directories = [p for p in below if p.is_dir() and not OTHER_STATE.fullmatch(p.name)]
    nested: list[Location] = []
    folders: list[Location] = []
    components = component_names(directory) if itself else set()
    for path in directories:
        # The states that DeepSpeed resumes from are part of a checkpoint.
        is_part = itself and (path.name in components or is_nested_state(path))
        (nested if is_checkpoint_directory(path) and not is_part else folders).append(path)
    broken = find_unfinished(folders)
    steps = [path for path in nested if mask_step(path.name) is not None]
    # An unfinished step among finished steps is a damaged member. Without finished steps, the
    # error is raised at once.
    if broken and (not steps or any(mask_step(path.name) is None for path in broken)):
        raise next(iter(broken.values()))
    findings.broken |= broken
    if itself:
        return _around_root(directory, [*nested, *broken], folders, findings)
    if error := why_unfinished(directory):
        raise error
    if any(_numbered_below(path) for path in nested):
        return _enter(directory, patterns, findings)
    candidates = [path for path in below if not path.is_dir()]
    files = _weights_files(candidates, patterns, findings, alone=not nested)
    if not broken and (deeper := _below_steps(directory, nested, files, folders, findings)):
        findings.excluded += [LeftOut(path, Reason.UNNUMBERED) for path in [*nested, *files]]
        return deeper
    members = [*nested, *broken, *files]
    runs = [path for path in folders if path not in broken and holds_checkpoints(path)]
    # Files such as best.pt and last.pt beside runs belong to one of the runs, or to no run.
    few = len(members) < 2 or (members == files and all(is_alias_name(path) for path in files))
    deeper = runs_below(directory, _admits(directory, patterns)) if few else []
    if not members and not deeper and len(below) < len(shown):
        # All contents are skipped by the user.
        return []
    if not members or (few and runs) or len(deeper) > 1:
        return _enter(directory, patterns, findings, loose=members)
    findings.excluded += [LeftOut(path, Reason.OWN_RUN) for path in runs]
    return sorted(members, key=natural)


def _enter(
    directory: Location, patterns: Patterns, findings: Findings, loose: Sequence[Location] = ()
) -> list[Location]:
    """Find the checkpoints of the only run below a directory that is no run itself.

    Args:
        directory: The directory that the user named.
        patterns: Selection of the checkpoints.
        findings: Findings that record the run that is taken.
        loose: Checkpoints directly in the directory, too few to be the run that was meant.

    Raises:
        RunError: There are several runs, or no run.
    """
    run = find_only_run(directory, _admits(directory, patterns), loose)
    findings.entered[directory] = run
    return _members(run, patterns, findings)


def _admits(root: Location, patterns: Patterns) -> Callable[[Location], bool]:
    """Return a test for paths that the user does not skip."""
    return lambda path: not patterns.skipping(path, root)


def _weights_files(
    files: Sequence[Location], patterns: Patterns, findings: Findings, *, alone: bool
) -> list[Location]:
    """Find the files of a directory that are checkpoints by name.

    Args:
        files: All files of the directory.
        patterns: Selection of the checkpoints.
        findings: Findings that record the files that are left out.
        alone: True if no directory beside the files is a checkpoint.
    """
    candidates, passed_over = split_by_suffix(files, patterns.glob, alone=alone)
    findings.excluded += [LeftOut(path, Reason.SUFFIX) for path in passed_over]
    members: list[Location] = []
    for path in candidates:
        if reason := why_not(stem_of(path)):
            findings.excluded.append(LeftOut(path, reason))
        else:
            members.append(path)
    return members


def _around_root(
    root: Location, nested: list[Location], folders: list[Location], findings: Findings
) -> list[Location]:
    """Find the checkpoints of a run with a model at the root: numbered checkpoints and root."""
    numbered = [path for path in nested if re.search(r"\d", path.name)]
    findings.excluded += [
        LeftOut(path, Reason.UNNUMBERED) for path in nested if numbered and path not in numbered
    ]
    steps = [path for path in folders if mask_step(path.name) is not None]
    members = numbered or [path for step in steps for path in weights_below(step)]
    # The root is a pipeline of several networks, and the steps hold the one that was trained.
    if members and component_names(root) and not any(map(component_names, members)):
        findings.excluded.append(LeftOut(root, Reason.PIPELINE))
        return members
    is_run = bool(numbered) or len({place_of(path) for path in members}) == 1
    return [*members, root] if is_run else [root]


def _below_steps(
    directory: Location,
    nested: list[Location],
    files: list[Location],
    folders: list[Location],
    findings: Findings,
) -> list[Location]:
    """Find the checkpoints below directories that are named after steps.

    Returns:
        The checkpoints; empty where the directory's own files or directories are the run.

    Raises:
        CheckpointError: The files are parts of models.
    """
    if len(files) > 1 or any(mask_step(path.name) is not None for path in nested):
        return []
    steps = {p: weights_below(p) for p in folders if mask_step(p.name) is not None}
    if not any(steps.values()) and not nested and not files and mask_step(directory.name):
        steps = {directory: weights_below(directory)}
    deeper = [path for members in steps.values() for path in members]
    trainings = [training for path in deeper if (training := place_of(path)) is not None]
    networks = {training.below[0] for training in trainings}
    # Several models beside the steps are the run, unless the steps have networks of equal names.
    if len(nested) > 1 and not networks & {glob.escape(path.name) for path in nested}:
        return []
    by_parent: dict[Location, list[Location]] = defaultdict(list)
    for path in deeper:
        by_parent[path.parent].append(path)
    neighbours = [members for members in by_parent.values() if len(members) > 1]
    # A run within a directory named after a step or a date does not belong to this directory.
    if any(is_series(members) and not are_parts(members) for members in neighbours):
        return []
    if len({training.base for training in trainings}) > 1 and not are_parts(deeper):
        return []
    series = {mask_step(step.name) for step, members in steps.items() if members}
    for step, members in steps.items():
        if not members and mask_step(step.name) in series:
            findings.excluded.append(LeftOut(step, Reason.WITHOUT_WEIGHTS))
    return deeper


def _numbered_below(directory: Location) -> bool:
    """Return True if a directory holds a run of checkpoint directories."""
    components = component_names(directory)
    for path in directory.iterdir():
        if not re.search(r"\d", path.name) or path.name in components:
            continue
        if is_checkpoint_directory(path) and not is_nested_state(path):
            return True
    return False
