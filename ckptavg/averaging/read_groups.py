"""Which reads serve which outputs: several averages of one run are computed from one read of it."""

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
    """One output of a stream.

    Attributes:
        tensors: What to compute; tied ones are computed once, under their first name.
        sink: Takes the blocks, from several threads and in any order.
        keep_nonfinite: Write an average that is not finite as it is.
    """

    tensors: Sequence[TensorPlan]
    sink: Sink
    keep_nonfinite: bool = False


class Share(NamedTuple):
    """One checkpoint's part in one of a group's averages.

    Attributes:
        member: Which of the group's members.
        coefficient: What its values are multiplied by.
        first: Whether the sum begins with it.
    """

    member: int
    coefficient: float
    first: bool


@dataclass(frozen=True)
class Member:
    """A tensor of one output within a group.

    Attributes:
        job: Position of the output among the stream's jobs.
        plan: How the tensor comes about.
        places: Which of the group's sources it takes, in its order.
    """

    job: int
    plan: TensorPlan
    places: tuple[int, ...]

    @cached_property
    def divisor(self) -> float:
        """What the weighted sum is divided by."""
        plan = self.plan
        return math.fsum(plan.coefficients) if plan.divisor is None else plan.divisor


@dataclass(frozen=True)
class Group:
    """Tensors of several outputs that are made of the same reads.

    Attributes:
        name: The tensor's, in all of them.
        shape: Extent.
        sources: The distinct tensors that are read, in the run's order.
        members: What is made of them.
        products: Which sources are multiplied with each other, for the run's geometry.
        watched: Which sources are shown to the stream's watcher as they are read.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    members: tuple[Member, ...]
    products: tuple[int, ...] = ()
    watched: frozenset[int] = field(default=frozenset())

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes that are read for it."""
        return sum(source.stored_bytes for source in self.sources)

    @cached_property
    def contiguous(self) -> bool:
        """Whether every source lies in one row-major range."""
        return all(source.contiguous for source in self.sources)

    @cached_property
    def averaged(self) -> bool:
        """Whether its values are computed with, not only copied."""
        return bool(self.products) or any(member.plan.averaged for member in self.members)

    @cached_property
    def rows(self) -> dict[int, list[int]]:
        """For each source that is multiplied, its rows among them: several if it is named twice."""
        found: dict[int, list[int]] = {}
        for row, place in enumerate(self.products):
            found.setdefault(place, []).append(row)
        return found

    @cached_property
    def shares(self) -> tuple[tuple[Share, ...], ...]:
        """For each source, the averages that it goes into."""
        found: list[list[Share]] = [[] for _ in self.sources]
        for number, member in enumerate(self.members):
            plan = member.plan
            weights = plan.coefficients if plan.averaged else (1.0,) * len(member.places)
            for i, place in enumerate(member.places):
                found[place].append(Share(number, weights[i], i == 0))
        return tuple(map(tuple, found))


def grouped(
    jobs: Sequence[Job], order: Iterable[Checkpoint] = (), gram: Sequence[TensorPlan] = ()
) -> list[Group]:
    """Put the tensors of several outputs together that can be made of the same reads.

    Args:
        jobs: The outputs.
        order: The checkpoints in the order in which every output takes those that it takes; only
            needed for several outputs. Tensors of none of them are read for one output each.
        gram: Tensors of which the products between all sources are wanted.

    Returns:
        Groups in the order of the first output that has each.
    """
    ranks = {id(t): i for i, c in enumerate(order) for t in c.tensors.values()}
    alike: dict[object, list[tuple[int, TensorPlan]]] = {}
    for number, plans in enumerate([*(job.tensors for job in jobs), gram]):
        for plan in plans:
            if plan.tied_to is None and plan.output.numel:
                key = (plan.name, plan.shape, plan.averaged)
                alike.setdefault(key, []).append((number, plan))
    return [_group(plans, ranks, len(jobs)) for plans in alike.values()]


def watching(groups: Iterable[Group], tensors: Iterable[Tensor]) -> list[Group]:
    """Groups that show each of some tensors to the watcher once, read for that if for nothing else.

    Args:
        groups: What is read anyhow.
        tensors: What is to be seen.
    """
    wanted = {tensor: True for tensor in tensors if tensor.numel}
    found: list[Group] = []
    for group in groups:
        seen = [i for i, t in enumerate(group.sources) if wanted.pop(t, None)]
        found.append(replace(group, watched=frozenset(seen)))
    found += (Group("", t.shape, (t,), (), watched=frozenset([0])) for t in wanted)
    return found


def _group(plans: list[tuple[int, TensorPlan]], ranks: Mapping[int, int], jobs: int) -> Group:
    keyed = [(number, plan, _keys(plan)) for number, plan in plans]
    inputs = {key: t for _, plan, keys in keyed for key, t in zip(keys, plan.inputs, strict=True)}
    if len(plans) > 1:  # stable, so that tensors of no rank stay in their output's order
        inputs = dict(sorted(inputs.items(), key=lambda item: ranks.get(item[0][0], -1)))
    place = {key: i for i, key in enumerate(inputs)}
    placed = [(number, plan, tuple(place[key] for key in keys)) for number, plan, keys in keyed]
    members = tuple(Member(*one) for one in placed if one[0] < jobs)
    products = next((places for number, _, places in placed if number == jobs), ())
    first = plans[0][1]
    return Group(first.name, first.shape, tuple(inputs.values()), members, products)


def _keys(plan: TensorPlan) -> list[tuple[int, int]]:
    """What tells the inputs of a plan apart: one that comes again is read again, in its turn."""
    seen: Counter[int] = Counter()
    keys = []
    for tensor in plan.inputs:
        keys.append((id(tensor), seen[id(tensor)]))
        seen[id(tensor)] += 1
    return keys


def common_order(sequences: Iterable[Sequence[Checkpoint]]) -> list[Checkpoint]:
    """Find an order of checkpoints that agrees with all of some sequences; empty if none does."""
    known: dict[int, Checkpoint] = {}
    after: dict[int, dict[int, None]] = {}
    for sequence in sequences:
        known |= {id(checkpoint): checkpoint for checkpoint in sequence}
        for one, following in zip(sequence, (*sequence[1:], None), strict=True):
            after.setdefault(id(one), {})
            if following is not None and following is not one:
                after.setdefault(id(following), {})[id(one)] = None
    try:
        return [known[place] for place in TopologicalSorter(after).static_order()]
    except CycleError:
        return []
