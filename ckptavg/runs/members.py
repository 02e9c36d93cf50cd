"""Opening of the checkpoints of a training, with repeats removed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ckptavg.errors import CheckpointError, CkptavgError, NoWeightsError, RunError
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.training_record import last_part
from ckptavg.io.paths import Location
from ckptavg.runs.damaged import Damaged, place_damaged
from ckptavg.runs.discovery.file_names import (
    is_alias_name,
    is_best_name,
    natural_key,
    stem_of,
    why_no_step,
)
from ckptavg.runs.discovery.numbered import find_labels
from ckptavg.runs.discovery.reason import LeftOut, Reason
from ckptavg.runs.discovery.steps_in_names import NamedStep
from ckptavg.runs.duplicates import Contents, SameWeights
from ckptavg.runs.order import find_aliases, named_steps, order_checkpoints, paths_of

# Members of a training, and other checkpoints that were opened with the members.
_Split: TypeAlias = tuple[list[Checkpoint], list[LeftOut]]


@dataclass
class OpenedRun:
    """Opened checkpoints of a training, ordered and without repeats.

    Attributes:
        checkpoints: The checkpoints that could be opened.
        excluded: Paths that are no checkpoints of the training.
        notes: Remarks about the order, for the user.
        damaged: The checkpoints that could not be opened.
    """

    checkpoints: tuple[Checkpoint, ...]
    excluded: list[LeftOut]
    notes: list[str]
    damaged: tuple[Damaged, ...]


def open_members(
    paths: Sequence[Location], key: str | None, broken: Mapping[Location, RunError]
) -> OpenedRun:
    """Open the checkpoints of a training, sort by step, and drop repeats.

    Args:
        paths: The checkpoints.
        key: Dotted path of the entry that holds the weights; None to search for the entry.
        broken: Errors of paths that were found to hold no weights. Errors of other paths are
            ignored.

    Raises:
        CheckpointError: No checkpoint can be opened.
    """
    members: list[Checkpoint] = []
    excluded: list[LeftOut] = []
    errors: dict[Location, CkptavgError] = {p: broken[p] for p in paths if p in broken}
    for path in paths:
        if path in errors:
            continue
        try:
            members.append(open_checkpoint(path, key))
        except NoWeightsError as error:
            # The only path of a run was meant as a checkpoint. Among others it is passed over.
            if len(paths) == 1:
                raise
            contents = error.message.removeprefix(f"{path} ")
            excluded.append(LeftOut(path, Reason.NO_WEIGHTS, contents))
        except CheckpointError as error:
            errors[path] = error
    for split in (_split_averages, _split_refreshed, _split_repeats, _split_by_name):
        members, left_out = split(members)
        excluded += left_out
    if errors and not members:
        raise next(iter(errors.values()))
    ordered, notes = order_checkpoints(members)
    notes += _note_lone_best(ordered)
    return OpenedRun(ordered, excluded, notes, _order_damaged(errors, ordered))


def _order_damaged(
    errors: Mapping[Location, CkptavgError], ordered: Sequence[Checkpoint]
) -> tuple[Damaged, ...]:
    """Find the position of each damaged checkpoint by the step in the name."""
    if not errors:
        return ()
    paths = [*paths_of(ordered), *errors]
    labels = find_labels(paths)
    named = named_steps(paths)
    for path in paths:
        if is_alias_name(labels[path]):
            named[path] = NamedStep(None)
    return place_damaged(errors, ordered, named)


def _split_averages(checkpoints: Sequence[Checkpoint]) -> _Split:
    """Split off averages that ckptavg wrote, unless all checkpoints are averages."""
    members: list[Checkpoint] = []
    averages: list[LeftOut] = []
    for checkpoint in checkpoints:
        if checkpoint.is_average:
            averages.append(LeftOut(checkpoint.path, Reason.AVERAGE))
        else:
            members.append(checkpoint)
    # A run of averages alone is meant: the user averages averages.
    if not members:
        return list(checkpoints), []
    return members, averages


def _split_refreshed(checkpoints: Sequence[Checkpoint]) -> _Split:
    """Split off copies with recomputed statistics if the source is a member too."""
    by_name: dict[str, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        by_name[checkpoint.path.name].append(checkpoint)
    members: list[Checkpoint] = []
    excluded: list[LeftOut] = []
    for checkpoint in checkpoints:
        source = _find_source(checkpoint, by_name)
        if source is None or source is checkpoint:
            members.append(checkpoint)
        else:
            excluded.append(LeftOut(checkpoint.path, Reason.REFRESHED, source.path.name))
    return members, excluded


def _find_source(
    checkpoint: Checkpoint, by_name: Mapping[str, Sequence[Checkpoint]]
) -> Checkpoint | None:
    """Find the source of a copy with recomputed statistics by name and size.

    The directories of the source do not count, since a run may have moved.
    """
    provenance = checkpoint.provenance
    if provenance is None or provenance.is_average or not provenance.inputs:
        return None
    source = provenance.inputs[0]
    if source.path is None or source.size is None:
        return None
    candidates = by_name.get(last_part(source.path), [])
    # Of several checkpoints of one name, the source is not certain.
    if len(candidates) == 1 and candidates[0].size == source.size:
        return candidates[0]
    return None


def _split_repeats(checkpoints: Sequence[Checkpoint]) -> _Split:
    """Split off checkpoints that repeat another checkpoint.

    Two paths to the same files are repeats. Weights are compared only where a repeat is likely:
    where a name tells no step, or where two checkpoints record the same step (or epoch, without
    steps).

    Returns:
        The checkpoints without repeats, and the repeats.
    """
    aliases, labels = find_aliases(checkpoints), find_labels(paths_of(checkpoints))
    contents = Contents()
    members: list[Checkpoint] = []
    repeats: list[LeftOut] = []
    by_files: dict[object, Checkpoint] = {}
    by_weights = SameWeights(contents)
    by_moment: dict[object, SameWeights] = defaultdict(lambda: SameWeights(contents))

    def sort_key(checkpoint: Checkpoint) -> tuple[object, ...]:
        # Aliases and links come last, so that a numbered file is the original of its copies.
        path = checkpoint.path
        return path in aliases, path.is_symlink(), natural_key(labels[path])

    for checkpoint in sorted(checkpoints, key=sort_key):
        identity = tuple(stamp.identity for stamp in checkpoint.files)
        moment = _moment(checkpoint)
        likely = by_weights if checkpoint.path in aliases else by_moment[moment]
        original = by_files.get(identity) or likely.find(checkpoint)
        if original is not None:
            repeats.append(LeftOut(checkpoint.path, Reason.REPEATS, original.path.name))
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
    if epoch is not None:
        return "epoch", epoch
    return None


def _split_by_name(checkpoints: Sequence[Checkpoint]) -> _Split:
    """Split off checkpoints that are no step of the training, by name.

    If fewer than two members would be left, all checkpoints are members: the words in the names
    then belong to the run itself.
    """
    members: list[Checkpoint] = []
    excluded: list[LeftOut] = []
    for checkpoint in checkpoints:
        reason = why_no_step(stem_of(checkpoint.path))
        if reason is None:
            members.append(checkpoint)
        else:
            excluded.append(LeftOut(checkpoint.path, reason))
    if len(members) < 2:
        return list(checkpoints), []
    return members, excluded


def _note_lone_best(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Note a best checkpoint that repeats no numbered checkpoint of a run.

    Such a checkpoint may be far older than the numbered checkpoints, if training has deleted older
    ones.
    """
    paths = paths_of(checkpoints)
    best = [path.name for path in paths if is_best_name(path)]
    if len(best) != 1 or all(map(is_alias_name, paths)):
        return []
    return [f"{best[0]} repeats no other checkpoint, and counts as one of its own"]
