"""What is scored: checkpoints, averages and ensembles."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import nn

from ckptavg.averaging.accounts import Weights, account_of
from ckptavg.averaging.plan import Average, plan_average
from ckptavg.errors import UsageError, short
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.names import batchnorm_layers
from ckptavg.formats.state_dict import bare_names
from ckptavg.models.load import undistributed
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.run import Run, RunLike

log = logging.getLogger("ckptavg")
_STALE = ("stale", "partly recomputed")


@dataclass(frozen=True)
class Candidate:
    """What is scored.

    Made by ``of_checkpoint``, ``of_weights``, ``of_average`` or ``of_ensemble``.

    Attributes:
        name: Stands in the table.
        kind: ``checkpoint``, ``average`` or ``ensemble``.
        checkpoints: What it is made of.
        coefficients: One per checkpoint.
        recompute: True if its BatchNorm statistics are recomputed before it is scored; None if they
            are where they are stale and there is training data.
        average: How it comes about, for an average.
        last: True for the last checkpoint of the run, which an average is measured against.
        weights: What is scored, for weights in memory.
    """

    name: str
    kind: str
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    coefficients: tuple[float, ...]
    recompute: bool | None = False
    average: Average | None = field(default=None, repr=False)
    last: bool = False
    weights: Weights | None = field(default=None, repr=False)

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """How ckptavg made the checkpoint or the weights, if it did and that is known."""
        if self.weights is not None:
            return self.weights.made
        return self.checkpoints[0].provenance if self.kind == "checkpoint" else None

    @property
    def is_stale(self) -> bool:
        """True for a checkpoint or weights whose account says so of their statistics."""
        made = self.provenance
        return made is not None and made.get("bn") in _STALE

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        name: str | None = None,
        *,
        last: bool = False,
        recompute: bool | None = None,
    ) -> Candidate:
        """A checkpoint.

        Args:
            checkpoint: It, or its path.
            name: Stands in the table; the file's own where None.
            last: True if it is what an average is measured against.
            recompute: True to recompute its statistics, False to leave them; None to recompute
                them where they are stale and there is training data.
        """
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        name = name or opened.path.name
        return cls(name, "checkpoint", (opened,), (1.0,), recompute, last=last)

    @classmethod
    def of_weights(
        cls,
        weights: nn.Module | Mapping[str, torch.Tensor],
        name: str | None = None,
        *,
        recompute: bool | None = None,
    ) -> Candidate:
        """Weights in memory, as they are when they are scored.

        Args:
            weights: A state dict, or a module, whose state dict counts.
            name: Stands in the table; of a module its class's where None.
            recompute: As for ``of_checkpoint``. What ``average`` returned knows that it is stale.
        """
        if isinstance(weights, nn.Module):
            name = name or type(undistributed(weights)).__name__
            weights = weights.state_dict()
        given = {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
        bare = bare_names(list(given))
        tensors = {bare.get(key, key): value for key, value in given.items()}
        held = Weights(tensors, account_of(weights))
        return cls(name or _name_of(held), "checkpoint", (), (), recompute, weights=held)

    @classmethod
    def of_average(
        cls,
        run: Average | RunLike,
        name: str | None = None,
        *,
        scheme: str = "uniform",
        weights: Sequence[float] | None = None,
        recompute: bool = False,
    ) -> Candidate:
        """An average, with its statistics as averaged or recomputed; nothing is written.

        Args:
            run: A run, or a selection of one, or its path; or an average that is planned.
            name: Stands in the table; the number of checkpoints and the scheme where None.
            scheme: As for ``ckptavg.average``.
            weights: As for ``ckptavg.average``.
            recompute: Whether its statistics are recomputed, from the training data.
        """
        planned = run if isinstance(run, Average) else plan_average(run, scheme, weights=weights)
        plan = planned.plan
        name = name or _average_name(len(plan.checkpoints), planned.scheme.text)
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
    found = []
    for checkpoint, name in zip(singles, names, strict=True):
        found.append(Candidate.of_checkpoint(checkpoint, name, recompute=False))
    name = f"{last_name} (last)"
    found.append(Candidate.of_checkpoint(last, name, last=True, recompute=False))
    if recompute and planned.batchnorm in ("none", "frozen"):
        why = "no BatchNorm layers" if planned.batchnorm == "none" else "all BatchNorm is frozen"
        log.info("%s: nothing to recompute from the training data", why)
    text = _average_name(len(selection), planned.scheme.text)
    for name, average in {text: planned, **(others or {})}.items():
        refreshed = recompute and average.batchnorm in ("own", "stale")
        if stale or not refreshed:
            found.append(Candidate.of_average(average, name, recompute=False))
        if refreshed:
            found.append(Candidate.of_average(average, name, recompute=True))
    if ensemble:
        found.append(Candidate.of_ensemble(selection, f"FGE ensemble of {len(selection)}"))
    return found


def candidates_of_file(
    checkpoint: Checkpoint, name: str, *, recompute: bool = False, stale: bool = True
) -> list[Candidate]:
    """The candidates that a single checkpoint makes: two, where stale statistics are recomputed.

    Args:
        checkpoint: It.
        name: Of both.
        recompute: Add it with recomputed statistics if its own are stale.
        stale: Add it with its own, too, where they are.
    """
    own = Candidate.of_checkpoint(checkpoint, name, recompute=False)
    if not (recompute and own.is_stale):
        return [own]
    refreshed = replace(own, recompute=True)
    return [own, refreshed] if stale else [refreshed]


CandidateLike: TypeAlias = (
    "Candidate | Checkpoint | str | os.PathLike[str] | nn.Module | Mapping[str, torch.Tensor]"
)
"""What can be scored: a candidate, or a checkpoint, its path, a module or a state dict."""


def as_candidates(
    given: Iterable[CandidateLike] | Mapping[str, CandidateLike], *, has_training: bool
) -> list[Candidate]:
    """Make candidates of whatever people pass to be scored.

    Args:
        given: In the table's order, perhaps by the names that they are to have there.
        has_training: True if there is data that stale statistics are recomputed from.

    Raises:
        UsageError: Something cannot be scored.
    """
    if isinstance(given, (str, os.PathLike, nn.Module, Candidate, Checkpoint)):
        given = [given]
    named = isinstance(given, Mapping)
    pairs = given.items() if isinstance(given, Mapping) else ((None, one) for one in given)
    candidates = [_as_candidate(one, name) for name, one in pairs]
    if not named:
        candidates = _told_apart(candidates)
    return [
        replace(c, recompute=True) if c.recompute is None and has_training and c.is_stale else c
        for c in candidates
    ]


def _as_candidate(given: CandidateLike, name: str | None) -> Candidate:
    if isinstance(given, Candidate):
        return given if name is None else replace(given, name=name)
    if isinstance(given, (Checkpoint, str, os.PathLike)):
        return Candidate.of_checkpoint(given, name)
    if isinstance(given, nn.Module) or (isinstance(given, Mapping) and _holds_tensors(given)):
        return Candidate.of_weights(given, name)
    raise UsageError(
        "what is scored is expected to be a checkpoint, its path, a module, a state dict or a "
        f"Candidate but is {short(given)}",
        "Candidate.of_average and Candidate.of_ensemble take a run.",
    )


def _holds_tensors(given: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in given.values())


def _told_apart(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Number the weights in memory whose names are the same."""
    names = Counter(c.name for c in candidates if c.weights is not None)
    seen: Counter[str] = Counter()
    numbered = []
    for candidate in candidates:
        name = candidate.name
        if candidate.weights is not None and names[name] > 1:
            seen[name] += 1
            name = f"{name} {seen[name]}"
        numbered.append(candidate if name == candidate.name else replace(candidate, name=name))
    return numbered


def _average_name(count: int, scheme: str) -> str:
    return f"average of {count} ({scheme})"


def _name_of(weights: Weights) -> str:
    """A name for a state dict: what its account tells, if it carries one."""
    made = weights.made
    if made is None:
        return "state dict"
    return _average_name(len(made["checkpoints"]), str(made["scheme"]))


def layers_of(candidates: Iterable[Candidate]) -> list[str]:
    """List the layers of all candidates that keep running statistics."""
    tables: dict[int, Mapping[str, Any]] = {}
    for candidate in candidates:
        tables |= {id(c): c.tensors for c in candidate.checkpoints}
        if candidate.weights is not None:
            tables[id(candidate.weights)] = candidate.weights.tensors
    return list(dict.fromkeys(layer for t in tables.values() for layer in batchnorm_layers(t)))


def reference_of(candidates: Sequence[Candidate]) -> Candidate:
    """What the others are compared with: the last checkpoint of the run, or the first given."""
    return next((c for c in candidates if c.last), candidates[0])
