"""Networks: the sets of weights that candidates need, in groups that fit in memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ckptavg.averaging import api
from ckptavg.averaging.accounts import Weights
from ckptavg.averaging.plan import Average
from ckptavg.batchnorm.model_state import stop_observers
from ckptavg.batchnorm.statistics_pass import statistics_of
from ckptavg.evaluation.candidates import Candidate
from ckptavg.formats import Checkpoint
from ckptavg.formats.running_statistics import Statistics
from ckptavg.models.device import Runtime
from ckptavg.models.load import load_into
from ckptavg.outputs.target import StateDict


@dataclass(eq=False)
class Network:
    """One set of weights to compute outputs with.

    Attributes:
        name: Name in messages.
        source: Source of the weights: a checkpoint, a planned average, or weights in memory.
        recompute: True to recompute the BatchNorm statistics.
        statistics: State of the statistics after recomputing; None before.
        model: The module on the device, between ``load`` and ``release``.
    """

    name: str
    source: Checkpoint | Average | Weights
    recompute: bool = False
    statistics: Statistics | None = None
    model: nn.Module = field(default_factory=nn.Module, repr=False)

    def describe_statistics(self) -> Statistics:
        """Return the state of the BatchNorm statistics before recomputing."""
        if isinstance(self.source, Average):
            return self.source.statistics
        return statistics_of(self.source, self.model)


class Networks:
    """Distinct networks of all candidates; candidates with the same weights share a network.

    Attributes:
        members: Per candidate, the list of networks whose outputs are scored or averaged.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._found: dict[object, Network] = {}
        self.members = [self._of(candidate) for candidate in candidates]

    def __iter__(self) -> Iterator[Network]:
        return iter(self._found.values())

    def __len__(self) -> int:
        return len(self._found)

    def _of(self, candidate: Candidate) -> list[Network]:
        if candidate.average is not None:
            planned, recompute = candidate.average, bool(candidate.recompute)
            network = Network(candidate.name, planned, recompute)
            return [self._found.setdefault((id(planned), recompute), network)]
        recompute = bool(candidate.recompute)
        if candidate.weights is not None:
            network = Network(candidate.name, candidate.weights, recompute)
            return [self._found.setdefault((id(candidate.weights), recompute), network)]
        # Resolved, so that two paths to a file share a network.
        return [
            self._found.setdefault(
                (c.path.resolve(), c.key, recompute), Network(str(c.path), c, recompute)
            )
            for c in candidate.checkpoints
        ]

    def groups(self, size: int) -> list[list[Network]]:
        """Divide the networks into groups, with the members of an ensemble together if they fit.

        Args:
            size: Number of copies of the model that fit in memory, the most per group.
        """
        size = max(1, size)
        groups: list[list[Network]] = []
        for block in self._blocks():
            for part in (block[i : i + size] for i in range(0, len(block), size)):
                # First fit: the first group with room takes the part.
                room = (group for group in groups if len(group) + len(part) <= size)
                group = next(room, None)
                if group is None:
                    groups.append([*part])
                else:
                    group += part
        return groups

    def _blocks(self) -> list[list[Network]]:
        """Arrange the networks in blocks, one per candidate, every network in one block only.

        Networks with statistics to recompute are adjacent, so that they share passes over the
        training data.
        """
        # Large ensembles come first: their members need the same pass, single networks fill gaps.
        blocks: list[list[Network]] = []
        assigned: set[Network] = set()
        for members in sorted(self.members, key=lambda m: (-len(m), not m[0].recompute)):
            block = [n for n in dict.fromkeys(members) if n not in assigned]
            assigned |= {*block}
            if block:
                blocks.append(block)
        return blocks


def load(
    group: Sequence[Network], template: nn.Module, runtime: Runtime, *, keep_nonfinite: bool = False
) -> None:
    """Load the models of a group onto the device; averages come from one read of all sources.

    Args:
        group: The networks; ``model`` is set to a module in evaluation mode.
        template: A module that the weights fit; every network gets a copy.
        runtime: The device of the models.
        keep_nonfinite: True to allow averages that are not finite.

    Raises:
        ModelError: Weights do not fit the template.
    """
    # A source may serve two networks: one as averaged, one with recomputed statistics.
    weights = _read_together(group, keep_nonfinite=keep_nonfinite)
    uses_left = Counter(id(network.source) for network in group)
    for network in group:
        uses_left[source_id := id(network.source)] -= 1
        if isinstance(network.source, Weights):
            tensors = dict(network.source.tensors)
        elif isinstance(network.source, Checkpoint) and source_id not in weights:
            tensors = api.load(network.source)
        else:
            # The last network of a source takes the weights, which frees the memory afterwards.
            tensors = weights[source_id] if uses_left[source_id] else weights.pop(source_id)
        network.model = _placed(template, tensors, network.name, runtime)


def _read_together(group: Sequence[Network], *, keep_nonfinite: bool) -> dict[int, StateDict]:
    """Read all sources of a group at once if one is an average; return weights by source id.

    Without an average the result is empty, and ``load`` reads one checkpoint after another, which
    takes less memory.
    """
    sources = {}
    for network in group:
        if not isinstance(network.source, Weights):
            sources[id(network.source)] = network.source
    if not any(isinstance(source, Average) for source in sources.values()):
        return {}
    planned = [s if isinstance(s, Average) else api.alone(s) for s in sources.values()]
    state_dicts = api.in_memory_many(planned, keep_nonfinite=keep_nonfinite, stale=False)
    return dict(zip(sources, state_dicts, strict=True))


def _placed(template: nn.Module, weights: StateDict, name: str, runtime: Runtime) -> nn.Module:
    # Weights are loaded in training mode, since some modules merge weights when leaving it.
    model = copy.deepcopy(template)
    # Not chained: an overridden ``train`` may return None.
    model.train()
    load_into(model, weights, name)
    stop_observers(model)
    model = model.to(runtime.device)
    model.eval()
    return model


def release(group: Iterable[Network], device: torch.device) -> None:
    """Free the memory of a group's models."""
    for network in group:
        network.model = nn.Module()
    # The allocator caches freed blocks; this returns the memory to the device.
    if device.type == "cuda":
        torch.cuda.empty_cache()
