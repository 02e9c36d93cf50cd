"""What below a path is a checkpoint, in which order, and what repeats what."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

from ckptavg.errors import NoWeightsError, RunError, first_few
from ckptavg.formats import (
    Checkpoint,
    adapter,
    dcp,
    deepspeed,
    huggingface,
    is_checkpoint_directory,
    open_checkpoint,
    refuse_partitioned,
)
from ckptavg.formats.comparing import Checksums, same_weights
from ckptavg.formats.storage import Location

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
_OTHER_STATE = re.compile(
    r"(optimizer|optim|lr_scheduler|scheduler|rng_state|rng|random_states?|training_args|scaler|"
    r"sampler|trainer_state|zero_pp_rank_.*|.*optim_states)([-_.]?\d+)*"
)
_TEMPORARY = re.compile(r"(.*[-_.])?te?mp")  # what a crash while saving leaves
_STRANGERS = (
    (re.compile(r"(?<![a-z])(ave|avg|averaged?)(?![a-z])"), "an average already, by its name"),
    (re.compile(r"(?<![a-z])ema(?![a-z])"), "an EMA copy, by its name"),
    (re.compile(r"(?<![a-z])init(ial)?(?![a-z])"), "from before training, by its name"),
)
_ALIAS_WORD = re.compile(r"(?<![a-z])(last|latest|best|final|newest|current)(?![a-z])")
_STEP_WORDS = tuple(
    re.compile(rf"(?<![a-z])(?:{words})[-_= ]?(\d+)")
    for words in ("global_?steps?|steps?|iter|iteration|iters", "epochs?|ep")
)
_STEP_NUMBER = re.compile(
    r"(?<![a-z])(checkpoint|ckpt|(?:global_?)?steps?|iters?|iterations?|epochs?|ep)[-_= ]?\d+",
    re.IGNORECASE,
)
LeftOut = tuple[Location, str]
_DEEPEST_RUN, _MOST_LOOKED_INTO = 4, 200  # levels and directories below a path without a run
NOT_WEIGHTS = "not a model's weights"


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
    for path in map(_adapter_of, paths):
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
        series, numbers = _STEP_NUMBER.subn(r"\1", home.name)
        lone = len(members) == 1 and members[0].is_file()
        together = (home.parent, series, members[0].name) if lone and numbers else home
        joined[together] += members
    return list(joined.values())


def _labels(paths: Sequence[Location]) -> dict[Location, Location]:
    """For each path the one whose name says when: the directory's where the files' are the same."""
    alike = len(paths) > 1 and len({path.name for path in paths}) == 1
    return {path: path.parent if alike else path for path in paths}


def _kept(members: list[Location], glob: str | None, found: Found) -> list[Location]:
    """The members that a run is made of, each once."""
    kept: dict[tuple[Location, str], Location] = {}
    for path in members:
        if glob is not None and not fnmatch.fnmatchcase(path.name, glob):
            found.left_out.append((path, f"does not match {glob}"))
        elif len(members) > 1 and path.is_file() and _OTHER_STATE.fullmatch(_stem(path)):
            found.left_out.append((path, NOT_WEIGHTS))
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
    kept, strangers = _without_strangers(kept)
    left_out += strangers
    ordered, notes = _ordered(kept)
    return Opened(ordered, left_out, notes)


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
    below = sorted((p for p in directory.iterdir() if not p.name.startswith(".")), key=_natural)
    itself = is_checkpoint_directory(directory)
    nested = [path for path in below if is_checkpoint_directory(path)]
    if itself:  # and the states that DeepSpeed resumes from are part of it
        nested = [path for path in nested if not deepspeed.is_tag(path)]
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
        if why := _why_not(_stem(path)):
            found.left_out.append((path, why))
        else:
            members.append(path)
    runs = [p for p in below if p.is_dir() and p not in nested and _holds_checkpoints(p)]
    if not members or (len(members) == 1 and runs):
        raise _no_run(directory)
    found.left_out += [(path, "a run of its own") for path in runs]
    return sorted(members, key=_natural)


def _why_not(stem: str) -> str:
    """Why a file that is called so is not opened; empty if it is."""
    if _OTHER_STATE.fullmatch(stem):
        return NOT_WEIGHTS
    return "a temporary file, by its name" if _TEMPORARY.fullmatch(stem) else ""


def _numbered_below(directory: Location) -> bool:
    """Whether a directory holds a run of checkpoint directories."""
    return any(
        re.search(r"\d", p.name) and is_checkpoint_directory(p) and not deepspeed.is_tag(p)
        for p in directory.iterdir()
    )


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
    return sorted(shown, key=_natural)


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

    The same files repeat each other. Weights are compared where a name says nothing of when, or
    where two record the same step and epoch.
    """
    aliases, labels = _aliases(checkpoints), _labels([c.path for c in checkpoints])
    sums = Checksums()
    kept: list[Checkpoint] = []
    repeats: list[tuple[Checkpoint, Checkpoint]] = []
    by_files: dict[object, Checkpoint] = {}
    by_place: dict[object, list[Checkpoint]] = defaultdict(list)
    for checkpoint in sorted(
        checkpoints,
        key=lambda c: (c.path in aliases, c.path.is_symlink(), _natural(labels[c.path])),
    ):
        identity = tuple(stamp.identity for stamp in checkpoint.files)
        place = (checkpoint.record.step, checkpoint.record.epoch)
        likely = kept if checkpoint.path in aliases else by_place[place]
        original = by_files.get(identity) or next(
            (k for k in likely if same_weights(checkpoint, k, sums)), None
        )
        if original is not None:
            repeats.append((checkpoint, original))
            continue
        kept.append(checkpoint)
        by_files[identity] = checkpoint
        if place != (None, None):
            by_place[place].append(checkpoint)
    return kept, repeats


def _without_strangers(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off what is no point of the training by its name, if that leaves a run."""
    kept, strangers = [], []
    for checkpoint in checkpoints:
        stem = _stem(checkpoint.path).lower()
        why = next((why for word, why in _STRANGERS if word.search(stem)), None)
        if why is None:
            kept.append(checkpoint)
        else:
            strangers.append((checkpoint.path, why))
    return (kept, strangers) if len(kept) > 1 else (list(checkpoints), [])


def _aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
    """Checkpoints that may stand for another one: by their name, or as the parent of the rest."""
    parents, labels = {c.path.parent for c in checkpoints}, _labels([c.path for c in checkpoints])
    return {path for path, label in labels.items() if path in parents or _is_alias_name(label)}


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
    aliases, labels = _aliases(checkpoints), _labels([c.path for c in checkpoints])
    ranked = sorted(
        range(len(checkpoints)),
        key=lambda i: (
            *(() if None in first else (first[i], -1.0 if second[i] is None else second[i])),
            checkpoints[i].path in aliases,
            _natural(labels[checkpoints[i].path]),
        ),
    )
    ordered = tuple(replace(checkpoints[i], step=first[i]) for i in ranked)
    return ordered, notes + _doubts(ordered)


def refuse_two_series(ordered: Sequence[Checkpoint]) -> None:
    """Make sure that a directory does not hold two networks or runs, step by step.

    Raises:
        RunError: It does: under two kinds of names there is a checkpoint for each step.
    """
    steps: dict[str, list[float | None]] = defaultdict(list)
    for checkpoint in ordered:
        steps[_series(checkpoint)].append(checkpoint.step)
    first, *others = steps.values()
    if not others or len(first) < 2 or None in first or any(first != other for other in others):
        return
    patterns = [f"'{pattern}'" for pattern in sorted(steps)]
    raise RunError(
        f"{ordered[0].path.parent} holds {len(steps)} checkpoints of each step, as of different "
        f"networks or runs: {first_few(patterns)}",
        f"Select one with --glob {patterns[0]}.",
    )


def _series(checkpoint: Checkpoint) -> str:
    """A shell pattern of the name without its step, or without numbers if the step is not in it."""
    name = checkpoint.path.name
    places = [m for m in re.finditer(r"\d+", name) if int(m[0]) == checkpoint.step]
    if not places:
        return checkpoint.pattern
    begin, end = places[-1].span()
    return f"{glob.escape(name[:begin])}*{glob.escape(name[end:])}"


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
    for one, other in pairwise(ordered):
        if not one.tensors.keys() & other.tensors.keys() and one.pattern != other.pattern:
            notes.append(
                f"{one.path.name} and {other.path.name} hold different networks: "
                f"tell them apart with --glob '{one.pattern}' or '{other.pattern}'"
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
    labels = _labels([c.path for c in checkpoints])
    stems = [_stem(label) for label in labels.values()]
    for word in _STEP_WORDS:
        found = [word.search(stem.lower()) for stem in stems]
        if all(found):
            return [float(match[1]) for match in found if match]
    parents = {c.path.parent for c in checkpoints}
    names = [
        [] if path in parents else _tokens(stem) for path, stem in zip(labels, stems, strict=True)
    ]
    numbered = [name for name in names if len(name) > 1]
    places = range(1, min(map(len, numbered), default=0), 2)
    place = next((i for i in places if len({name[i] for name in numbered}) > 1), -2)
    return [float(int(n[place])) if len(n) > 1 else None for n in names]
