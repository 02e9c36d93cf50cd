"""Order of the checkpoints of a training, by recorded clocks or by names."""

from __future__ import annotations

import glob
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import RunError, first_few
from ckptavg.errors.printable import step_text
from ckptavg.formats import Checkpoint
from ckptavg.formats.snapshot_widths import width_of
from ckptavg.io.paths import Location
from ckptavg.runs.discovery.file_names import is_alias_name, natural_key, stem_of
from ckptavg.runs.discovery.numbered import find_labels, find_roots
from ckptavg.runs.discovery.steps_in_names import NamedStep, read_steps


def paths_of(checkpoints: Sequence[Checkpoint]) -> list[Location]:
    """Return the path of each checkpoint."""
    return [checkpoint.path for checkpoint in checkpoints]


def find_aliases(checkpoints: Sequence[Checkpoint]) -> set[Location]:
    """Find checkpoints that may be repeats: by name, or as the directory above the rest."""
    paths = paths_of(checkpoints)
    aliases = find_roots(paths)
    for path, label in find_labels(paths).items():
        if is_alias_name(label):
            aliases.add(path)
    return aliases


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
    def is_empty(self) -> bool:
        """True if no checkpoint has a position."""
        return set(self.positions) <= {None}

    @property
    def stands_still(self) -> bool:
        """True if there are several checkpoints with the same position."""
        return len(self.positions) > 1 and len(set(self.positions)) == 1


def order_checkpoints(
    checkpoints: Sequence[Checkpoint],
) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Sort checkpoints by step, then epoch, then numbers in the names, and set the steps."""
    clock, notes = _choose_clock(checkpoints)
    aliases, labels = find_aliases(checkpoints), find_labels(paths_of(checkpoints))
    positions, is_complete = clock.positions, clock.is_complete

    def sort_key(index: int) -> tuple[object, ...]:
        """Return the sort key of a checkpoint; by name alone if the clock is not complete."""
        path = checkpoints[index].path
        by_name = (path in aliases, natural_key(labels[path]))
        if not is_complete:
            return by_name
        within = clock.within[index]
        return positions[index], within is not None, within, *by_name

    ordered: list[Checkpoint] = []
    within: list[float | None] = []
    for index in sorted(range(len(checkpoints)), key=sort_key):
        ordered.append(replace(checkpoints[index], step=positions[index]))
        within.append(clock.within[index])
    return tuple(ordered), notes + _note_doubts(ordered, within)


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
    # Steps that restart in each epoch give no order.
    recorded = [by_epoch] if _restarts(checkpoints) else [by_step, by_epoch]
    clock = _choose_recorded(recorded)
    named = list(named_steps(paths_of(checkpoints)).values())
    if clock is None:
        _refuse_two_units(checkpoints, named)
        if by_step.is_empty and by_epoch.is_empty:
            return _clock_of_names(named), []
        why = "not every checkpoint records a step or an epoch: ordered by name"
        return _clock_of_names(named), [why]
    # Names count only if they state the unit, since bare numbers may be anything.
    if clock.stands_still and _tell_apart(named):
        why = f"every checkpoint records {step_text(clock.positions[0] or 0)}: ordered by name"
        return _clock_of_names(named), [why]
    if clock is by_epoch and _lack_order(checkpoints):
        _refuse_two_units(checkpoints, named)
    return clock, []


def _choose_recorded(clocks: Sequence[_Clock]) -> _Clock | None:
    """Choose the first complete clock that moves, else the first complete clock, if any."""
    standing: _Clock | None = None
    for clock in clocks:
        if not clock.is_complete:
            continue
        # A trainer that never counts its steps up still records a step of 0 everywhere.
        if not clock.stands_still:
            return clock
        standing = standing or clock
    return standing


def _clock_of_names(named: Sequence[NamedStep]) -> _Clock:
    positions: list[float | None] = []
    within: list[float | None] = []
    for step in named:
        positions.append(None if step.value is None else float(step.value))
        within.append(step.within)
    return _Clock(positions, within)


def named_steps(paths: Sequence[Location]) -> dict[Location, NamedStep]:
    """Read the steps in the names, without a step for a directory above the checkpoints."""
    labels = find_labels(paths)
    roots = find_roots(paths)
    numbered = [path for path in paths if path not in roots]
    stems = [stem_of(labels[path]) for path in numbered]
    named = dict.fromkeys(paths, NamedStep(None))
    named.update(zip(numbered, read_steps(stems), strict=True))
    return named


def _tell_apart(named: Sequence[NamedStep]) -> bool:
    """Return True if the names have different steps in the same unit, as ``epoch_1``."""
    units = {step.unit for step in named}
    values = {step.value for step in named}
    if None in units or None in values:
        return False
    return len(units) == 1 and len(values) > 1


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
    of_epochs: list[str] = []
    # Steps, batches and bare numbers count as one unit, since a bare number may be any.
    of_others: list[str] = []
    for checkpoint, step in zip(checkpoints, named, strict=True):
        if step.value is None or is_alias_name(checkpoint.path):
            continue
        if step.unit == "epoch":
            of_epochs.append(checkpoint.pattern)
        else:
            of_others.append(checkpoint.pattern)
    # A single unusual name is no second series.
    if min(len(of_epochs), len(of_others)) < 2:
        return
    shown = list(dict.fromkeys(map(repr, of_epochs + of_others)))
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
    named = named_steps(paths_of(ordered))
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
    if checkpoint.step is None:
        return checkpoint.pattern
    # The last match counts, since numbers further left belong to the network or the experiment.
    for number in reversed(list(re.finditer(r"\d+", name))):
        if _is_number(number[0], checkpoint.step):
            begin, end = number.span()
            return f"{glob.escape(name[:begin])}*{glob.escape(name[end:])}"
    return checkpoint.pattern


def _is_number(digits: str, value: float) -> bool:
    """Return True if digits spell a number."""
    # Compared as text, since Python converts at most 4300 digits to an int.
    return float(value).is_integer() and (digits.lstrip("0") or "0") == str(int(value))


def _note_doubts(ordered: Sequence[Checkpoint], within: Sequence[float | None]) -> list[str]:
    """Note doubts about the order of the checkpoints.

    Args:
        ordered: The checkpoints.
        within: Positions that order checkpoints of equal steps.
    """
    return [
        *_note_shared_step(ordered, within),
        *_note_networks(ordered),
        *_note_stepless(ordered),
        *_note_disagreement(ordered),
    ]


def _note_shared_step(ordered: Sequence[Checkpoint], within: Sequence[float | None]) -> list[str]:
    """Note the first two checkpoints with the same position; no note without such."""
    for (former, earlier), (latter, later) in pairwise(zip(ordered, within, strict=True)):
        if former.step is None or former.step != latter.step:
            continue
        if (
            former.record == latter.record
            and earlier == later
            and not _differ_in_width(former, latter)
        ):
            note = (
                f"{former.path.name} and {latter.path.name} share the step "
                f"{step_text(former.step)}: if they are of different runs, tell them apart with "
                "`glob`"
            )
            return [note]
    return []


def _differ_in_width(former: Checkpoint, latter: Checkpoint) -> bool:
    """Return True for snapshots of two EMAs, of different widths."""
    widths = {width_of(former), width_of(latter)}
    return len(widths) > 1 and None not in widths


def _note_networks(ordered: Sequence[Checkpoint]) -> list[str]:
    """Note the first two neighbours without a tensor name in common; no note without such."""
    for former, latter in pairwise(ordered):
        is_disjoint = former.tensors.keys().isdisjoint(latter.tensors)
        if is_disjoint and former.pattern != latter.pattern:
            note = (
                f"{former.path.name} and {latter.path.name} hold different networks: "
                f"tell them apart with `glob={former.pattern!r}` or `glob={latter.pattern!r}`"
            )
            return [note]
    return []


def _note_stepless(ordered: Sequence[Checkpoint]) -> list[str]:
    """Note checkpoints without a step; no note if all have a step, or for a single checkpoint."""
    stepless = [checkpoint.path.name for checkpoint in ordered if checkpoint.step is None]
    if not stepless or len(ordered) == 1:
        return []
    order = "placed last" if len(stepless) < len(ordered) else "in the order of their names"
    return [f"no step is known for {first_few(stepless)}: {order}"]


def _note_disagreement(ordered: Sequence[Checkpoint]) -> list[str]:
    """Note that epochs contradict the steps; no note if they agree."""
    previous = -math.inf
    for checkpoint in ordered:
        epoch = checkpoint.record.epoch
        if epoch is None:
            continue
        # The checkpoints are sorted by step, so epochs that go back contradict the steps.
        if epoch < previous:
            return ["recorded steps and epochs disagree on the order: the steps decide"]
        previous = epoch
    return []


def _restarts(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return True if steps restart in each epoch, so that epochs share a recorded step."""
    epochs_of: dict[int | None, set[float | None]] = defaultdict(set)
    for checkpoint in checkpoints:
        epochs_of[checkpoint.record.step].add(checkpoint.record.epoch)
    return any(len(epochs - {None}) > 1 for epochs in epochs_of.values())
