"""The checkpoints of one training opened, ordered, and freed of what repeats another."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.display import step_text
from ckptavg.errors import CheckpointError, CkptavgError, NoWeightsError, RunError, first_few
from ckptavg.formats import (
    Checkpoint,
    open_checkpoint,
)
from ckptavg.formats.comparing import Contents, SameWeights
from ckptavg.formats.record import last_part
from ckptavg.formats.storage import Location
from ckptavg.runs.damaged import Damaged, place_damaged
from ckptavg.runs.file_names import (
    STRANGERS,
    is_alias_name,
    natural,
    stem_of,
)
from ckptavg.runs.find import LeftOut
from ckptavg.runs.numbered import labels_of, roots_of
from ckptavg.runs.steps_in_names import NamedStep, steps_in_names


@dataclass
class Opened:
    """The checkpoints of one training, ordered and without repeats.

    Attributes:
        checkpoints: Those that could be opened.
        left_out: What is no checkpoint of the training, and why.
        notes: What a person should know about the order.
        damaged: Those that could not be opened.
    """

    checkpoints: tuple[Checkpoint, ...]
    left_out: list[LeftOut]
    notes: list[str]
    damaged: tuple[Damaged, ...]


def open_members(
    paths: Sequence[Location], key: str | None, broken: Mapping[Location, RunError]
) -> Opened:
    """Open the checkpoints of one training, order them and drop what repeats another.

    Args:
        paths: The checkpoints.
        key: Dotted path of the entry that holds the weights; found by itself where None.
        broken: Why some of them, and others, hold no weights.

    Raises:
        CheckpointError: None can be opened.
    """
    opened: list[Checkpoint] = []
    left_out: list[LeftOut] = []
    errors: dict[Location, CkptavgError] = {p: broken[p] for p in paths if p in broken}
    for path in paths:
        if path in errors:
            continue
        try:
            opened.append(open_checkpoint(path, key))
        except NoWeightsError as error:
            if len(paths) == 1:
                raise
            left_out.append((path, error.message.removeprefix(f"{path} ")))
        except CheckpointError as error:
            errors[path] = error
    made = [c for c in opened if c.is_average]
    if len(made) < len(opened):
        left_out += [(c.path, "an average that ckptavg wrote") for c in made]
        opened = [c for c in opened if not c.is_average]
    opened, refreshed = _without_refreshed(opened)
    left_out += refreshed
    kept, repeats = _without_repeats(opened)
    left_out += [(alias.path, f"repeats {original.path.name}") for alias, original in repeats]
    kept, strangers = _without_strangers(kept)
    left_out += strangers
    if errors and not kept:
        raise next(iter(errors.values()))
    ordered, notes = _ordered(kept)
    return Opened(ordered, left_out, notes, _placed(errors, ordered))


def _placed(
    errors: Mapping[Location, CkptavgError], ordered: Sequence[Checkpoint]
) -> tuple[Damaged, ...]:
    """What cannot be opened, with its place by the names that say when."""
    if not errors:
        return ()
    paths = [*(c.path for c in ordered), *errors]
    labels = labels_of(paths)
    named = {
        path: NamedStep(None) if is_alias_name(labels[path]) else step
        for path, step in _named_steps(paths).items()
    }
    return place_damaged(errors, ordered, named)


def _without_refreshed(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off the copies with recomputed statistics whose sources are there too."""
    names = Counter(c.path.name for c in checkpoints)
    by_name = {(c.path.name, c.size): c for c in checkpoints if names[c.path.name] == 1}
    kept: list[Checkpoint] = []
    left_out: list[LeftOut] = []
    for checkpoint in checkpoints:
        source = by_name.get(_source_of(checkpoint) or ("", 0))
        if source is None or source is checkpoint:
            kept.append(checkpoint)
        else:
            why = f"a copy of {source.path.name} with recomputed statistics"
            left_out.append((checkpoint.path, why))
    return kept, left_out


def _source_of(checkpoint: Checkpoint) -> tuple[str, int] | None:
    """Name and size of the checkpoint that a copy with other statistics was made of.

    Not its whole path: a run may have moved since.
    """
    made = checkpoint.provenance
    if made is None or checkpoint.is_average or not made["checkpoints"]:
        return None
    source = made["checkpoints"][0]
    path, size = source.get("path"), source.get("size")
    return (last_part(path), size) if isinstance(path, str) and isinstance(size, int) else None


def _without_repeats(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Split into checkpoints, and repeats with what each one repeats.

    The same files repeat each other. Weights are compared where a name says nothing of when, or
    where two record the same step, or without steps the same epoch.
    """
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    contents = Contents()
    kept: list[Checkpoint] = []
    repeats: list[tuple[Checkpoint, Checkpoint]] = []
    by_files: dict[object, Checkpoint] = {}
    by_weights = SameWeights(contents)
    by_moment: dict[object, SameWeights] = defaultdict(lambda: SameWeights(contents))
    for checkpoint in sorted(
        checkpoints,
        key=lambda c: (c.path in aliases, c.path.is_symlink(), natural(labels[c.path])),
    ):
        identity = tuple(stamp.identity for stamp in checkpoint.files)
        moment = _moment(checkpoint)
        likely = by_weights if checkpoint.path in aliases else by_moment[moment]
        original = by_files.get(identity) or likely.find(checkpoint)
        if original is not None:
            repeats.append((checkpoint, original))
            continue
        kept.append(checkpoint)
        by_files[identity] = checkpoint
        by_weights.add(checkpoint)
        if moment is not None:
            by_moment[moment].add(checkpoint)
    return kept, repeats


def _moment(checkpoint: Checkpoint) -> object:
    """The step that it records, or the epoch; None where it records neither.

    The epoch does not tell steps apart: the end of one is the beginning of the next.
    """
    step, epoch = checkpoint.record.step, checkpoint.record.epoch
    return (None if epoch is None else ("epoch", epoch)) if step is None else ("step", step)


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
    labels = labels_of([c.path for c in checkpoints])
    roots = roots_of([c.path for c in checkpoints])
    return {path for path, label in labels.items() if path in roots or is_alias_name(label)}


@dataclass(frozen=True)
class _Clock:
    """Positions of some checkpoints in training, in their order.

    Attributes:
        positions: What each is ordered by; None where that is not known.
        within: What those of one position are ordered by.
    """

    positions: Sequence[float | None]
    within: Sequence[float | None]

    @property
    def is_complete(self) -> bool:
        """Whether every checkpoint has a position."""
        return None not in self.positions

    @property
    def stands_still(self) -> bool:
        """Whether it is the same for all of several checkpoints."""
        return len(self.positions) > 1 and len(set(self.positions)) == 1


def _ordered(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Sort by step, then epoch, then the numbers in the names, and give each its position."""
    clock, notes = _common_clock(checkpoints)
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    positions = clock.positions
    ranked = sorted(
        range(len(checkpoints)),
        key=lambda i: (
            *((positions[i], _or_before(clock.within[i])) if clock.is_complete else ()),
            checkpoints[i].path in aliases,
            natural(labels[checkpoints[i].path]),
        ),
    )
    ordered = tuple(replace(checkpoints[i], step=positions[i]) for i in ranked)
    return ordered, notes + _doubts(ordered)


def _or_before(position: float | None) -> float:
    return -1.0 if position is None else position


def _common_clock(checkpoints: Sequence[Checkpoint]) -> tuple[_Clock, list[str]]:
    """The clock that all checkpoints have, and notes about it.

    Raises:
        RunError: There is none, and their names count in different units.
    """
    steps = [c.record.step for c in checkpoints]
    epochs = [c.record.epoch for c in checkpoints]
    by_step, by_epoch = _Clock(steps, epochs), _Clock(epochs, steps)
    clocks = [] if _restarts(checkpoints) else [by_step]
    recorded = [clock for clock in (*clocks, by_epoch) if clock.is_complete]
    clock = next((c for c in recorded if not c.stands_still), next(iter(recorded), None))
    named = [*_named_steps([c.path for c in checkpoints]).values()]
    positions = [None if step.value is None else float(step.value) for step in named]
    by_name = _Clock(positions, [None] * len(named))
    if clock is None:
        _refuse_two_units(checkpoints, named)
        partly = any(value is not None for value in (*steps, *epochs))
        why = "not every checkpoint records a step or an epoch: ordered by name"
        return by_name, [why] if partly else []
    if clock.stands_still and _tell_apart(named):
        why = f"every checkpoint records {step_text(clock.positions[0] or 0)}: ordered by name"
        return by_name, [why]
    if clock is by_epoch and _lack_order(checkpoints):
        _refuse_two_units(checkpoints, named)
    return clock, []


def _named_steps(paths: Sequence[Location]) -> dict[Location, NamedStep]:
    """The steps in the names; a directory that holds the other checkpoints has none."""
    labels = labels_of(paths)
    roots = roots_of(paths)
    numbered = [path for path in paths if path not in roots]
    steps = steps_in_names([stem_of(labels[path]) for path in numbered])
    named = dict(zip(numbered, steps, strict=True))
    return {path: named.get(path, NamedStep(None)) for path in paths}


def _tell_apart(named: Sequence[NamedStep]) -> bool:
    """Whether names tell by a word that all of them have what they count, and differ."""
    units = {step.unit for step in named}
    values = {step.value for step in named}
    return len(units) == 1 and not {None} & units and None not in values and len(values) > 1


def _lack_order(checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether of the checkpoints of an epoch some record a step and others do not."""
    kinds: dict[float | None, set[bool]] = defaultdict(set)
    for checkpoint in checkpoints:
        kinds[checkpoint.record.epoch].add(checkpoint.record.step is None)
    return any(len(kind) > 1 for kind in kinds.values())


def _refuse_two_units(checkpoints: Sequence[Checkpoint], named: Sequence[NamedStep]) -> None:
    """Make sure that names do not count in different units, such as epochs and batches.

    Raises:
        RunError: They do: several count epochs, several others do not.
    """
    patterns: dict[bool, list[str]] = {True: [], False: []}
    for checkpoint, step in zip(checkpoints, named, strict=True):
        if step.value is not None and not is_alias_name(checkpoint.path):
            patterns[step.unit == "epoch"].append(checkpoint.pattern)
    if min(map(len, patterns.values())) < 2:
        return
    shown = [f"'{pattern}'" for pattern in dict.fromkeys(patterns[True] + patterns[False])]
    raise RunError(
        f"{checkpoints[0].path.parent} holds checkpoints that count epochs and others that do not, "
        f"and no clock that all of them record: {first_few(shown)}",
        f"Select one series with --glob {shown[0]}.",
    )


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
    whole = checkpoint.step is not None and float(checkpoint.step).is_integer()
    step = str(int(checkpoint.step or 0)) if whole else ""
    places = [m for m in re.finditer(r"\d+", name) if (m[0].lstrip("0") or "0") == step]
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
                f"{one.path.name} and {other.path.name} share the step {step_text(one.step)}: "
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
    if unplaced and len(ordered) > 1:
        so = "placed last" if len(unplaced) < len(ordered) else "in the order of their names"
        notes.append(f"no step is known of {first_few(unplaced)}: {so}")
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
