"""What below a path is a checkpoint, in which order, and what repeats what."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import NoWeightsError, RunError, first_few
from ckptavg.formats import (
    Checkpoint,
    is_checkpoint_directory,
    open_checkpoint,
    storage,
    torch_zip,
)
from ckptavg.formats.storage import Location

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
_OTHER_STATE = re.compile(
    r"(optimizer|optim|lr_scheduler|scheduler|rng_state|rng|random_states?|training_args|scaler|"
    r"sampler|trainer_state|zero_pp_rank_.*|.*optim_states)([-_.]?\d+)*"
)
_ALIAS_WORD = re.compile(r"(?<![a-z])(last|latest|best|final|newest|current)(?![a-z])")
_STEP_WORDS = tuple(
    re.compile(rf"(?<![a-z])(?:{words})[-_= ]?(\d+)")
    for words in ("global_?steps?|steps?|iter|iteration|iters", "epochs?|ep")
)
LeftOut = tuple[Location, str]


@dataclass
class Found:
    """Paths of the checkpoints of each training, before any is opened."""

    groups: list[list[Location]]
    left_out: list[LeftOut]


@dataclass
class Opened:
    """The checkpoints of one training, ordered and without repeats."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: list[LeftOut]
    notes: list[str]


def find(paths: Sequence[Location], glob: str | None) -> Found:
    """Find the checkpoints at or directly below each path, grouped by training.

    Raises:
        RunError: A path does not exist, or holds no run or several.
    """
    groups: dict[Location, list[Location]] = {}
    found = Found([], [])
    for path in paths:
        if not path.exists():
            raise RunError(f"{path} does not exist", _nearest(path))
        members = _members(path, found) if path.is_dir() else [path]
        home = path.parent if members == [path] else path
        groups.setdefault(home.resolve(), []).extend(members)
    for members in groups.values():
        found.groups.append(_kept(members, glob, found))
    if not any(found.groups) and glob is not None:
        raise RunError(f"no checkpoint matches {glob!r}", "Quote the pattern, or loosen it.")
    found.groups = [members for members in found.groups if members]
    return found


def _kept(members: list[Location], glob: str | None, found: Found) -> list[Location]:
    """The members that a run is made of, each once."""
    kept: dict[tuple[Location, str], Location] = {}
    for path in members:
        if glob is not None and not fnmatch.fnmatchcase(path.name, glob):
            found.left_out.append((path, f"does not match {glob}"))
        elif len(members) > 1 and path.is_file() and _OTHER_STATE.fullmatch(_stem(path)):
            found.left_out.append((path, "not a model's weights"))
        else:
            kept.setdefault((path.parent.resolve(), path.name), path)
    return list(kept.values())


def open_members(paths: Sequence[Location], key: str | None) -> Opened:
    """Open the checkpoints of one training, order them and drop what repeats another.

    Raises:
        CheckpointError: One cannot be opened.
    """
    opened: list[Checkpoint] = []
    left_out: list[LeftOut] = []
    for path in paths:
        try:
            opened.append(open_checkpoint(path, key))
        except NoWeightsError as error:
            if len(paths) == 1:
                raise
            left_out.append((path, error.message.removeprefix(f"{path} ")))
    made = [c for c in opened if c.is_average]
    if len(made) < len(opened):
        left_out += [(c.path, "an average that ckptavg wrote") for c in made]
        opened = [c for c in opened if not c.is_average]
    kept, repeats = _without_repeats(opened)
    left_out += [(alias.path, f"repeats {original.path.name}") for alias, original in repeats]
    notes = [f"{a.path} repeats {b.path.name} and counts once" for a, b in repeats]
    ordered, order_notes = _ordered(kept)
    return Opened(ordered, left_out, notes + order_notes)


def _members(directory: Location, found: Found) -> list[Location]:
    """The checkpoints of a directory: itself, or those directly below.

    Raises:
        RunError: There are none, or several runs below, or one was left half-written.
    """
    below = sorted((p for p in directory.iterdir() if not p.name.startswith(".")), key=_natural)
    nested = [path for path in below if is_checkpoint_directory(path)]
    for path in below:
        if path.is_dir() and path not in nested and _lost_its_weights(path):
            raise RunError(
                f"{path} looks like a checkpoint but holds no weights",
                "It may have been interrupted while being saved; delete it or copy it again.",
            )
    numbered = [path for path in nested if re.search(r"\d", path.name)]
    if is_checkpoint_directory(directory):
        return [*numbered, directory] if numbered else [directory]
    if any(_numbered_below(path) for path in nested):
        raise _no_run(directory, below)
    members = list(nested)
    for path in below:
        if path.is_dir() or not path.name.endswith(SUFFIXES):
            continue
        if _OTHER_STATE.fullmatch(_stem(path)):
            found.left_out.append((path, "not a model's weights"))
        else:
            members.append(path)
    runs = [p for p in below if p.is_dir() and p not in nested and _holds_checkpoints(p)]
    if not members or (len(members) == 1 and runs):
        raise _no_run(directory, below)
    found.left_out += [(path, "a run of its own") for path in runs]
    return sorted(members, key=_natural)


def _numbered_below(directory: Location) -> bool:
    """Whether a directory holds a run of checkpoint directories."""
    return any(re.search(r"\d", p.name) and is_checkpoint_directory(p) for p in directory.iterdir())


def _lost_its_weights(directory: Location) -> bool:
    """Whether a directory is what a crash while saving leaves of a checkpoint."""
    if not re.fullmatch(r"checkpoint[-_]\d+", directory.name):
        return False
    if any(directory.glob("adapter_model.*")):
        raise RunError(
            f"{directory} holds a LoRA adapter: the mean of A and the mean of B do not make the "
            "mean of BA",
            "Merge the adapters into their base models first.",
        )
    return (directory / "trainer_state.json").is_file()


def _no_run(directory: Location, below: list[Location]) -> RunError:
    runs = [str(path) for path in below if path.is_dir() and _holds_checkpoints(path)]
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


def _holds_checkpoints(directory: Location) -> bool:
    return any(
        is_checkpoint_directory(path)
        or (
            (path.is_file() and path.name.endswith(SUFFIXES))
            and not _OTHER_STATE.fullmatch(_stem(path))
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


def _stem(path: Location) -> str:
    """The name without a checkpoint's suffix."""
    if path.is_dir():
        return path.name
    suffix = max((s for s in SUFFIXES if path.name.endswith(s)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)]


def _tokens(name: str) -> list[str]:
    """Text and numbers by turns: text at even places, numbers at odd ones."""
    return re.split(r"(\d+)", name.lower())


def _natural(path: Location) -> tuple[object, ...]:
    """Sort key under which 2 comes before 10, and a name without a number after all that have."""
    tokens = _tokens(_stem(path))
    parts = [int(t) if i % 2 else t for i, t in enumerate(tokens)]
    return (_is_alias_name(path), *parts)


def _is_alias_name(path: Location) -> bool:
    """Whether a name says nothing of when: no number, or a word like last or best."""
    stem = _stem(path).lower()
    return not re.search(r"\d", stem) or bool(_ALIAS_WORD.search(stem))


def _without_repeats(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Split into checkpoints, and repeats with what each one repeats.

    The same files repeat each other. Contents are compared where a name says nothing of when, or
    where two record the same step and epoch.
    """
    aliases = _aliases(checkpoints)
    kept: list[Checkpoint] = []
    repeats: list[tuple[Checkpoint, Checkpoint]] = []
    by_files: dict[object, Checkpoint] = {}
    by_place: dict[object, list[Checkpoint]] = defaultdict(list)
    for checkpoint in sorted(
        checkpoints, key=lambda c: (c.path in aliases, c.path.is_symlink(), _natural(c.path))
    ):
        identity = tuple(stamp.identity for stamp in checkpoint.files)
        place = (checkpoint.record.step, checkpoint.record.epoch)
        likely = kept if checkpoint.path in aliases else by_place[place]
        original = by_files.get(identity) or next(
            (k for k in likely if _same_contents(checkpoint, k)), None
        )
        if original is not None:
            repeats.append((checkpoint, original))
            continue
        kept.append(checkpoint)
        by_files[identity] = checkpoint
        if place != (None, None):
            by_place[place].append(checkpoint)
    return kept, repeats


def _aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
    """Checkpoints that may stand for another one: by their name, or as the parent of the rest."""
    parents = {c.path.parent for c in checkpoints}
    return {c.path for c in checkpoints if c.path in parents or _is_alias_name(c.path)}


def _same_contents(one: Checkpoint, other: Checkpoint) -> bool:
    """By what their store says, by checksums where both are zip files with them, else by bytes."""
    if len(one.files) != len(other.files):
        return False
    for a, b in zip(one.files, other.files, strict=True):
        content = storage.content_of(a.token)
        if content and content == storage.content_of(b.token):
            continue
        sums = torch_zip.checksums(a.path) if one.layout == "torch" else None
        if sums is not None and (theirs := torch_zip.checksums(b.path)) is not None:
            if sums != theirs:
                return False
        elif a.size != b.size or not storage.same_bytes(a.path, b.path, a.size):
            return False
    return True


def _ordered(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Sort by step, then epoch, then the numbers in the names, and give each its position."""
    steps: list[float | None] = [c.record.step for c in checkpoints]
    epochs = [c.record.epoch for c in checkpoints]
    notes: list[str] = []
    if None not in steps and not _restarts(checkpoints):
        first, second = steps, epochs
    elif None not in epochs:
        first, second = epochs, steps
    else:
        if any(v is not None for v in (*steps, *epochs)):
            notes.append("not every checkpoint records a step or an epoch: ordered by name")
        first = second = _numbers_in_names(checkpoints)
    aliases = _aliases(checkpoints)
    ranked = sorted(
        range(len(checkpoints)),
        key=lambda i: (
            *(() if None in first else (first[i], -1.0 if second[i] is None else second[i])),
            checkpoints[i].path in aliases,
            _natural(checkpoints[i].path),
        ),
    )
    ordered = tuple(replace(checkpoints[i], step=first[i]) for i in ranked)
    return ordered, notes + _doubts(ordered)


def _doubts(ordered: Sequence[Checkpoint]) -> list[str]:
    """Notes about an order that may not be what the user thinks."""
    notes = []
    for one, other in pairwise(ordered):
        if one.step is not None and one.step == other.step and one.record == other.record:
            notes.append(
                f"{one.path.name} and {other.path.name} share the step {one.step:g}: "
                "if they are of different runs, tell them apart with --glob"
            )
            break
    unplaced = [c.path.name for c in ordered if c.step is None]
    if unplaced and len(unplaced) < len(ordered):
        notes.append(f"no step is known of {first_few(unplaced)}: placed last")
    epochs = [c.record.epoch for c in ordered if c.record.epoch is not None]
    if any(a > b for a, b in pairwise(epochs)):
        notes.append("recorded steps and epochs disagree on the order: the steps decide")
    return notes


def _restarts(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether steps count anew in each epoch: the same step stands in several epochs."""
    epochs: dict[int | None, set[float | None]] = defaultdict(set)
    for checkpoint in checkpoints:
        epochs[checkpoint.record.step].add(checkpoint.record.epoch)
    return any(len(found - {None}) > 1 for found in epochs.values())


def _numbers_in_names(checkpoints: Sequence[Checkpoint]) -> list[float | None]:
    """The number after a word like step or epoch, else the first that tells the names apart.

    Of a single name without such a word it is the last number.
    """
    for word in _STEP_WORDS:
        found = [word.search(_stem(c.path).lower()) for c in checkpoints]
        if all(found):
            return [float(match[1]) for match in found if match]
    parents = {c.path.parent for c in checkpoints}
    names = [[] if c.path in parents else _tokens(_stem(c.path)) for c in checkpoints]
    numbered = [name for name in names if len(name) > 1]
    places = range(1, min(map(len, numbered), default=0), 2)
    place = next((i for i in places if len({name[i] for name in numbered}) > 1), -2)
    return [float(int(n[place])) if len(n) > 1 else None for n in names]
