"""Opening of the checkpoints of a training, with repeats removed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.errors import CheckpointError, CkptavgError, NoWeightsError, RunError
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.training_record import last_part
from ckptavg.io.paths import Location
from ckptavg.runs.damaged import Damaged, place_damaged
from ckptavg.runs.discovery.file_names import (
    is_alias_name,
    is_best_name,
    natural,
    stem_of,
    why_no_step,
)
from ckptavg.runs.discovery.numbered import labels_of
from ckptavg.runs.discovery.reason import LeftOut, Reason
from ckptavg.runs.discovery.steps_in_names import NamedStep
from ckptavg.runs.duplicates import Contents, SameWeights
from ckptavg.runs.order import find_aliases, named_steps, order_checkpoints


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
    opened: list[Checkpoint] = []
    excluded: list[LeftOut] = []
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
            what = error.message.removeprefix(f"{path} ")
            excluded.append(LeftOut(path, Reason.NO_WEIGHTS, what))
        except CheckpointError as error:
            errors[path] = error
    averages = [c for c in opened if c.is_average]
    # A run of averages alone is meant: the user averages averages.
    if len(averages) < len(opened):
        excluded += [LeftOut(c.path, Reason.AVERAGE) for c in averages]
        opened = [c for c in opened if not c.is_average]
    opened, refreshed = _split_refreshed(opened)
    excluded += refreshed
    members, repeats = _split_repeats(opened)
    excluded += repeats
    members, misnamed = _split_by_name(members)
    excluded += misnamed
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
    paths = [*(c.path for c in ordered), *errors]
    labels = labels_of(paths)
    named = {
        path: NamedStep(None) if is_alias_name(labels[path]) else step
        for path, step in named_steps(paths).items()
    }
    return place_damaged(errors, ordered, named)


def _split_refreshed(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off copies with recomputed statistics if the source is a member too."""
    names = Counter(c.path.name for c in checkpoints)
    by_name = {(c.path.name, c.size): c for c in checkpoints if names[c.path.name] == 1}
    members: list[Checkpoint] = []
    excluded: list[LeftOut] = []
    for checkpoint in checkpoints:
        source = by_name.get(_source_of(checkpoint) or ("", 0))
        if source is None or source is checkpoint:
            members.append(checkpoint)
        else:
            excluded.append(LeftOut(checkpoint.path, Reason.REFRESHED, source.path.name))
    return members, excluded


def _source_of(checkpoint: Checkpoint) -> tuple[str, int] | None:
    """Return name and size in bytes of the source of a copy with recomputed statistics.

    The directories of the source do not count, since a run may have moved.
    """
    provenance = checkpoint.provenance
    if provenance is None or provenance.is_average or not provenance.inputs:
        return None
    source = provenance.inputs[0]
    if source.path is None or source.size is None:
        return None
    return last_part(source.path), source.size


def _split_repeats(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
    """Split off checkpoints that repeat another checkpoint.

    Two paths to the same files are repeats. Weights are compared only where a repeat is likely:
    where a name tells no step, or where two checkpoints record the same step (or epoch, without
    steps).

    Returns:
        The checkpoints without repeats, and the repeats.
    """
    aliases, labels = find_aliases(checkpoints), labels_of([c.path for c in checkpoints])
    contents = Contents()
    members: list[Checkpoint] = []
    repeats: list[LeftOut] = []
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
    return None if epoch is None else ("epoch", epoch)


def _split_by_name(
    checkpoints: Sequence[Checkpoint],
) -> tuple[list[Checkpoint], list[LeftOut]]:
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
    best = [checkpoint.path.name for checkpoint in checkpoints if is_best_name(checkpoint.path)]
    numbered = [checkpoint for checkpoint in checkpoints if not is_alias_name(checkpoint.path)]
    if len(best) != 1 or not numbered:
        return []
    return [f"{best[0]} repeats no other checkpoint, and counts as one of its own"]
