"""What is scored: checkpoints, averages and ensembles."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptavg.averaging import Average
from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.run import Run
from ckptavg.runs.numbered import short_names

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Candidate:
    """What is scored. Made by ``of_checkpoint``, ``of_average`` or ``of_ensemble``.

    Attributes:
        name: Stands in the table.
        kind: ``checkpoint``, ``average`` or ``ensemble``.
        checkpoints: What it is made of.
        coefficients: One a checkpoint.
        recompute: Whether its BatchNorm statistics are recomputed before it is scored.
        average: How it comes about, for an average.
        last: Whether it is the last checkpoint of the run, which an average is measured against.
    """

    name: str
    kind: str
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    coefficients: tuple[float, ...]
    recompute: bool = False
    average: Average | None = field(default=None, repr=False)
    last: bool = False

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        name: str | None = None,
        *,
        last: bool = False,
    ) -> Candidate:
        """A checkpoint as it is; ``last`` if it is what an average is measured against."""
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        return cls(name or opened.path.name, "checkpoint", (opened,), (1.0,), last=last)

    @classmethod
    def of_average(cls, planned: Average, name: str, *, recompute: bool) -> Candidate:
        """A planned average, with its statistics as averaged or recomputed."""
        plan = planned.plan
        return cls(name, "average", plan.checkpoints, plan.coefficients, recompute, planned)

    @classmethod
    def of_ensemble(
        cls, checkpoints: Run | Iterable[Checkpoint], name: str = "FGE ensemble"
    ) -> Candidate:
        """The mean of the checkpoints' softmax outputs, each with its own statistics."""
        members = tuple(checkpoints)
        if not members:
            raise UsageError("an ensemble needs at least one checkpoint")
        return cls(name, "ensemble", members, tuple(1 / len(members) for _ in members))


def candidates_of(
    run: Run,
    selection: Run,
    planned: Average,
    *,
    each: bool = False,
    ensemble: bool = False,
    recompute: bool = False,
    stale: bool = True,
    others: Mapping[str, Average] | None = None,
) -> list[Candidate]:
    """The candidates that tell what averaging a run is worth.

    Args:
        run: All of the run, whose last checkpoint is what one would use otherwise.
        selection: What is averaged.
        planned: The selection's average.
        each: Add every selected checkpoint.
        ensemble: Add the output ensemble of the selection.
        recompute: Add the averages with recomputed statistics.
        stale: Add those with their statistics as averaged, too, where they can be recomputed.
        others: Further averages, by their names.
    """
    last = run.last(1).checkpoints[-1]
    singles = [c for c in selection if each and c.path != last.path]
    *names, last_name = short_names([c.path for c in (*singles, last)])
    found = [Candidate.of_checkpoint(c, name) for c, name in zip(singles, names, strict=True)]
    found.append(Candidate.of_checkpoint(last, f"{last_name} (last)", last=True))
    if recompute and planned.batchnorm in ("none", "frozen"):
        why = "no BatchNorm layers" if planned.batchnorm == "none" else "all BatchNorm is frozen"
        log.info("%s: nothing to recompute from the training data", why)
    text = f"average of {len(selection)} ({planned.scheme.text})"
    for name, average in {text: planned, **(others or {})}.items():
        refreshed = recompute and average.batchnorm in ("own", "stale")
        if stale or not refreshed:
            found.append(Candidate.of_average(average, name, recompute=False))
        if refreshed:
            found.append(Candidate.of_average(average, name, recompute=True))
    if ensemble:
        found.append(Candidate.of_ensemble(selection, f"FGE ensemble of {len(selection)}"))
    return found


def reference_of(candidates: Sequence[Candidate]) -> Candidate:
    """What the others are compared with: the last checkpoint of the run, or the first given."""
    return next((c for c in candidates if c.last), candidates[0])
