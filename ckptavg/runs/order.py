"""The checkpoints of one training opened, ordered, and freed of what repeats another."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import NoWeightsError, RunError, first_few
from ckptavg.formats import (
    Checkpoint,
    open_checkpoint,
)
from ckptavg.formats.comparing import Checksums, same_weights
from ckptavg.formats.storage import Location
from ckptavg.runs.file_names import (
    STEP_WORDS,
    STRANGERS,
    is_alias_name,
    labels_of,
    natural,
    stem_of,
    text_and_numbers,
)
from ckptavg.runs.find import LeftOut


@dataclass
class Opened:
    """The checkpoints of one training, ordered and without repeats."""

    checkpoints: tuple[Checkpoint, ...]
    left_out: list[LeftOut]
    notes: list[str]


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


def _without_repeats(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Split into checkpoints, and repeats with what each one repeats.

    The same files repeat each other. Weights are compared where a name says nothing of when, or
    where two record the same step and epoch.
    """
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    sums = Checksums()
    kept: list[Checkpoint] = []
    repeats: list[tuple[Checkpoint, Checkpoint]] = []
    by_files: dict[object, Checkpoint] = {}
    by_place: dict[object, list[Checkpoint]] = defaultdict(list)
    for checkpoint in sorted(
        checkpoints,
        key=lambda c: (c.path in aliases, c.path.is_symlink(), natural(labels[c.path])),
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
        stem = stem_of(checkpoint.path).lower()
        why = next((why for word, why in STRANGERS if word.search(stem)), None)
        if why is None:
            kept.append(checkpoint)
        else:
            strangers.append((checkpoint.path, why))
    return (kept, strangers) if len(kept) > 1 else (list(checkpoints), [])


def _aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
    """Checkpoints that may stand for another one: by their name, or as the parent of the rest."""
    parents, labels = {c.path.parent for c in checkpoints}, labels_of([c.path for c in checkpoints])
    return {path for path, label in labels.items() if path in parents or is_alias_name(label)}


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
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    ranked = sorted(
        range(len(checkpoints)),
        key=lambda i: (
            *(() if None in first else (first[i], -1.0 if second[i] is None else second[i])),
            checkpoints[i].path in aliases,
            natural(labels[checkpoints[i].path]),
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
    labels = labels_of([c.path for c in checkpoints])
    stems = [stem_of(label) for label in labels.values()]
    for word in STEP_WORDS:
        found = [word.search(stem.lower()) for stem in stems]
        if all(found):
            return [float(match[1]) for match in found if match]
    parents = {c.path.parent for c in checkpoints}
    names = [
        [] if path in parents else text_and_numbers(stem)
        for path, stem in zip(labels, stems, strict=True)
    ]
    numbered = [name for name in names if len(name) > 1]
    places = range(1, min(map(len, numbered), default=0), 2)
    place = next((i for i in places if len({name[i] for name in numbered}) > 1), -2)
    return [float(int(n[place])) if len(n) > 1 else None for n in names]
