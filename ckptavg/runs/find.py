"""What below a path is a checkpoint, and which of them belong to one training."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from ckptavg.errors import CheckpointError, RunError, first_few
from ckptavg.formats import (
    adapter,
    dcp,
    deepspeed,
    is_checkpoint_directory,
    refuse_partitioned,
)
from ckptavg.formats.components import part_names
from ckptavg.formats.shards import find_shards, parse_name
from ckptavg.formats.storage import Location
from ckptavg.runs.file_names import (
    EMA_COPY,
    NOT_WEIGHTS,
    OTHER_STATE,
    SUFFIXES,
    matches,
    natural,
    stem_of,
    why_not,
)
from ckptavg.runs.networks import (
    refuse_networks,
    split_copies,
    split_weightless,
    with_roots,
)
from ckptavg.runs.numbered import (
    group_by_place,
    is_series,
    mask_step,
    place_of,
    step_directory,
    weights_below,
)
from ckptavg.runs.ranks import are_parts, refuse_rank_files
from ckptavg.runs.suffixes import PASSED_OVER, split_by_suffix
from ckptavg.runs.unfinished import find_unfinished, why_unfinished

LeftOut = tuple[Location, str]
SKIPPED = "skipped, as asked for"
_UNLIKE = "without a number, unlike its neighbours"
_DEEPEST_RUN, _MOST_LOOKED_INTO = 4, 200  # levels and directories below a path without a run


@dataclass
class Found:
    """Paths of the checkpoints of each training, before any is opened.

    Attributes:
        groups: The paths, training by training.
        left_out: What is not opened, and why.
        named: Whether the user gave each of the paths one by one.
        broken: Why a member of a group holds no weights although its name promises some.
    """

    groups: list[list[Location]]
    left_out: list[LeftOut]
    named: bool = True
    broken: dict[Location, RunError] = field(default_factory=dict)


@dataclass(frozen=True)
class Patterns:
    """The shell patterns by which a user says which checkpoints a run is made of.

    Each is matched with names, or with as many of a path's last parts as it has.

    Attributes:
        glob: What a checkpoint must match; any does where None.
        skip: What neither a checkpoint nor a directory on the way to it may match.
    """

    glob: str | None = None
    skip: tuple[str, ...] = ()

    def skips(self, path: Location, root: Location) -> bool:
        """Whether a checkpoint is left out, or a directory between a root and it."""
        if not self.skip:
            return False
        line = [path]
        while root not in (line[-1], line[-1].parent) and line[-1].parent != line[-1]:
            line.append(line[-1].parent)
        return any(matches(part, pattern) for part in line for pattern in self.skip)


def find(paths: Sequence[Location], patterns: Patterns) -> Found:
    """Find the checkpoints at or below each path, grouped by training.

    Args:
        paths: Run directories and checkpoints.
        patterns: Which of the checkpoints are wanted.

    Raises:
        RunError: A path does not exist, or holds no run or several.
        CheckpointError: Files are parts of one model.
    """
    found, listing = Found([], []), _Listing()
    for path in _whole_checkpoints(paths):
        if not path.exists():
            raise RunError(f"{path} does not exist", _nearest(path))
        members = _members(path, patterns, found) if path.is_dir() else [path]
        found.named &= members == [path]
        listing.add(path, members, _without_skipped(members, path, patterns, found))
    groups = with_roots(group_by_place(listing.homes, listing.apart))
    groups = {home: _kept(members, patterns.glob, found) for home, members in groups.items()}
    if not any(groups.values()) and patterns.glob is not None:
        raise RunError(
            f"no checkpoint matches {patterns.glob!r}", "Quote the pattern, or loosen it."
        )
    groups = {home: members for home, members in groups.items() if members}
    refuse_rank_files(chain(*groups.values()))
    groups, copies = split_copies(groups, listing.found)
    found.left_out += [(path, EMA_COPY) for path in copies]
    groups, weightless = split_weightless(groups, listing.found)
    found.left_out += [(path, NOT_WEIGHTS) for path in weightless]
    refuse_networks(groups, listing.found)
    found.groups = list(groups.values())
    refuse_partitioned(chain(*found.groups))
    return found


def _without_skipped(
    paths: Sequence[Location], root: Location, patterns: Patterns, found: Found
) -> list[Location]:
    """The paths that the user does not want to skip."""
    skipped = {path for path in paths if patterns.skips(path, root)}
    found.left_out += [(path, SKIPPED) for path in paths if path in skipped]
    return [path for path in paths if path not in skipped]


@dataclass
class _Listing:
    """Checkpoints before they are grouped.

    Attributes:
        homes: The checkpoints, by the directory that keeps them together.
        apart: Directories below those of steps: what they hold is not of one network.
        found: The checkpoints that nobody named.
    """

    homes: dict[Location, list[Location]] = field(default_factory=dict)
    apart: set[Location] = field(default_factory=set)
    found: set[Location] = field(default_factory=set)

    def add(self, path: Location, members: Sequence[Location], wanted: Sequence[Location]) -> None:
        """Add what the user wants of the members that a path has led to."""
        itself = members == [path]
        if not itself:
            self.found.update(wanted)
        for member in wanted:
            direct = not itself and member in (path, path / member.name)
            home = (path if direct else member.parent).resolve()
            self.homes.setdefault(home, []).append(member)
            if not direct and not itself:
                self.apart.add(home)


def _whole_checkpoints(paths: Sequence[Location]) -> list[Location]:
    """The paths, with the directory in the place of files that are nothing each alone.

    Raises:
        CheckpointError: Some of a model's shards are named, and not the others.
    """
    shards: dict[Location, set[str]] = defaultdict(set)
    for path in paths:
        if parse_name(path) is not None:
            shards[path.parent].add(path.name)
    sharded = [home for home, files in shards.items() if len(files) > 1 and find_shards(home)]
    for home in sharded:
        unnamed = [shard.path.name for shard in find_shards(home)]
        unnamed = [name for name in unnamed if name not in shards[home]]
        if unnamed:
            raise CheckpointError(
                f"the files named of {home} are parts of one model, without {first_few(unnamed)}",
                "Name the directory.",
            )
    whole = [path.parent if path.parent in sharded else _directory_of(path) for path in paths]
    return list(dict.fromkeys(whole))


def _directory_of(path: Location) -> Location:
    """The directory in the place of a file that is nothing alone: of an adapter, of a rank."""
    adapted = path.name in adapter.FILES and adapter.weights_file(path.parent) is not None
    return path.parent if adapted or path.suffix == dcp.SUFFIX else path


def _kept(members: list[Location], pattern: str | None, found: Found) -> list[Location]:
    """The members that a run is made of, each once."""
    kept: dict[tuple[Location, str], Location] = {}
    for path in members:
        if pattern is not None and not matches(path, pattern):
            found.left_out.append((path, f"does not match {pattern}"))
        elif len(members) > 1 and path.is_file() and OTHER_STATE.fullmatch(stem_of(path)):
            found.left_out.append((path, NOT_WEIGHTS))
        else:
            kept.setdefault((path.parent.resolve(), path.name), path)
    return list(kept.values())


def tell(left_out: Sequence[LeftOut]) -> list[str]:
    """Notes about what was left out, but for what nobody would expect in a run.

    What has the same name below many steps is told once.
    """
    notes: list[str] = []
    alike: dict[LeftOut | tuple[str, str], list[Location]] = defaultdict(list)
    for path, why in left_out:
        if why.startswith("repeats "):
            notes.append(f"{path} {why} and counts once")
        elif why == PASSED_OVER:
            alike[("", why)].append(path)
        elif why not in (NOT_WEIGHTS, SKIPPED) and not why.startswith("does not match "):
            alike[(path.name, why) if step_directory(path) else (path, why)].append(path)
    for (_, why), paths in alike.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        notes.append(f"{paths[0]}{more} {'are' if more else 'is'} left out: {why}")
    return notes


def _members(directory: Location, patterns: Patterns, found: Found) -> list[Location]:
    """The checkpoints of a directory: itself, or those below.

    Raises:
        RunError: There are none, or several runs below, or one was left half-written.
    """
    shown = sorted((p for p in directory.iterdir() if not p.name.startswith(".")), key=natural)
    below = _without_skipped(shown, directory, patterns, found)
    itself = is_checkpoint_directory(directory)
    inner = [p for p in below if p.is_dir() and not OTHER_STATE.fullmatch(p.name)]
    nested: list[Location] = []
    folders: list[Location] = []
    parts = part_names(directory) if itself else set()
    for path in inner:
        # The states that DeepSpeed resumes from are part of a checkpoint.
        own = itself and (path.name in parts or deepspeed.is_tag(path))
        (nested if is_checkpoint_directory(path) and not own else folders).append(path)
    broken = find_unfinished(folders)
    steps = [path for path in nested if mask_step(path.name) is not None]
    if broken and (not steps or any(mask_step(path.name) is None for path in broken)):
        raise next(iter(broken.values()))
    found.broken |= broken
    if itself:
        return _around_root(directory, [*nested, *broken], folders, found)
    if error := why_unfinished(directory):
        raise error
    if any(_numbered_below(path) for path in nested):
        raise _no_run(directory)
    others = [path for path in below if not path.is_dir()]
    files = _weights_files(others, patterns, found, alone=not nested)
    if not broken and (deeper := _below_steps(directory, nested, files, folders, found)):
        found.left_out += [(path, _UNLIKE) for path in [*nested, *files]]
        return deeper
    members = [*nested, *broken, *files]
    runs = [path for path in folders if path not in broken and _holds_checkpoints(path)]
    if not members and not runs and len(below) < len(shown):
        return []  # all that there is, is skipped
    if not members or (len(members) == 1 and runs):
        raise _no_run(directory)
    found.left_out += [(path, "a run of its own") for path in runs]
    return sorted(members, key=natural)


def _weights_files(
    files: Sequence[Location], patterns: Patterns, found: Found, *, alone: bool
) -> list[Location]:
    """The files of a directory that are checkpoints by their names.

    Args:
        files: All files.
        patterns: Which are wanted.
        found: What is left out is noted there.
        alone: Whether no directory beside them is a checkpoint.
    """
    taken, passed_over = split_by_suffix(files, patterns.glob, alone=alone)
    found.left_out += [(path, PASSED_OVER) for path in passed_over]
    members: list[Location] = []
    for path in taken:
        if why := why_not(stem_of(path)):
            found.left_out.append((path, why))
        else:
            members.append(path)
    return members


def _around_root(
    root: Location, nested: list[Location], folders: list[Location], found: Found
) -> list[Location]:
    """The checkpoints of a run that has a model at its root: the numbered ones and the root."""
    numbered = [path for path in nested if re.search(r"\d", path.name)]
    found.left_out += [(path, _UNLIKE) for path in nested if numbered and path not in numbered]
    steps = [path for path in folders if mask_step(path.name) is not None]
    members = numbered or [path for step in steps for path in weights_below(step)]
    # a pipeline, of which one network was trained
    if members and part_names(root) and not any(map(part_names, members)):
        found.left_out.append((root, "a model of several directories, unlike its steps"))
        return members
    alike = bool(numbered) or len({place_of(path) for path in members}) == 1
    return [*members, root] if alike else [root]


def _below_steps(
    directory: Location,
    nested: list[Location],
    files: list[Location],
    folders: list[Location],
    found: Found,
) -> list[Location]:
    """The checkpoints below the directories that are called after steps; none if others are.

    Raises:
        CheckpointError: They are parts of models.
    """
    if len(files) > 1 or any(mask_step(path.name) is not None for path in nested):
        return []
    steps = {p: weights_below(p) for p in folders if mask_step(p.name) is not None}
    if not any(steps.values()) and not nested and not files and mask_step(directory.name):
        steps = {directory: weights_below(directory)}
    deeper = [path for members in steps.values() for path in members]
    uppermost = {place.below[0] for path in deeper if (place := place_of(path)) is not None}
    if len(nested) > 1 and not uppermost & {glob.escape(path.name) for path in nested}:
        return []
    together: dict[Location, list[Location]] = defaultdict(list)
    for path in deeper:
        together[path.parent].append(path)
    neighbours = [members for members in together.values() if len(members) > 1]
    if any(is_series(members) and not are_parts(members) for members in neighbours):
        return []
    series = {mask_step(step.name) for step, members in steps.items() if members}
    for step, members in steps.items():
        if not members and mask_step(step.name) in series:
            found.left_out.append((step, "holds no weights, unlike its neighbours"))
    return deeper


def _numbered_below(directory: Location) -> bool:
    """Whether a directory holds a run of checkpoint directories."""
    parts = part_names(directory)
    numbered = [p for p in directory.iterdir() if re.search(r"\d", p.name) and p.name not in parts]
    return any(is_checkpoint_directory(p) and not deepspeed.is_tag(p) for p in numbered)


def _no_run(directory: Location) -> RunError:
    refuse_rank_files(weights_below(directory))
    runs = _runs_below(directory)
    if len(runs) > 1:
        return RunError(
            f"{directory} holds {len(runs)} runs: {first_few(runs, 8)}",
            "Name one, or name each of them to average across runs.",
        )
    if runs:
        return RunError(
            f"{directory} holds no checkpoint itself, but {runs[0]} does", "Name that directory."
        )
    return RunError(
        f"{directory} holds no checkpoint",
        "Expected .safetensors, .pt, .pth, .ckpt or .bin files, or Hugging Face directories; name "
        "files of other suffixes themselves.",
    )


def _runs_below(directory: Location) -> list[str]:
    """Directories that hold checkpoints, on the uppermost level that has some, if not too deep."""
    level = [directory]
    for _ in range(_DEEPEST_RUN):
        level = [p for d in level for p in _folders(d)][:_MOST_LOOKED_INTO]
        if runs := [_training_of(p, directory) for p in level if _leads_to_checkpoints(p)]:
            return list(dict.fromkeys(map(str, runs)))
    return []


def _leads_to_checkpoints(directory: Location) -> bool:
    """Whether a directory holds checkpoints, or, called after a step, has some further down."""
    if _holds_checkpoints(directory):
        return True
    return mask_step(directory.name) is not None and bool(weights_below(directory))


def _training_of(holder: Location, directory: Location) -> Location:
    """The directory to name for what a directory further down holds: above those of the steps."""
    step = holder if mask_step(holder.name) is not None else step_directory(holder)
    within = step is not None and directory in step.parents and step.parent != directory
    return step.parent if step is not None and within else holder


def _folders(directory: Location) -> list[Location]:
    shown = (p for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    return sorted(shown, key=natural)


def _holds_checkpoints(directory: Location) -> bool:
    return any(
        is_checkpoint_directory(path)
        or (
            (path.is_file() and path.name.endswith(SUFFIXES))
            and not OTHER_STATE.fullmatch(stem_of(path))
        )
        for path in directory.iterdir()
        if not path.name.startswith(".")
    )


def _nearest(path: Location) -> str:
    parent = next((p for p in path.parents if p.is_dir()), None)
    if parent is None:
        return "Check its first part, and what your credentials let you see."
    below = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    names = [str(parent / name) for name in below]
    return f"{parent} holds {first_few(names, 5)}." if names else f"{parent} is empty."
