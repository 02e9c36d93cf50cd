"""Opening and ordering of the checkpoints of a training, with repeats removed."""

from __future__ import annotations

import glob
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import CheckpointError, CkptavgError, NoWeightsError, RunError, first_few
from ckptavg.errors.printable import step_text
from ckptavg.formats import (
    Checkpoint,
    open_checkpoint,
)
from ckptavg.formats.training_record import last_part
from ckptavg.io.paths import Location
from ckptavg.runs.damaged import Damaged, place_damaged
from ckptavg.runs.discovery.file_names import (
    STRANGERS,
    is_alias_name,
    is_best_name,
    natural,
    stem_of,
)
from ckptavg.runs.discovery.left_out import LeftOut
from ckptavg.runs.discovery.numbered import labels_of, roots_of
from ckptavg.runs.discovery.steps_in_names import NamedStep, steps_in_names
from ckptavg.runs.duplicates import Contents, SameWeights


@dataclass
class Opened:
    """Opened checkpoints of a training, ordered and without repeats.

    Attributes:
        checkpoints: The checkpoints that could be opened.
        left_out: Paths that are no checkpoints of the training, each with the reason.
        notes: Remarks about the order, for the user.
        damaged: The checkpoints that could not be opened.
    """

    checkpoints: tuple[Checkpoint, ...]
    left_out: list[LeftOut]
    notes: list[str]
    damaged: tuple[Damaged, ...]


def open_members(
    paths: Sequence[Location], key: str | None, broken: Mapping[Location, RunError]
) -> Opened:
    """Open the checkpoints of a training, sort by step, and drop repeats.

    Args:
        paths: The checkpoints.
        key: Dotted path of the entry that holds the weights; None to search for the entry.
        broken: Errors of paths that were found to hold no weights. Errors of other paths are
            ignored.

    Raises:
        CheckpointError: No checkpoint can be opened.
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
            # The only path of a run was meant as a checkpoint. Among others it is passed over.
            if len(paths) == 1:
                raise
            left_out.append((path, error.message.removeprefix(f"{path} ")))
        except CheckpointError as error:
            errors[path] = error
    averages = [c for c in opened if c.is_average]
    # A run of averages alone is meant: the user averages averages.
    if len(averages) < len(opened):
        left_out += [(c.path, "an average that ckptavg wrote") for c in averages]
        opened = [c for c in opened if not c.is_average]
    opened, refreshed = _split_refreshed(opened)
    left_out += refreshed
    members, repeats = _split_repeats(opened)
    left_out += [(alias.path, f"repeats {original.path.name}") for alias, original in repeats]
    members, strangers = _split_strangers(members)
    left_out += strangers
    if errors and not members:
        raise next(iter(errors.values()))
    ordered, notes = _order(members)
    notes += _note_lone_best(ordered)
    return Opened(ordered, left_out, notes, _order_damaged(errors, ordered))


def _order_damaged(
    errors: Mapping[Location, CkptavgError], ordered: Sequence[Checkpoint]
) -> tuple[Damaged, ...]:
    """Find the position of each damaged checkpoint by the step in the name."""
    if not errors:
        return ()
    paths = [*(c.path for c in ordered), *errors]
    labels = labels_of(paths)
    named = {
        path: NamedStep(None) if is_alias_name(labels[path]) else step
        for path, step in _named_steps(paths).items()
    }
    return place_damaged(errors, ordered, named)


def _split_refreshed(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off copies with recomputed statistics if the source is a member too."""
    names = Counter(c.path.name for c in checkpoints)
    by_name = {(c.path.name, c.size): c for c in checkpoints if names[c.path.name] == 1}
    members: list[Checkpoint] = []
    left_out: list[LeftOut] = []
    for checkpoint in checkpoints:
        source = by_name.get(_source_of(checkpoint) or ("", 0))
        if source is None or source is checkpoint:
            members.append(checkpoint)
        else:
            why = f"a copy of {source.path.name} with recomputed statistics"
            left_out.append((checkpoint.path, why))
    return members, left_out


def _source_of(checkpoint: Checkpoint) -> tuple[str, int] | None:
    """Return name and size in bytes of the source of a copy with recomputed statistics.

    The directories of the source do not count, since a run may have moved.
    """
    provenance = checkpoint.provenance
    if provenance is None or checkpoint.is_average or not provenance["checkpoints"]:
        return None
    source = provenance["checkpoints"][0]
    path, size = source.get("path"), source.get("size")
    return (last_part(path), size) if isinstance(path, str) and isinstance(size, int) else None


def _split_repeats(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[tuple[Checkpoint, Checkpoint]]]:
    """Split off checkpoints that repeat another checkpoint.

    Two paths to the same files are repeats. Weights are compared only where a repeat is likely:
    where a name tells no step, or where two checkpoints record the same step (or epoch, without
    steps).

    Returns:
        The checkpoints without repeats, and pairs of repeat and original.
    """
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    contents = Contents()
    members: list[Checkpoint] = []
    repeats: list[tuple[Checkpoint, Checkpoint]] = []
    by_files: dict[object, Checkpoint] = {}
    by_weights = SameWeights(contents)
    by_moment: dict[object, SameWeights] = defaultdict(lambda: SameWeights(contents))
    # Aliases and links come last, so that a numbered file counts as the original of its copies.
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
        members.append(checkpoint)
        by_files[identity] = checkpoint
        by_weights.add(checkpoint)
        if moment is not None:
            by_moment[moment].add(checkpoint)
    return members, repeats


def _moment(checkpoint: Checkpoint) -> object:
    """Return the recorded step of a checkpoint, else the recorded epoch, else None.

    With a step the epoch does not count: the end of an epoch may be recorded as the beginning of
    the next.
    """
    step, epoch = checkpoint.record.step, checkpoint.record.epoch
    if step is not None:
        return "step", step
    return None if epoch is None else ("epoch", epoch)


def _split_strangers(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off checkpoints that are no step of the training, by name.

    If fewer than two members would be left, all checkpoints are members: the words in the names
    then belong to the run itself.
    """
    members: list[Checkpoint] = []
    strangers: list[LeftOut] = []
    for checkpoint in checkpoints:
        stem = stem_of(checkpoint.path).lower()
        why = next((why for word, why in STRANGERS if word.search(stem)), None)
        if why is None:
            members.append(checkpoint)
        else:
            strangers.append((checkpoint.path, why))
    return (members, strangers) if len(members) > 1 else (list(checkpoints), [])


def _note_lone_best(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Note a best checkpoint that repeats no numbered checkpoint of a run.

    Such a checkpoint may be far older than the numbered checkpoints, if training has deleted older
    ones.
    """
    best = [checkpoint.path.name for checkpoint in checkpoints if is_best_name(checkpoint.path)]
    numbered = [checkpoint for checkpoint in checkpoints if not is_alias_name(checkpoint.path)]
    if len(best) != 1 or not numbered:
        return []
    return [f"{best[0]} repeats no other checkpoint, and counts as one of its own"]


def _aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
    """Find checkpoints that may be repeats: by name, or as the directory above the rest."""
    labels = labels_of([c.path for c in checkpoints])
    roots = roots_of([c.path for c in checkpoints])
    return {path for path, label in labels.items() if path in roots or is_alias_name(label)}


@dataclass(frozen=True)
class _Clock:
    """Positions in training, one per checkpoint, in the order of the checkpoints.

    Attributes:
        positions: The positions; None where a position is not known.
        within: Second positions, which order checkpoints of equal first positions.
    """

    positions: Sequence[float | None]
    within: Sequence[float | None]

    @property
    def is_complete(self) -> bool:
        """True if every checkpoint has a position."""
        return None not in self.positions

    @property
    def stands_still(self) -> bool:
        """True if there are several checkpoints with the same position."""
        return len(self.positions) > 1 and len(set(self.positions)) == 1


def _order(checkpoints: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Sort checkpoints by step, then epoch, then numbers in the names, and set the steps."""
    clock, notes = _choose_clock(checkpoints)
    aliases, labels = _aliases(checkpoints), labels_of([c.path for c in checkpoints])
    positions, is_complete = clock.positions, clock.is_complete

    def sort_key(index: int) -> tuple[object, ...]:
        """Return the sort key of a checkpoint; by name alone if the clock is not complete."""
        path = checkpoints[index].path
        by_name = (path in aliases, natural(labels[path]))
        if not is_complete:
            return by_name
        return positions[index], _or_before(clock.within[index]), *by_name

    indices = sorted(range(len(checkpoints)), key=sort_key)
    ordered = tuple(replace(checkpoints[i], step=positions[i]) for i in indices)
    return ordered, notes + _note_doubts(ordered, [clock.within[i] for i in indices])


def _or_before(position: float | None) -> float:
    """Return a position; a number below all positions for None."""
    return -1.0 if position is None else position


def _choose_clock(checkpoints: Sequence[Checkpoint]) -> tuple[_Clock, list[str]]:
    """Choose a clock on which all checkpoints have a position.

    Recorded steps come first, then recorded epochs, then the steps in the names.

    Returns:
        The clock, and notes about it.

    Raises:
        RunError: No recorded clock is complete, and the names count in different units.
    """
    steps = [c.record.step for c in checkpoints]
    epochs = [c.record.epoch for c in checkpoints]
    by_step, by_epoch = _Clock(steps, epochs), _Clock(epochs, steps)
    clocks = [] if _restarts(checkpoints) else [by_step]
    recorded = [clock for clock in (*clocks, by_epoch) if clock.is_complete]
    # A trainer that never counts its steps up still records a step of 0 everywhere.
    clock = next((c for c in recorded if not c.stands_still), next(iter(recorded), None))
    named = [*_named_steps([c.path for c in checkpoints]).values()]
    positions = [None if step.value is None else float(step.value) for step in named]
    by_name = _Clock(positions, [step.within for step in named])
    if clock is None:
        _refuse_two_units(checkpoints, named)
        partly = any(value is not None for value in (*steps, *epochs))
        why = "not every checkpoint records a step or an epoch: ordered by name"
        return by_name, [why] if partly else []
    # Names count only if they state the unit, since bare numbers may be anything.
    if clock.stands_still and _tell_apart(named):
        why = f"every checkpoint records {step_text(clock.positions[0] or 0)}: ordered by name"
        return by_name, [why]
    if clock is by_epoch and _lack_order(checkpoints):
        _refuse_two_units(checkpoints, named)
    return clock, []


def _named_steps(paths: Sequence[Location]) -> dict[Location, NamedStep]:
    """Read the steps in the names, without a step for a directory above the checkpoints."""
    labels = labels_of(paths)
    roots = roots_of(paths)
    numbered = [path for path in paths if path not in roots]
    steps = steps_in_names([stem_of(labels[path]) for path in numbered])
    named = dict(zip(numbered, steps, strict=True))
    return {path: named.get(path, NamedStep(None)) for path in paths}


def _tell_apart(named: Sequence[NamedStep]) -> bool:
    """Return True if the names have different steps in the same unit, as ``epoch_1``."""
    units = {step.unit for step in named}
    values = {step.value for step in named}
    return len(units) == 1 and not {None} & units and None not in values and len(values) > 1


def _lack_order(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return True if only some checkpoints of an epoch record a step."""
    stepless: dict[float | None, set[bool]] = defaultdict(set)
    for checkpoint in checkpoints:
        stepless[checkpoint.record.epoch].add(checkpoint.record.step is None)
    return any(len(answers) > 1 for answers in stepless.values())


def _refuse_two_units(checkpoints: Sequence[Checkpoint], named: Sequence[NamedStep]) -> None:
    """Refuse names that count in different units, such as epochs and batches.

    Raises:
        RunError: Several names count epochs, and several others do not.
    """
    patterns: dict[bool, list[str]] = {True: [], False: []}
    for checkpoint, step in zip(checkpoints, named, strict=True):
        if step.value is not None and not is_alias_name(checkpoint.path):
            # Steps, batches and bare numbers count as one unit, since a bare number may be any.
            patterns[step.unit == "epoch"].append(checkpoint.pattern)
    # A single unusual name is no second series.
    if min(map(len, patterns.values())) < 2:
        return
    shown = [f"'{pattern}'" for pattern in dict.fromkeys(patterns[True] + patterns[False])]
    raise RunError(
        f"{checkpoints[0].path.parent} holds checkpoints that count epochs and others that do not, "
        f"and no clock that all of them record: {first_few(shown)}",
        f"Select one series with --glob {shown[0]}.",
    )


def refuse_two_series(ordered: Sequence[Checkpoint]) -> None:
    """Refuse a directory with checkpoints of several networks for each step.

    Raises:
        RunError: Several patterns of names have a checkpoint for each step.
    """
    named = _named_steps([c.path for c in ordered])
    steps: dict[str, list[object]] = defaultdict(list)
    for checkpoint in ordered:
        # Steps that restart in each epoch tell apart the checkpoints of one epoch.
        within = named[checkpoint.path].within
        if checkpoint.step == checkpoint.record.epoch:
            within = checkpoint.record.step
        steps[_series(checkpoint)].append((checkpoint.step, within))
    first, *further = steps.values()
    if not further or len(first) < 2 or any(first != series for series in further):
        return
    if any(checkpoint.step is None for checkpoint in ordered):
        return
    patterns = [f"'{pattern}'" for pattern in sorted(steps)]
    raise RunError(
        f"{ordered[0].path.parent} holds {len(steps)} checkpoints of each step, as of different "
        f"networks or runs: {first_few(patterns)}",
        f"Select one with --glob {patterns[0]}.",
    )


def _series(checkpoint: Checkpoint) -> str:
    """Return the shell pattern of a checkpoint's name with the step replaced by a star.

    If the step is not in the name, all numbers are replaced.
    """
    name = checkpoint.path.name
    is_whole = checkpoint.step is not None and float(checkpoint.step).is_integer()
    step = str(int(checkpoint.step or 0)) if is_whole else ""
    matches = [m for m in re.finditer(r"\d+", name) if (m[0].lstrip("0") or "0") == step]
    if not matches:
        return checkpoint.pattern
    # The last match, since numbers further left belong to the network or the experiment.
    begin, end = matches[-1].span()
    return f"{glob.escape(name[:begin])}*{glob.escape(name[end:])}"


def _note_doubts(ordered: Sequence[Checkpoint], within: Sequence[float | None]) -> list[str]:
    """Note doubts about the order of the checkpoints.

    Args:
        ordered: The checkpoints.
        within: Positions that order checkpoints of equal steps.
    """
    notes = []
    # One pair per doubt is enough, since the remedy is the same for all pairs.
    for (former, earlier), (latter, later) in pairwise(zip(ordered, within, strict=True)):
        if former.step is None or former.step != latter.step:
            continue
        if former.record == latter.record and earlier == later:
            notes.append(
                f"{former.path.name} and {latter.path.name} share the step "
                f"{step_text(former.step)}: "
                "if they are of different runs, tell them apart with --glob"
            )
            break
    for former, latter in pairwise(ordered):
        is_disjoint = not former.tensors.keys() & latter.tensors.keys()
        if is_disjoint and former.pattern != latter.pattern:
            notes.append(
                f"{former.path.name} and {latter.path.name} hold different networks: "
                f"tell them apart with --glob '{former.pattern}' or '{latter.pattern}'"
            )
            break
    stepless = [c.path.name for c in ordered if c.step is None]
    if stepless and len(ordered) > 1:
        order = "placed last" if len(stepless) < len(ordered) else "in the order of their names"
        notes.append(f"no step is known of {first_few(stepless)}: {order}")
    epochs = [c.record.epoch for c in ordered if c.record.epoch is not None]
    # The checkpoints are sorted by step, so epochs that go back contradict the steps.
    if any(a > b for a, b in pairwise(epochs)):
        notes.append("recorded steps and epochs disagree on the order: the steps decide")
    return notes


def _restarts(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return True if steps restart in each epoch, so that epochs share a recorded step."""
    epochs_of: dict[int | None, set[float | None]] = defaultdict(set)
    for checkpoint in checkpoints:
        epochs_of[checkpoint.record.step].add(checkpoint.record.epoch)
    return any(len(epochs - {None}) > 1 for epochs in epochs_of.values())
