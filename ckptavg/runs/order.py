"""Order of the checkpoints of a training, by recorded clocks or by names."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import RunError, first_few
from ckptavg.errors.printable import step_text
from ckptavg.formats import Checkpoint
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import is_alias_name, natural, stem_of
from ckptavg.runs.discovery.numbered import labels_of, roots_of
from ckptavg.runs.discovery.steps_in_names import NamedStep, steps_in_names


def find_aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
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


def order_checkpoints(
    checkpoints: Sequence[Checkpoint],
) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Sort checkpoints by step, then epoch, then numbers in the names, and set the steps."""
    clock, notes = _choose_clock(checkpoints)
    aliases, labels = find_aliases(checkpoints), labels_of([c.path for c in checkpoints])
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
    named = [*named_steps([c.path for c in checkpoints]).values()]
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


def named_steps(paths: Sequence[Location]) -> dict[Location, NamedStep]:
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
    shown = list(dict.fromkeys(map(repr, patterns[True] + patterns[False])))
    raise RunError(
        f"{checkpoints[0].path.parent} holds checkpoints that count epochs and others that do not, "
        f"and no clock that all of them record: {first_few(shown)}",
        f"Select one series with `glob={shown[0]}`.",
    )


def refuse_two_series(ordered: Sequence[Checkpoint]) -> None:
    """Refuse a directory with checkpoints of several networks for each step.

    Raises:
        RunError: Several patterns of names have a checkpoint for each step.
    """
    named = named_steps([c.path for c in ordered])
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
    patterns = list(map(repr, sorted(steps)))
    raise RunError(
        f"{ordered[0].path.parent} holds {len(steps)} checkpoints of each step, as of different "
        f"networks or runs: {first_few(patterns)}",
        f"Select one with `glob={patterns[0]}`.",
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
                "if they are of different runs, tell them apart with `glob`"
            )
            break
    for former, latter in pairwise(ordered):
        is_disjoint = not former.tensors.keys() & latter.tensors.keys()
        if is_disjoint and former.pattern != latter.pattern:
            notes.append(
                f"{former.path.name} and {latter.path.name} hold different networks: "
                f"tell them apart with `glob={former.pattern!r}` or `glob={latter.pattern!r}`"
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
