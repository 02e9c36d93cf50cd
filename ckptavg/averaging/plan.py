"""Planned averages: checked, and not yet computed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ckptavg.averaging import schemes
from ckptavg.averaging.grafting.graft import graft
from ckptavg.averaging.lora import exact_mean
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan
from ckptavg.averaging.schemes import RunRecord, Scheme
from ckptavg.errors import CheckpointError, UsageError, short
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.running_statistics import State, Statistics
from ckptavg.formats.statistics_names import batchnorm_layers
from ckptavg.io.paths import Location
from ckptavg.outputs.provenance import build_provenance
from ckptavg.runs.discovery.ranks import refuse_parts
from ckptavg.runs.given_order import list_as_given
from ckptavg.runs.order import refuse_two_series
from ckptavg.runs.run import RunLike, as_run

_NEGATIVE_VARIANCES = (
    "coefficients below 0 can make averaged running variances negative: recompute them"
)


@dataclass(frozen=True)
class Average:
    """An average that is planned and not yet computed.

    Attributes:
        plan: Sources, coefficients and type of each tensor.
        scheme: The scheme that gave the coefficients.
        members: Paths of all checkpoints of the average's runs, selected or not. An output must
            not replace these checkpoints, except averages.
    """

    plan: Plan
    scheme: Scheme
    members: tuple[Location, ...] = ()

    @property
    def batchnorm(self) -> State:
        """State of the running statistics: ``none``, ``own``, ``frozen`` or ``stale``."""
        return self.statistics.state

    @cached_property
    def statistics(self) -> Statistics:
        """State of the running statistics in the average."""
        layers = batchnorm_layers(tensor.name for tensor in self.plan.tensors)
        frozen = self.plan.frozen
        # Integers are never averaged, so that they say nothing about the origin of the weights.
        floats = [t for t in self.plan.tensors if t.dtype.kind != "int"]
        owners: set[Location] = set()
        for tensor in floats:
            owners.update(owner.path for owner in tensor.owners)
        state: State = "stale"
        if not layers:
            state = "none"
        # All floats are from a single checkpoint, whose statistics belong to its weights.
        elif len(owners) == 1:
            state = "own"
        elif len(frozen) == len(layers):
            state = "frozen"
        return Statistics(state, layers, frozen)

    def for_recomputing(self) -> Average:
        """Return the same average without the note that its statistics should be recomputed."""
        notes = tuple(note for note in self.plan.notes if note is not _NEGATIVE_VARIANCES)
        return replace(self, plan=replace(self.plan, notes=notes))

    def provenance(self) -> Provenance:
        """Record the origin of the average."""
        return build_provenance(
            self.scheme.text,
            self.plan.checkpoints,
            self.plan.coefficients,
            self.statistics,
            self.plan.ties,
            self.plan.base,
        )


Planned = tuple[Average, str | os.PathLike[str]]
"""An average and the path of its output."""


def plan_average(
    run: RunLike,
    scheme: str = "uniform",
    *,
    weights: Sequence[float] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep",
) -> Average:
    """Plan an average, and check that the run can be averaged.

    Only a few elements are read. ``grafting`` reads more, since it measures two networks.

    Args:
        run: The result of ``open_run``, or a selection of it; or the path of a run.
        scheme: ``NAME[:key=value,...]``; the full help of ``average`` lists the names.
        weights: One number per checkpoint instead of a scheme. The numbers are normalized.
        include: Shell patterns of tensor names to average; all where empty.
        exclude: Shell patterns of tensor names not to average.
        base: The checkpoint that all other tensors come from; the last one where None.
        dtype: Type of the output's floats, or ``keep``.

    Raises:
        UsageError: An argument has an unknown value, or a scheme and weights are both given.
        MismatchError: The checkpoints do not hold the same tensors.
        UnsupportedTensorError: A tensor has no meaningful average.
        CkptavgError: Another error.
    """
    run = as_run(run)
    if weights is not None and scheme != "uniform":
        raise UsageError("a scheme and weights exclude each other: give one of them")
    chosen = schemes.parse(scheme) if weights is None else schemes.from_weights(weights)
    # Checkpoints that the user named one by one are taken as they are.
    for training in () if run.named else run.trainings:
        # Post-hoc EMA needs the snapshots of several EMAs per step, which look like two series.
        if not chosen.takes_series:
            refuse_two_series(training)
        refuse_parts(training)
    checkpoints = run.checkpoints
    record = RunRecord.of_run(run)
    coefficients = chosen.coefficients(record)
    if chosen.grafting is not None:
        # Networks of several trainings: steps and names say nothing about their order.
        checkpoints = tuple(list_as_given(run))
    if base is not None and not isinstance(base, Checkpoint):
        base = _open_base(base, checkpoints[-1].key)
    rules = Rules(_patterns(include), _patterns(exclude), base, dtype)
    plan = exact_mean.plan_mean(checkpoints, coefficients, rules)
    if chosen.grafting is not None:
        plan = graft(plan, chosen.grafting)
    if note := chosen.note(coefficients, record):
        plan = replace(plan, notes=(note, *plan.notes))
    average = Average(plan, chosen, run.members)
    if min(coefficients) < 0 and average.batchnorm == "stale":
        average = replace(average, plan=replace(plan, notes=(*plan.notes, _NEGATIVE_VARIANCES)))
    return average


def reweigh(average: Average, weights: Sequence[float]) -> Average:
    """Plan an average like another one, with other weights, without looking at files again.

    Args:
        average: An average by weights of models, of more than one checkpoint.
        weights: One per checkpoint with a positive sum; 0 where the average has 0, and only there.

    Returns:
        The average, without notes.
    """
    used = tuple(float(weight) for weight in weights if weight)
    tensors: list[TensorPlan] = []
    for tensor in average.plan.tensors:
        # Tensors of a single source are copied, whatever the weights.
        if tensor.averaged and len(tensor.sources) == len(used):
            tensors.append(replace(tensor, coefficients=used))
        else:
            tensors.append(tensor)
    plan = replace(
        average.plan,
        coefficients=tuple(schemes.normalize(weights)),
        tensors=tuple(tensors),
        notes=(),
    )
    return replace(average, plan=plan, scheme=schemes.from_weights(weights))


def _open_base(path: str | os.PathLike[str], key: str) -> Checkpoint:
    """Open a base checkpoint at the run's weights entry, else at the base's own weights entry."""
    try:
        return open_checkpoint(path, key or None)
    except CheckpointError:
        # A base may be a bare state dict, although the run's checkpoints have an entry of weights.
        if not key:
            raise
        return open_checkpoint(path)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    # A text is a sequence too: each letter would be a pattern.
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Iterable) or not all(isinstance(item, str) for item in given):
        raise UsageError(
            f"shell patterns of tensor names are expected but got {short(repr(given))}"
        )
    return tuple(given)
