"""Sets of weights that candidates need, in groups that fit in memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ckptavg.averaging.compute import as_average, compute_state_dicts, read_state_dict
from ckptavg.averaging.plan import Average
from ckptavg.averaging.weights import Weights
from ckptavg.batchnorm.model_state import stop_observers
from ckptavg.batchnorm.statistics_pass import statistics_of
from ckptavg.evaluation.candidates import Candidate
from ckptavg.formats import Checkpoint
from ckptavg.formats.running_statistics import Statistics
from ckptavg.models.load import load_into
from ckptavg.models.perturbation import Perturbation, apply_together
from ckptavg.models.runtime import Runtime
from ckptavg.outputs.sinks import StateDict
from ckptavg.tasks.base import in_float64


@dataclass(eq=False)
class WeightSet:
    """Weights to compute outputs with.

    Attributes:
        name: Name in messages.
        source: Source of the weights: a checkpoint, a planned average, or weights in memory.
        recompute: True to recompute the BatchNorm statistics.
        perturbation: Step away from the source's weights; None for none.
        statistics: State of the statistics after recomputing; None before.
        model: The module on the device, between ``load_models`` and ``release_models``.
        squared_norm: ‖w‖² over all parameters, for points of a landscape; None where not measured.
        is_hole: True for a point of a landscape whose outputs are not finite.
    """

    name: str
    source: Checkpoint | Average | Weights
    recompute: bool = False
    perturbation: Perturbation | None = None
    statistics: Statistics | None = None
    model: nn.Module = field(default_factory=nn.Module, repr=False)
    squared_norm: float | None = None
    is_hole: bool = False

    def measure_norm(self) -> None:
        """Measure ‖w‖² of the loaded model, in float64.

        Parameters count as in training: each once, whatever its names, those of BatchNorm layers
        included. Buffers, such as running statistics, are no parameters.
        """
        total = torch.zeros((), dtype=torch.float64)
        for parameter in self.model.parameters():
            values = parameter.detach()
            if values.is_complex():
                values = torch.view_as_real(values)
            squares = in_float64(values).square()
            # Not the device of the values: Apple's mps has no float64.
            total = total.to(squares.device) + squares.sum()
        self.squared_norm = float(total)

    def describe_statistics(self) -> Statistics:
        """Return the state of the BatchNorm statistics before recomputing."""
        if isinstance(self.source, Average):
            return self.source.statistics
        return statistics_of(self.source, self.model)


class WeightSets:
    """Distinct weight sets of all candidates; candidates with the same weights share a set.

    Attributes:
        members: Per candidate, the list of weight sets whose outputs are scored or averaged.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._by_source: dict[object, WeightSet] = {}
        self.members = [self._members_of(candidate) for candidate in candidates]

    def __iter__(self) -> Iterator[WeightSet]:
        return iter(self._by_source.values())

    def __len__(self) -> int:
        return len(self._by_source)

    def _members_of(self, candidate: Candidate) -> list[WeightSet]:
        recompute, perturbation = bool(candidate.recompute), candidate.perturbation
        source = candidate.average or candidate.weights
        if source is not None:
            # Planned averages, and weights in memory, are the same only if they are one object.
            key: object = (id(source), recompute, perturbation)
            weight_set = WeightSet(candidate.name, source, recompute, perturbation)
            return [self._add(key, weight_set)]
        members = []
        for number, sample in enumerate(candidate.samples, 1):
            name = f"{candidate.name}, sample {number}"
            key = (id(sample), recompute)
            members.append(self._add(key, WeightSet(name, sample, recompute)))
        if members:
            return members
        for checkpoint in candidate.checkpoints:
            # Resolved, so that two paths to a file share a weight set.
            key = (checkpoint.path.resolve(), checkpoint.key, recompute, perturbation)
            name = str(checkpoint.path)
            if perturbation is not None:
                # The path is the name of the weights that are not moved.
                name = candidate.name
            weight_set = WeightSet(name, checkpoint, recompute, perturbation)
            members.append(self._add(key, weight_set))
        return members

    def _add(self, key: object, weight_set: WeightSet) -> WeightSet:
        """Add a weight set, or return the known one with the same key."""
        return self._by_source.setdefault(key, weight_set)

    def groups(self, size: int) -> list[list[WeightSet]]:
        """Divide the weight sets into groups; members of an ensemble stay together if they fit.

        Args:
            size: Number of copies of the model that fit in memory, the most per group.
        """
        size = max(1, size)
        groups: list[list[WeightSet]] = []
        for block in self._blocks():
            for start in range(0, len(block), size):
                part = block[start : start + size]
                # First fit: the first group with room takes the part.
                for group in groups:
                    if len(group) + len(part) <= size:
                        group.extend(part)
                        break
                else:
                    groups.append(part)
        return groups

    def _blocks(self) -> list[list[WeightSet]]:
        """Arrange the weight sets in blocks, a block per candidate, each set in a single block.

        Sets with statistics to recompute are adjacent, so that they share passes over the training
        data.
        """
        # Large ensembles come first, as their members should share a pass. Single sets then fill
        # the room that is left.
        blocks: list[list[WeightSet]] = []
        assigned: set[WeightSet] = set()
        for members in sorted(self.members, key=_order_of_blocks):
            block = [member for member in dict.fromkeys(members) if member not in assigned]
            assigned.update(block)
            if block:
                blocks.append(block)
        return blocks


def _order_of_blocks(members: Sequence[WeightSet]) -> tuple[int, bool]:
    return -len(members), not members[0].recompute


def load_models(
    group: Sequence[WeightSet],
    template: nn.Module,
    runtime: Runtime,
    *,
    keep_nonfinite: bool = False,
) -> None:
    """Load the models of a group onto the device; a single read serves all averages.

    Args:
        group: The weight sets; ``model`` is set to a module in evaluation mode.
        template: A module that the weights fit; every weight set gets a copy.
        runtime: The device of the models.
        keep_nonfinite: True to allow averages that are not finite.

    Raises:
        ModelError: Weights do not fit the template.
    """
    # A source may serve two weight sets: one as averaged, one with recomputed statistics.
    weights = _read_together(group, keep_nonfinite=keep_nonfinite)
    uses_left = Counter(id(weight_set.source) for weight_set in group)
    for weight_set in group:
        source_id = id(weight_set.source)
        uses_left[source_id] -= 1
        if isinstance(weight_set.source, Weights):
            tensors = dict(weight_set.source.tensors)
        elif isinstance(weight_set.source, Checkpoint) and source_id not in weights:
            tensors = read_state_dict(weight_set.source)
        elif uses_left[source_id]:
            tensors = weights[source_id]
        else:
            # The last user of a source takes the weights, which frees the memory afterwards.
            tensors = weights.pop(source_id)
        weight_set.model = _load_copy(template, tensors, weight_set.name, runtime)
    moves: list[tuple[nn.Module, Perturbation]] = []
    for weight_set in group:
        if weight_set.perturbation is not None:
            moves.append((weight_set.model, weight_set.perturbation))
    apply_together(moves)
    for weight_set in group:
        weight_set.model.eval()


def _read_together(group: Sequence[WeightSet], *, keep_nonfinite: bool) -> dict[int, StateDict]:
    """Read all sources of a group at once if there is an average; return weights by source id.

    Without an average the result is empty, and ``load_models`` reads checkpoint after checkpoint,
    which takes less memory.
    """
    sources: dict[int, Checkpoint | Average] = {}
    for weight_set in group:
        if not isinstance(weight_set.source, Weights):
            sources[id(weight_set.source)] = weight_set.source
    if not any(isinstance(source, Average) for source in sources.values()):
        return {}
    kept = {id(weight_set.source) for weight_set in group if not weight_set.recompute}
    averages = []
    for source_id, source in sources.items():
        average = source if isinstance(source, Average) else as_average(source)
        # A note that asks for recomputing would be wrong where that is done anyway.
        if source_id not in kept:
            average = average.for_recomputing()
        averages.append(average)
    state_dicts = compute_state_dicts(averages, keep_nonfinite=keep_nonfinite)
    return dict(zip(sources, state_dicts, strict=True))


def _load_copy(template: nn.Module, weights: StateDict, name: str, runtime: Runtime) -> nn.Module:
    """Load weights into a copy of the template, on the device and in training mode.

    Some modules merge weights when leaving training mode, which comes after all changes of weights.
    """
    model = copy.deepcopy(template)
    # Not chained: an overridden ``train`` may return None.
    model.train()
    load_into(model, weights, name)
    stop_observers(model)
    return model.to(runtime.device)


def release_models(group: Iterable[WeightSet], device: torch.device) -> None:
    """Free the memory of a group's models."""
    for weight_set in group:
        weight_set.model = nn.Module()
    # The allocator caches freed blocks; this returns the memory to the device.
    if device.type == "cuda":
        torch.cuda.empty_cache()
