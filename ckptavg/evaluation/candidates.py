"""Candidates for scoring: checkpoints, averages, ensembles and weights in memory."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from ckptavg.averaging.plan import Average, plan_average
from ckptavg.averaging.swag.sampling import plan_samples
from ckptavg.averaging.swag.specification import Swag
from ckptavg.averaging.weights import Weights, provenance_of
from ckptavg.errors import UsageError, short
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.running_statistics import State
from ckptavg.formats.statistics_names import batchnorm_layers
from ckptavg.formats.wrappers import bare_names
from ckptavg.models.load import unwrap_distributed
from ckptavg.models.perturbation import Perturbation
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.run import Run, RunLike

log = logging.getLogger("ckptavg")
Kind = Literal["checkpoint", "average", "ensemble"]
_STALE: tuple[State, ...] = ("stale", "partly recomputed")


@dataclass(frozen=True)
class Candidate:
    """Checkpoint, average or ensemble to score.

    Made by ``of_checkpoint``, ``of_weights``, ``of_average``, ``of_ensemble`` or ``of_swag``.

    Attributes:
        name: Name in the table.
        kind: ``checkpoint``, ``average`` or ``ensemble``.
        checkpoints: The source checkpoints; empty for weights in memory.
        coefficients: One per checkpoint; for SWAG those of the mean.
        recompute: True to recompute the BatchNorm statistics before scoring. None to recompute them
            if they are stale and there is training data.
        average: The planned average, if the kind is ``average``.
        last: True for the last checkpoint of the run, the reference of an average.
        weights: The weights, for weights in memory.
        perturbation: Step away from the weights of a checkpoint or an average; None for none.
        swag: Options of SWAG, for an ensemble of samples.
        samples: The planned samples of SWAG.
    """

    name: str
    kind: Kind
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    coefficients: tuple[float, ...]
    recompute: bool | None = False
    average: Average | None = field(default=None, repr=False)
    last: bool = False
    weights: Weights | None = field(default=None, repr=False)
    perturbation: Perturbation | None = None
    swag: Swag | None = None
    samples: tuple[Average, ...] = field(default=(), repr=False)

    @property
    def planned(self) -> tuple[Average, ...]:
        """Planned averages whose weights are scored: the average, or the samples of SWAG."""
        if self.average is not None:
            return (self.average,)
        return self.samples

    @property
    def members(self) -> int:
        """Number of weight sets whose outputs are averaged; 1 but for an ensemble."""
        if self.kind != "ensemble":
            return 1
        return len(self.samples or self.checkpoints)

    @property
    def provenance(self) -> Provenance | None:
        """Record of how ckptavg made the checkpoint or weights; None where unknown."""
        if self.weights is not None:
            return self.weights.provenance
        if self.kind == "checkpoint":
            return self.checkpoints[0].provenance
        return None

    @property
    def is_stale(self) -> bool:
        """True for a checkpoint or weights with BatchNorm statistics recorded as stale."""
        provenance = self.provenance
        return provenance is not None and provenance.bn in _STALE

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        name: str | None = None,
        *,
        last: bool = False,
        recompute: bool | None = None,
    ) -> Candidate:
        """Create the candidate of a checkpoint.

        Args:
            checkpoint: The checkpoint, or a path.
            name: Name in the table; the file name where None.
            last: True for the reference of an average.
            recompute: True to recompute the BatchNorm statistics, False to keep them. None to
                recompute them if they are stale and there is training data.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        name = name or checkpoint.path.name
        return cls(name, "checkpoint", (checkpoint,), (1.0,), recompute, last=last)

    @classmethod
    def of_weights(
        cls,
        weights: nn.Module | Mapping[str, torch.Tensor],
        name: str | None = None,
        *,
        recompute: bool | None = None,
    ) -> Candidate:
        """Create the candidate of weights in memory, with their values at the time of scoring.

        Args:
            weights: A state dict, or a module, whose state dict is used.
            name: Name in the table. Where None, the class of a module, or the scheme that a
                state dict's provenance records.
            recompute: As for ``of_checkpoint``. The return value of ``average`` carries a
                provenance that records stale statistics.
        """
        if isinstance(weights, nn.Module):
            name = name or type(unwrap_distributed(weights)).__name__
            weights = weights.state_dict()
        stored = {key: value for key, value in weights.items() if isinstance(value, torch.Tensor)}
        # Wrappers, such as DistributedDataParallel, put a prefix before every name.
        bare = bare_names(list(stored))
        tensors = {bare.get(key, key): value for key, value in stored.items()}
        state = Weights(tensors, provenance_of(weights))
        return cls(name or _name_of(state), "checkpoint", (), (), recompute, weights=state)

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
        """Create the candidate of an average, which is never written to a file.

        Args:
            run: A run, a selection of a run, or a path; or a planned average.
            name: Name in the table; the number of checkpoints and the scheme where None.
            scheme: As for ``ckptavg.average``.
            weights: As for ``ckptavg.average``.
            recompute: True to recompute the BatchNorm statistics from the training data, False to
                keep them as averaged.
        """
        if not isinstance(run, Average):
            run = plan_average(run, scheme, weights=weights)
        plan = run.plan
        name = name or _average_name(len(plan.checkpoints), run.scheme.text)
        return cls(name, "average", plan.checkpoints, plan.coefficients, recompute, run)

    @classmethod
    def of_ensemble(
        cls, checkpoints: Run | Iterable[Checkpoint], name: str = "FGE ensemble"
    ) -> Candidate:
        """Create the candidate that averages the outputs of checkpoints.

        Every checkpoint keeps its own BatchNorm statistics.

        Raises:
            UsageError: There are no checkpoints.
        """
        members = tuple(checkpoints)
        if not members:
            raise UsageError("an ensemble needs at least one checkpoint")
        coefficients = (1 / len(members),) * len(members)
        return cls(name, "ensemble", members, coefficients)

    @classmethod
    def of_swag(
        cls,
        run: Average | RunLike,
        name: str | None = None,
        *,
        samples: int = 20,
        rank: int = 10,
        scale: float | None = None,
        seed: int = 0,
    ) -> Candidate:
        """Create the candidate that averages the outputs of weights sampled from SWAG.

        SWAG is a Gaussian that is fitted to the checkpoints, with a diagonal and a low-rank part of
        the covariance; see ``ckptavg.averaging.swag.specification.Swag``. The samples of a seed are
        the same, however many there are. BatchNorm statistics are recomputed for each sample from
        training data, which a network with BatchNorm needs.

        Args:
            run: A run, a selection of a run, or a path; or its planned uniform average.
            name: Name in the table; the number of samples where None.
            samples: Number of samples.
            rank: Number of the last checkpoints whose deviations make up the low-rank part; 0 for
                the diagonal alone.
            scale: Factor of the covariance. None for 0.5, as in the paper; 1 where the rank is 0.
            seed: Seed of the samples.

        Raises:
            UsageError: An option has a value that cannot be meant.
            RunError: There are fewer than two checkpoints.
        """
        swag = Swag(samples, rank, scale, seed)
        if not isinstance(run, Average):
            run = plan_average(run)
        plan = run.plan
        planned = plan_samples(run, swag)
        count = len(plan.checkpoints)
        if swag.columns(count) < rank:
            log.info(
                "swag: rank %d with %d checkpoints: the low-rank part has %d columns",
                rank, count, swag.columns(count),
            )  # fmt: skip
        return cls(
            name or swag.title, "ensemble", plan.checkpoints, plan.coefficients,
            recompute=run.batchnorm == "stale", swag=swag, samples=planned,
        )  # fmt: skip


def candidates_of(
    run: Run,
    selection: Run,
    planned: Average,
    *,
    each: bool = False,
    ensemble: bool = False,
    sampled: Iterable[Candidate] = (),
    recompute: bool = False,
    stale: bool = True,
    further: Mapping[str, Average] | None = None,
) -> list[Candidate]:
    """List the candidates for comparing averages of a run with the last checkpoint.

    Args:
        run: The whole run; the last checkpoint is the reference.
        selection: The checkpoints to average.
        planned: The average of the selection.
        each: True to add every selected checkpoint.
        ensemble: True to add the output ensemble of the selection.
        sampled: Ensembles of samples to add.
        recompute: True to add averages with recomputed BatchNorm statistics.
        stale: True to keep averages with statistics as averaged where recomputed ones are added.
        further: Further averages by name.
    """
    last = run.last(1).checkpoints[-1]
    singles = []
    if each:
        # The last checkpoint is listed once, as the reference.
        singles = [checkpoint for checkpoint in selection if checkpoint.path != last.path]
    # Shortened together, so that names stay different from each other.
    *names, last_name = short_names([checkpoint.path for checkpoint in (*singles, last)])
    candidates = []
    for checkpoint, name in zip(singles, names, strict=True):
        candidates.append(Candidate.of_checkpoint(checkpoint, name, recompute=False))
    name = f"{last_name} (last)"
    candidates.append(Candidate.of_checkpoint(last, name, last=True, recompute=False))
    if recompute and planned.batchnorm == "none":
        log.info("no BatchNorm layers: nothing to recompute from the training data")
    elif recompute and planned.batchnorm == "frozen":
        log.info("all BatchNorm is frozen: nothing to recompute from the training data")
    averages = {_average_name(len(selection), planned.scheme.text): planned, **(further or {})}
    for name, average in averages.items():
        refreshed = recompute and average.batchnorm in ("own", "stale")
        if stale or not refreshed:
            candidates.append(Candidate.of_average(average, name, recompute=False))
        if refreshed:
            candidates.append(Candidate.of_average(average, name, recompute=True))
    if ensemble:
        candidates.append(Candidate.of_ensemble(selection, f"FGE ensemble of {len(selection)}"))
    return [*candidates, *sampled]


def candidates_of_file(
    checkpoint: Checkpoint, name: str, *, recompute: bool = False, stale: bool = True
) -> list[Candidate]:
    """List the candidates of a single checkpoint: as stored, and with recomputed statistics.

    Args:
        checkpoint: The checkpoint.
        name: Name of both candidates in the table.
        recompute: True to add the candidate with recomputed statistics if the stored ones are
            stale.
        stale: True to keep the candidate with stale statistics beside the recomputed one.
    """
    stored = Candidate.of_checkpoint(checkpoint, name, recompute=False)
    if not (recompute and stored.is_stale):
        return [stored]
    refreshed = replace(stored, recompute=True)
    if stale:
        return [stored, refreshed]
    return [refreshed]


CandidateLike: TypeAlias = (
    "Candidate | Checkpoint | str | os.PathLike[str] | nn.Module | Mapping[str, torch.Tensor]"
)
"""Anything that can be scored: a candidate, a checkpoint, a path, a module or a state dict."""


def as_candidates(
    values: Iterable[CandidateLike] | Mapping[str, CandidateLike], *, has_training: bool
) -> list[Candidate]:
    """Convert a caller's arguments to candidates.

    Args:
        values: The values in the table's order; a mapping gives names for the table.
        has_training: True if there is training data to recompute stale statistics from.

    Raises:
        UsageError: A value cannot be scored.
    """
    # A text and some modules are iterable themselves, so a single value is wrapped first.
    if isinstance(values, (str, os.PathLike, nn.Module, Candidate, Checkpoint)):
        values = [values]
    candidates = []
    if isinstance(values, Mapping):
        # Names from a mapping are the caller's own and stay.
        for name, value in values.items():
            candidates.append(_as_candidate(value, name))
    else:
        candidates = _number_names([_as_candidate(value, None) for value in values])
    for i, candidate in enumerate(candidates):
        if candidate.recompute is None and has_training and candidate.is_stale:
            candidates[i] = replace(candidate, recompute=True)
    return candidates


def _as_candidate(value: CandidateLike, name: str | None) -> Candidate:
    if isinstance(value, Candidate):
        if name is None:
            return value
        return replace(value, name=name)
    if isinstance(value, (Checkpoint, str, os.PathLike)):
        return Candidate.of_checkpoint(value, name)
    if isinstance(value, nn.Module) or (isinstance(value, Mapping) and _holds_tensors(value)):
        return Candidate.of_weights(value, name)
    raise UsageError(
        "a candidate is expected to be a checkpoint, its path, a module, a state dict or a "
        f"Candidate but is {short(value)}",
        "Candidate.of_average and Candidate.of_ensemble take a run.",
    )


def _holds_tensors(entries: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in entries.values())


def _number_names(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Number the weights in memory whose names are the same."""
    names = Counter(c.name for c in candidates if c.weights is not None)
    numbers: Counter[str] = Counter()
    numbered = []
    for candidate in candidates:
        name = candidate.name
        if candidate.weights is not None and names[name] > 1:
            numbers[name] += 1
            candidate = replace(candidate, name=f"{name} {numbers[name]}")  # noqa: PLW2901
        numbered.append(candidate)
    return numbered


def _average_name(count: int, scheme: str) -> str:
    return f"average of {count} ({scheme})"


def _name_of(weights: Weights) -> str:
    """Name a state dict by its provenance from ``average``; "state dict" without a provenance."""
    provenance = weights.provenance
    if provenance is None:
        return "state dict"
    return _average_name(len(provenance.inputs), str(provenance.scheme))


def layers_of(candidates: Iterable[Candidate]) -> list[str]:
    """List the layers of all candidates that keep running statistics."""
    # Each source is looked at once, although many candidates may share it.
    tables: dict[int, Mapping[str, Any]] = {}
    for candidate in candidates:
        for checkpoint in candidate.checkpoints:
            tables[id(checkpoint)] = checkpoint.tensors
        if candidate.weights is not None:
            tables[id(candidate.weights)] = candidate.weights.tensors
    # A dict for the order of first appearance.
    layers: dict[str, None] = {}
    for tensors in tables.values():
        layers |= dict.fromkeys(batchnorm_layers(tensors))
    return list(layers)


def baseline_of(candidates: Sequence[Candidate]) -> Candidate:
    """Return the baseline of comparisons: the last checkpoint of the run, or the first candidate.

    Raises:
        UsageError: There are no candidates.
    """
    if not candidates:
        raise UsageError("there is nothing to evaluate")
    for candidate in candidates:
        if candidate.last:
            return candidate
    return candidates[0]
