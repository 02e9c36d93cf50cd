"""Groups of tensors that share reads, so that several averages need each input byte only once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.outputs.sinks import Sink


@dataclass(frozen=True)
class Job:
    """An output of a stream.

    Attributes:
        tensors: The tensors to compute. Tied tensors are computed once, under the first name.
        sink: Receives the blocks, from several threads and in any order.
        keep_nonfinite: Write an average that is not finite as it is.
    """

    tensors: Sequence[TensorPlan]
    sink: Sink
    keep_nonfinite: bool = False


class Share(NamedTuple):
    """Part of a source in an average of the same group.

    Attributes:
        member: Position of the average among the group's members.
        coefficient: Factor of the source's values.
        first: True if the sum begins with the source.
    """

    member: int
    coefficient: float
    first: bool


@dataclass(frozen=True)
class Member:
    """A tensor of an output within a group.

    Attributes:
        job: Position of the output among the stream's jobs.
        plan: Plan of the tensor.
        places: Positions among the group's sources of the plan's inputs, in the plan's order.
    """

    job: int
    plan: TensorPlan
    places: tuple[int, ...]

    @cached_property
    def divisor(self) -> float:
        """Divisor of the weighted sum."""
        plan = self.plan
        return math.fsum(plan.coefficients) if plan.divisor is None else plan.divisor


@dataclass(frozen=True)
class Group:
    """Tensors of several outputs that are computed from the same reads.

    Attributes:
        name: Name of the tensor in all outputs.
        shape: Shape of the tensor.
        sources: The distinct tensors that are read, in the run's order.
        members: The tensors that are computed from the sources.
        products: Positions of the sources that are multiplied with each other, for the geometry of
            the run.
        observed: Positions of the sources whose blocks the stream's observer receives.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    members: tuple[Member, ...]
    products: tuple[int, ...] = ()
    observed: frozenset[int] = field(default=frozenset())

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes to read for the group."""
        return sum(source.stored_bytes for source in self.sources)

    @cached_property
    def contiguous(self) -> bool:
        """True if every source is stored as one row-major range."""
        return all(source.contiguous for source in self.sources)

    @cached_property
    def averaged(self) -> bool:
        """True if values are computed, and not only bytes copied."""
        return bool(self.products) or any(member.plan.averaged for member in self.members)

    @cached_property
    def rows(self) -> dict[int, list[int]]:
        """Position of each multiplied source → rows of that source in the matrix of products.

        A source that is named twice has several rows.
        """
        rows: dict[int, list[int]] = {}
        for row, position in enumerate(self.products):
            rows.setdefault(position, []).append(row)
        return rows

    @cached_property
    def shares(self) -> tuple[tuple[Share, ...], ...]:
        """Parts of each source in the averages, by the position of the source."""
        shares: list[list[Share]] = [[] for _ in self.sources]
        for number, member in enumerate(self.members):
            plan = member.plan
            weights = plan.coefficients if plan.averaged else (1.0,) * len(member.places)
            for i, position in enumerate(member.places):
                shares[position].append(Share(number, weights[i], i == 0))
        return tuple(map(tuple, shares))


def group_reads(
    jobs: Sequence[Job], order: Iterable[Checkpoint] = (), gram: Sequence[TensorPlan] = ()
) -> list[Group]:
    """Group the tensors of several outputs that can be computed from the same reads.

    Args:
        jobs: The outputs.
        order: The checkpoints in an order that agrees with every output's order; only needed for
            several outputs. A tensor of another checkpoint comes before these in a group.
        gram: Tensors whose sources are all multiplied with each other.

    Returns:
        Groups in the order of the outputs' tensors, the first output first.
    """
    ranks = {id(t): i for i, c in enumerate(order) for t in c.tensors.values()}
    alike: dict[object, list[tuple[int, TensorPlan]]] = {}
    for number, plans in enumerate([*(job.tensors for job in jobs), gram]):
        for plan in plans:
            if plan.tied_to is None and plan.output.numel:
                # An averaged and a copied tensor of one name need different work on each block.
                key = (plan.name, plan.shape, plan.averaged)
                alike.setdefault(key, []).append((number, plan))
    return [_group(plans, ranks, len(jobs)) for plans in alike.values()]


def add_observed(groups: Iterable[Group], tensors: Iterable[Tensor]) -> list[Group]:
    """Mark the sources whose blocks the observer receives, so that each tensor is observed once.

    Args:
        groups: The groups that are read for outputs.
        tensors: The tensors to observe.

    Returns:
        The marked groups, then one group per tensor that is read for the observer alone.
    """
    wanted = {tensor: True for tensor in tensors if tensor.numel}
    marked: list[Group] = []
    for group in groups:
        # Removed at the first occurrence, so that a tensor in several groups is observed once.
        positions = [i for i, t in enumerate(group.sources) if wanted.pop(t, None)]
        marked.append(replace(group, observed=frozenset(positions)))
    marked += (Group("", t.shape, (t,), (), observed=frozenset([0])) for t in wanted)
    return marked


def _group(plans: list[tuple[int, TensorPlan]], ranks: Mapping[int, int], jobs: int) -> Group:
    keyed = [(number, plan, _keys(plan)) for number, plan in plans]
    inputs = {key: t for _, plan, keys in keyed for key, t in zip(keys, plan.inputs, strict=True)}
    if len(plans) > 1:
        # The sort is stable: tensors without a rank stay in the order of their output.
        inputs = dict(sorted(inputs.items(), key=lambda item: ranks.get(item[0][0], -1)))
    index = {key: i for i, key in enumerate(inputs)}
    members: list[Member] = []
    products: tuple[int, ...] = ()
    for number, plan, keys in keyed:
        positions = tuple(index[key] for key in keys)
        if number < jobs:
            members.append(Member(number, plan, positions))
        else:
            products = products or positions
    first = plans[0][1]
    return Group(first.name, first.shape, tuple(inputs.values()), tuple(members), products)


def _keys(plan: TensorPlan) -> list[tuple[int, int]]:
    """Return a key per input of a plan: the tensor's id and the number of earlier occurrences.

    A tensor that occurs twice in a plan is read twice, so that the order of the sum is kept.
    """
    occurrences: Counter[int] = Counter()
    keys = []
    for tensor in plan.inputs:
        keys.append((id(tensor), occurrences[id(tensor)]))
        occurrences[id(tensor)] += 1
    return keys


def common_order(sequences: Iterable[Sequence[Checkpoint]]) -> list[Checkpoint]:
    """Find an order of checkpoints that agrees with several sequences; empty if there is none."""
    checkpoints: dict[int, Checkpoint] = {}
    after: dict[int, dict[int, None]] = {}
    for sequence in sequences:
        checkpoints |= {id(checkpoint): checkpoint for checkpoint in sequence}
        for checkpoint, following in zip(sequence, (*sequence[1:], None), strict=True):
            # Dicts are ordered sets here, so that the result is the same in every process.
            after.setdefault(id(checkpoint), {})
            if following is not None and following is not checkpoint:
                after.setdefault(id(following), {})[id(checkpoint)] = None
    try:
        return [checkpoints[key] for key in TopologicalSorter(after).static_order()]
    except CycleError:
        return []
