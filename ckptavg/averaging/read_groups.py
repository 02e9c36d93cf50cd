"""Groups of tensors that share reads, so that several averages need each input byte only once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
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


class Term(NamedTuple):
    """Product of a source and a coefficient: one term of a sum in the same group.

    Attributes:
        output: Position of the sum among the group's outputs.
        coefficient: Factor of the source's values.
        first: True if the sum begins with the source.
    """

    output: int
    coefficient: float
    first: bool


@dataclass(frozen=True)
class OutputTerm:
    """A tensor of an output that a group computes.

    Attributes:
        job: Position of the output among the stream's jobs.
        plan: Plan of the tensor.
        source_indices: Positions among the group's sources of the plan's inputs, in the plan's
            order.
    """

    job: int
    plan: TensorPlan
    source_indices: tuple[int, ...]

    @cached_property
    def divisor(self) -> float:
        """Divisor of the weighted sum."""
        if self.plan.divisor is not None:
            return self.plan.divisor
        return math.fsum(self.plan.coefficients)

    @property
    def coefficients(self) -> Sequence[float]:
        """Factor of each input: 1 for each input of a tensor that is copied."""
        if self.plan.averaged:
            return self.plan.coefficients
        return (1.0,) * len(self.source_indices)


@dataclass(frozen=True)
class Group:
    """Tensors of several outputs that are computed from the same reads.

    Attributes:
        name: Name of the tensor in all outputs.
        shape: Shape of the tensor.
        sources: The distinct tensors that are read, in the run's order.
        outputs: The tensors that are computed from the sources.
        products: Positions of the sources that are multiplied with each other, for the geometry of
            the run.
        observed: Positions of the sources whose blocks the stream's observer receives.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    outputs: tuple[OutputTerm, ...]
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
        return bool(self.products) or any(output.plan.averaged for output in self.outputs)

    @cached_property
    def spread(self) -> tuple[int, ...]:
        """Positions of the sources whose standard deviation scales the noise of an output."""
        positions: set[int] = set()
        for output in self.outputs:
            if output.plan.noise is not None:
                positions.update(output.source_indices)
        return tuple(sorted(positions))

    @cached_property
    def rows(self) -> dict[int, list[int]]:
        """Position of each source that is kept for a block → rows of its values.

        The rows of products come first, then those of the standard deviation. A source that is
        named twice has several rows.
        """
        rows: dict[int, list[int]] = {}
        for row, position in enumerate((*self.products, *self.spread)):
            rows.setdefault(position, []).append(row)
        return rows

    @cached_property
    def terms(self) -> tuple[tuple[Term, ...], ...]:
        """Terms of each source, by the position of the source."""
        terms: list[list[Term]] = [[] for _ in self.sources]
        for number, output in enumerate(self.outputs):
            coefficients = output.coefficients
            for i, source in enumerate(output.source_indices):
                terms[source].append(Term(number, coefficients[i], i == 0))
        return tuple(map(tuple, terms))


@dataclass(frozen=True, slots=True)
class _Request:
    """A tensor to compute, or to multiply, before its group is known.

    Attributes:
        job: Position of the tensor's output among the stream's jobs; None for products.
        plan: Plan of the tensor.
        input_keys: One key per input of the plan, see ``_list_input_keys``.
    """

    job: int | None
    plan: TensorPlan
    input_keys: Sequence[_InputKey]


_InputKey = tuple[int, int]
_Requests = dict[tuple[str, tuple[int, ...], bool, int | None], list[_Request]]


def group_reads(
    jobs: Sequence[Job], order: Iterable[Checkpoint] = (), gram: Sequence[TensorPlan] = ()
) -> list[Group]:
    """Group the tensors of several outputs that can be computed from the same reads.

    Args:
        jobs: The outputs.
        order: The checkpoints in an order that agrees with every output's order; only needed for
            several outputs. A tensor of another checkpoint comes before these in a group. A tensor
            whose sources have another order is read in a group of its own.
        gram: Tensors whose sources are all multiplied with each other.

    Returns:
        Groups in the order of the outputs' tensors, the first output first.
    """
    ranks: dict[int, int] = {}
    for rank, checkpoint in enumerate(order):
        ranks.update(dict.fromkeys(map(id, checkpoint.tensors.values()), rank))
    requests: _Requests = {}
    for number, job in enumerate(jobs):
        _collect(requests, number, job.tensors, ranks)
    _collect(requests, None, gram, ranks)
    return [_group(alike, ranks) for alike in requests.values()]


def _collect(
    requests: _Requests,
    job: int | None,
    plans: Iterable[TensorPlan],
    ranks: Mapping[int, int],
) -> None:
    """Add the tensors of an output to the requests that can share reads with them."""
    for plan in plans:
        # A sink repeats the first name's blocks for tied tensors, and empty tensors have none.
        if plan.tied_to is None and plan.output.numel:
            # A sum in another order than the common one cannot share its reads.
            places = [ranks.get(id(source), -1) for source in plan.inputs]
            alone = None
            if places != sorted(places):
                alone = job
            # An averaged and a copied tensor of one name need different work on each block.
            key = (plan.name, plan.shape, plan.averaged, alone)
            requests.setdefault(key, []).append(_Request(job, plan, _list_input_keys(plan)))


def _group(requests: Sequence[_Request], ranks: Mapping[int, int]) -> Group:
    """Group tensors of the same name and shape.

    Args:
        requests: The tensors.
        ranks: Identity of an input → position of the input's checkpoint in the common order.
    """
    sources = _merge_inputs(requests, ranks)
    indices = dict(zip(sources, range(len(sources)), strict=True))
    outputs: list[OutputTerm] = []
    products: tuple[int, ...] = ()
    for request in requests:
        source_indices = tuple(indices[key] for key in request.input_keys)
        if request.job is not None:
            outputs.append(OutputTerm(request.job, request.plan, source_indices))
        elif not products:
            products = source_indices
    plan = requests[0].plan
    return Group(plan.name, plan.shape, tuple(sources.values()), tuple(outputs), products)


def _merge_inputs(
    requests: Sequence[_Request], ranks: Mapping[int, int]
) -> dict[_InputKey, Tensor]:
    """List the distinct inputs of tensors, in an order that agrees with each tensor's own."""
    inputs: dict[_InputKey, Tensor] = {}
    for request in requests:
        inputs.update(zip(request.input_keys, request.plan.inputs, strict=True))
    if len(requests) == 1:
        return inputs

    def rank(key: _InputKey) -> int:
        """Return the position of an input's checkpoint in the common order."""
        return ranks.get(key[0], -1)

    # The sort is stable: tensors without a rank stay in the order of their output.
    return {key: inputs[key] for key in sorted(inputs, key=rank)}


def _list_input_keys(plan: TensorPlan) -> list[_InputKey]:
    """Return a key per input of a plan: the tensor's identity and the number of its repetition.

    A tensor that occurs twice in a plan is read twice, so that the order of the sum is kept. Equal
    tensors of two checkpoints are different inputs.
    """
    occurrences: Counter[int] = Counter()
    keys = []
    for tensor in plan.inputs:
        keys.append((id(tensor), occurrences[id(tensor)]))
        occurrences[id(tensor)] += 1
    return keys


def add_observed(groups: Iterable[Group], tensors: Iterable[Tensor]) -> list[Group]:
    """Mark the sources whose blocks the observer receives, so that each tensor is observed once.

    Args:
        groups: The groups that are read for outputs.
        tensors: The tensors to observe.

    Returns:
        The marked groups, then one group per tensor that is read for the observer alone.
    """
    # A dict is an ordered set here.
    remaining = {tensor: True for tensor in tensors if tensor.numel}
    marked: list[Group] = []
    for group in groups:
        # Removed at the first occurrence, so that a tensor in several groups is observed once.
        observed = [i for i, source in enumerate(group.sources) if remaining.pop(source, False)]
        marked.append(replace(group, observed=frozenset(observed)))
    for tensor in remaining:
        marked.append(Group("", tensor.shape, (tensor,), (), observed=frozenset([0])))
    return marked


def common_order(sequences: Iterable[Sequence[Checkpoint]]) -> list[Checkpoint]:
    """Find an order of checkpoints that agrees with several sequences; empty if there is none."""
    checkpoints: dict[int, Checkpoint] = {}
    after: dict[int, dict[int, None]] = {}
    for sequence in sequences:
        for checkpoint in sequence:
            checkpoints[id(checkpoint)] = checkpoint
            # Dicts are ordered sets here, so that the result is the same in every process.
            after.setdefault(id(checkpoint), {})
        for checkpoint, following in pairwise(sequence):
            if following is not checkpoint:
                after[id(following)][id(checkpoint)] = None
    try:
        order = list(TopologicalSorter(after).static_order())
    except CycleError:
        return []
    return [checkpoints[key] for key in order]
