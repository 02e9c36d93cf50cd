"""Checkpoints of a directory that a user names as a run."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ckptavg.errors import RunError
from ckptavg.formats import is_checkpoint_directory
from ckptavg.formats.registry import component_names, is_nested_state
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import (
    OTHER_STATE,
    Patterns,
    is_alias_name,
    list_visible,
    natural_key,
    stem_of,
    why_no_weights,
)
from ckptavg.runs.discovery.nearby import find_only_run, find_runs_below, holds_checkpoints
from ckptavg.runs.discovery.numbered import (
    find_place,
    find_weights_below,
    is_series,
    mask_step,
    names_step,
)
from ckptavg.runs.discovery.ranks import are_parts
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

    groups: list[list[Location]] = field(default_factory=list)
    excluded: list[LeftOut] = field(default_factory=list)
    named: bool = True
    broken: dict[Location, RunError] = field(default_factory=dict)
    entered: dict[Location, Location] = field(default_factory=dict)
    skipping: set[str] = field(default_factory=set)

    def root_of(self, path: Location) -> Location:
        """Return the run that is taken for a directory: the only run below, or the directory."""
        while path in self.entered:
            path = self.entered[path]
        return path

    def exclude(self, paths: Iterable[Location], reason: Reason, detail: str = "") -> None:
        """Record paths that are left out.

        Args:
            paths: The paths.
            reason: Reason for leaving out the paths.
            detail: Words that complete the reason.
        """
        self.excluded += [LeftOut(path, reason, detail) for path in paths]


class DirectorySearch:
    """Search for the checkpoints of directories.

    Args:
        patterns: Selection of the checkpoints.
        findings: Findings that record what is left out.
    """

    def __init__(self, patterns: Patterns, findings: Findings) -> None:
        self._patterns = patterns
        self._findings = findings

    def find(self, directory: Location) -> list[Location]:
        """Find the checkpoints of a directory: the directory itself, or checkpoints below.

        Raises:
            RunError: There is no checkpoint, or several runs below, or an unfinished checkpoint.
        """
        shown = list_visible(directory)
        below = self.drop_skipped(sorted(shown, key=natural_key), directory)
        is_checkpoint = is_checkpoint_directory(directory)
        nested, folders = _split_directories(directory, below, is_checkpoint=is_checkpoint)
        broken = find_unfinished(folders)
        _check_unfinished(broken, nested)
        self._findings.broken |= broken
        if is_checkpoint:
            return self._find_around_root(directory, [*nested, *broken], folders)
        if error := why_unfinished(directory):
            raise error
        if any(map(_holds_run, nested)):
            return self._enter(directory)
        files = self._find_files([path for path in below if not path.is_dir()], alone=not nested)
        if not broken and (deeper := self._find_below_steps(directory, nested, files, folders)):
            self._findings.exclude([*nested, *files], Reason.UNNUMBERED)
            return deeper
        members = [*nested, *broken, *files]
        runs = [path for path in folders if path not in broken and holds_checkpoints(path)]
        # Files such as best.pt and last.pt beside runs belong to one of the runs, or to no run.
        few = len(members) < 2 or (members == files and all(map(is_alias_name, files)))
        deeper = find_runs_below(directory, self._admits(directory)) if few else []
        if not members and not deeper and len(below) < len(shown):
            # All contents are skipped by the user.
            return []
        if not members or (few and runs) or len(deeper) > 1:
            return self._enter(directory, loose=members)
        self._findings.exclude(runs, Reason.OWN_RUN)
        return sorted(members, key=natural_key)

    def drop_skipped(self, paths: Sequence[Location], root: Location) -> list[Location]:
        """Drop the paths that a pattern skips, and record the reason.

        Args:
            paths: The paths.
            root: The directory that is searched, or the only path.
        """
        remaining: list[Location] = []
        for path in paths:
            if skipping := self._patterns.skipping(path, root):
                self._findings.skipping |= skipping
                self._findings.exclude([path], Reason.SKIPPED)
            else:
                remaining.append(path)
        return remaining

    def _enter(self, directory: Location, loose: Sequence[Location] = ()) -> list[Location]:
        """Find the checkpoints of the only run below a directory that is no run itself.

        Args:
            directory: The directory that the user named.
            loose: Checkpoints directly in the directory, too few to be the run that was meant.

        Raises:
            RunError: There are several runs, or no run.
        """
        run = find_only_run(directory, self._admits(directory), loose)
        self._findings.entered[directory] = run
        return self.find(run)

    def _admits(self, root: Location) -> Callable[[Location], bool]:
        """Return a test for paths that the user does not skip."""
        return lambda path: not self._patterns.skipping(path, root)

    def _find_files(self, files: Sequence[Location], *, alone: bool) -> list[Location]:
        """Find the files of a directory that are checkpoints by name.

        Args:
            files: All files of the directory.
            alone: True if no directory beside the files is a checkpoint.
        """
        candidates, passed_over = split_by_suffix(files, self._patterns.glob, alone=alone)
        self._findings.exclude(passed_over, Reason.SUFFIX)
        members: list[Location] = []
        for path in candidates:
            if reason := why_no_weights(stem_of(path)):
                self._findings.exclude([path], reason)
            else:
                members.append(path)
        return members

    def _find_around_root(
        self, root: Location, nested: Sequence[Location], folders: Sequence[Location]
    ) -> list[Location]:
        """Find the checkpoints of a run with a model at the root: numbered ones and the root."""
        numbered = [path for path in nested if re.search(r"\d", path.name)]
        members = numbered
        if numbered:
            unnumbered = [path for path in nested if path not in numbered]
            self._findings.exclude(unnumbered, Reason.UNNUMBERED)
        else:
            steps = _list_steps(folders)
            members = list(chain.from_iterable(map(find_weights_below, steps)))
        # The root is a pipeline of several networks, and the steps hold the one that was trained.
        if members and component_names(root) and not any(map(component_names, members)):
            self._findings.exclude([root], Reason.PIPELINE)
            return members
        if numbered or len(set(map(find_place, members))) == 1:
            return [*members, root]
        return [root]

    def _find_below_steps(
        self,
        directory: Location,
        nested: Sequence[Location],
        files: Sequence[Location],
        folders: Sequence[Location],
    ) -> list[Location]:
        """Find the checkpoints below directories that are named after steps.

        Returns:
            The checkpoints; empty where the directory's own files or directories are the run.

        Raises:
            CheckpointError: The files are parts of models.
        """
        if len(files) > 1 or _list_steps(nested):
            return []
        steps = {path: find_weights_below(path) for path in _list_steps(folders)}
        if not any(steps.values()) and not nested and not files and names_step(directory.name):
            steps = {directory: find_weights_below(directory)}
        deeper = list(chain.from_iterable(steps.values()))
        if not _is_run_of_steps(deeper, nested):
            return []
        series = {mask_step(step.name) for step, members in steps.items() if members}
        for step, members in steps.items():
            if not members and mask_step(step.name) in series:
                self._findings.exclude([step], Reason.WITHOUT_WEIGHTS)
        return deeper


def _split_directories(
    directory: Location, below: Sequence[Location], *, is_checkpoint: bool
) -> tuple[list[Location], list[Location]]:
    """Split the directories in a directory into checkpoints and other directories."""
    nested: list[Location] = []
    folders: list[Location] = []
    components = component_names(directory) if is_checkpoint else set()
    for path in below:
        if not path.is_dir() or OTHER_STATE.fullmatch(path.name):
            continue
        # The states that DeepSpeed resumes from are part of a checkpoint.
        is_part = is_checkpoint and (path.name in components or is_nested_state(path))
        if is_checkpoint_directory(path) and not is_part:
            nested.append(path)
        else:
            folders.append(path)
    return nested, folders


def _check_unfinished(broken: Mapping[Location, RunError], nested: Iterable[Location]) -> None:
    """Raise the error of an unfinished checkpoint that is no step among finished steps.

    An unfinished step among finished steps is a damaged member of the run.

    Raises:
        RunError: There is such a checkpoint.
    """
    if not broken:
        return
    if not _list_steps(nested) or len(_list_steps(broken)) < len(broken):
        raise next(iter(broken.values()))


def _list_steps(paths: Iterable[Location]) -> list[Location]:
    """List the paths whose names tell a step."""
    return [path for path in paths if names_step(path.name)]


def _is_run_of_steps(paths: Sequence[Location], nested: Collection[Location]) -> bool:
    """Return True if checkpoints below directories of steps are the run that is meant.

    Args:
        paths: The checkpoints.
        nested: Checkpoints beside the directories of steps.
    """
    bases: set[Location] = set()
    networks: set[str] = set()
    by_parent: dict[Location, list[Location]] = defaultdict(list)
    for path in paths:
        by_parent[path.parent].append(path)
        if (training := find_place(path)) is not None:
            bases.add(training.base)
            networks.add(training.below[0])
    # Several models beside the steps are the run, unless the steps have networks of equal names.
    if len(nested) > 1 and networks.isdisjoint(glob.escape(path.name) for path in nested):
        return False
    # A run within a directory named after a step or a date does not belong to this directory.
    for neighbours in by_parent.values():
        if len(neighbours) > 1 and is_series(neighbours) and not are_parts(neighbours):
            return False
    return len(bases) < 2 or are_parts(paths)


def _holds_run(directory: Location) -> bool:
    """Return True if a directory holds a run of checkpoint directories."""
    components = component_names(directory)
    for path in directory.iterdir():
        if not re.search(r"\d", path.name) or path.name in components:
            continue
        if is_checkpoint_directory(path) and not is_nested_state(path):
            return True
    return False
