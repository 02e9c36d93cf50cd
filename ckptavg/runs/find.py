"""What below a path is a checkpoint, and which of them belong to one training."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from ckptavg.errors import CheckpointError, RunError, first_few
from ckptavg.formats import (
    adapter,
    dcp,
    deepspeed,
    huggingface,
    is_checkpoint_directory,
    refuse_partitioned,
)
from ckptavg.formats.components import part_names
from ckptavg.formats.shards import find_shards, parse_name
from ckptavg.formats.storage import Location
from ckptavg.runs.file_names import (
    NOT_WEIGHTS,
    OTHER_STATE,
    STEP_NUMBER,
    SUFFIXES,
    natural,
    stem_of,
    why_not,
)

LeftOut = tuple[Location, str]
_DEEPEST_RUN, _MOST_LOOKED_INTO = 4, 200  # levels and directories below a path without a run


@dataclass
class Found:
    """Paths of the checkpoints of each training, before any is opened.

    Attributes:
        groups: The paths, training by training.
        left_out: What is not opened, and why.
        named: Whether the user gave each of the paths one by one.
    """

    groups: list[list[Location]]
    left_out: list[LeftOut]
    named: bool = True


def find(paths: Sequence[Location], glob: str | None) -> Found:
    """Find the checkpoints at or directly below each path, grouped by training.

    Raises:
        RunError: A path does not exist, or holds no run or several.
    """
    groups: dict[Location, list[Location]] = {}
    found = Found([], [])
    for path in _whole_checkpoints(paths):
        if not path.exists():
            raise RunError(f"{path} does not exist", _nearest(path))
        members = _members(path, found) if path.is_dir() else [path]
        found.named &= members == [path]
        home = path.parent if members == [path] else path
        groups.setdefault(home.resolve(), []).extend(members)
    for members in _joined(groups):
        found.groups.append(_kept(members, glob, found))
    if not any(found.groups) and glob is not None:
        raise RunError(f"no checkpoint matches {glob!r}", "Quote the pattern, or loosen it.")
    found.groups = [members for members in found.groups if members]
    refuse_partitioned(chain(*found.groups))
    return found


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
    whole = [path.parent if path.parent in sharded else _adapter_of(path) for path in paths]
    return list(dict.fromkeys(whole))


def _adapter_of(path: Location) -> Location:
    """The directory of an adapter whose file of weights is named, which is nothing alone."""
    named = path.name in adapter.FILES and adapter.weights_file(path.parent) is not None
    return path.parent if named else path


def _joined(groups: Mapping[Location, list[Location]]) -> list[list[Location]]:
    """The members of each training, by their directories.

    A file of the same name in sibling directories that are called after a step
    (``checkpoint_*/model_1.safetensors``) is that training's weights at each of the steps.
    """
    joined: dict[object, list[Location]] = defaultdict(list)
    for home, members in groups.items():
        series, numbers = STEP_NUMBER.subn(r"\1", home.name)
        lone = len(members) == 1 and members[0].is_file()
        together = (home.parent, series, members[0].name) if lone and numbers else home
        joined[together] += members
    return list(joined.values())


def _kept(members: list[Location], glob: str | None, found: Found) -> list[Location]:
    """The members that a run is made of, each once."""
    kept: dict[tuple[Location, str], Location] = {}
    for path in members:
        if glob is not None and not fnmatch.fnmatchcase(path.name, glob):
            found.left_out.append((path, f"does not match {glob}"))
        elif len(members) > 1 and path.is_file() and OTHER_STATE.fullmatch(stem_of(path)):
            found.left_out.append((path, NOT_WEIGHTS))
        else:
            kept.setdefault((path.parent.resolve(), path.name), path)
    return list(kept.values())


def tell(left_out: Sequence[LeftOut]) -> list[str]:
    """Notes about what was left out, but for what nobody would expect in a run."""
    notes: list[str] = []
    for path, why in left_out:
        if why.startswith("repeats "):
            notes.append(f"{path} {why} and counts once")
        elif why != NOT_WEIGHTS and not why.startswith("does not match "):
            notes.append(f"{path} is left out: {why}")
    return notes


def _members(directory: Location, found: Found) -> list[Location]:
    """The checkpoints of a directory: itself, or those directly below.

    Raises:
        RunError: There are none, or several runs below, or one was left half-written.
    """
    below = sorted((p for p in directory.iterdir() if not p.name.startswith(".")), key=natural)
    itself = is_checkpoint_directory(directory)
    nested = [path for path in below if is_checkpoint_directory(path)]
    if itself:  # and the states that DeepSpeed resumes from are part of it
        parts = part_names(directory)
        nested = [p for p in nested if not deepspeed.is_tag(p) and p.name not in parts]
    for path in below:
        if path.is_dir() and path not in nested:
            _refuse_unfinished(path)
    if itself:
        numbered = [path for path in nested if re.search(r"\d", path.name)]
        others = [path for path in nested if numbered and path not in numbered]
        found.left_out += [(path, "without a number, unlike its neighbours") for path in others]
        return [*numbered, directory] if numbered else [directory]
    _refuse_unfinished(directory)
    if any(_numbered_below(path) for path in nested):
        raise _no_run(directory)
    members = list(nested)
    for path in below:
        if path.is_dir() or not path.name.endswith(SUFFIXES):
            continue
        if why := why_not(stem_of(path)):
            found.left_out.append((path, why))
        else:
            members.append(path)
    runs = [p for p in below if p.is_dir() and p not in nested and _holds_checkpoints(p)]
    if not members or (len(members) == 1 and runs):
        raise _no_run(directory)
    found.left_out += [(path, "a run of its own") for path in runs]
    return sorted(members, key=natural)


def _numbered_below(directory: Location) -> bool:
    """Whether a directory holds a run of checkpoint directories."""
    parts = part_names(directory)
    numbered = [p for p in directory.iterdir() if re.search(r"\d", p.name) and p.name not in parts]
    return any(is_checkpoint_directory(p) and not deepspeed.is_tag(p) for p in numbered)


def _refuse_unfinished(directory: Location) -> None:
    """Make sure that a directory is not what a crash while saving leaves of a checkpoint.

    Raises:
        RunError: It is.
    """
    numbered = re.fullmatch(r"checkpoint[-_]\d+", directory.name)
    if numbered and any(directory.glob("adapter_model.*")):
        raise RunError(
            f"{directory} holds an adapter without its {adapter.CONFIG}",
            "Copy that file beside it: it holds the rank and the scale.",
        )
    why = ""
    if any(directory.glob("*.distcp")):
        why = f"holds shards but no {dcp.METADATA}, which is written last"
    elif numbered and (directory / huggingface.TRAINER_STATE).is_file():
        why = "looks like a checkpoint but holds no weights"
    if why:
        raise RunError(
            f"{directory} {why}",
            "It may have been interrupted while being saved; delete it or copy it again.",
        )


def _no_run(directory: Location) -> RunError:
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
        "Expected .safetensors, .pt, .pth, .ckpt or .bin files, or Hugging Face directories.",
    )


def _runs_below(directory: Location) -> list[str]:
    """Directories that hold checkpoints, on the uppermost level that has some, if not too deep."""
    level = [directory]
    for _ in range(_DEEPEST_RUN):
        level = [p for d in level for p in _folders(d)][:_MOST_LOOKED_INTO]
        if runs := [str(path) for path in level if _holds_checkpoints(path)]:
            return runs
    return []


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
