"""The sets of weights that candidates need outputs of, and which of them run together."""

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
    """One set of weights that outputs are computed with.

    Attributes:
        name: For messages.
        source: What its weights are: a checkpoint, a planned average, or weights in memory.
        recompute: Whether its BatchNorm statistics are recomputed.
        statistics: Their state, once they have been.
        model: It, on the device, while it is in use.
    """

    name: str
    source: Checkpoint | Average | Weights
    recompute: bool = False
    statistics: Statistics | None = None
    model: nn.Module = field(default_factory=nn.Module, repr=False)

    def describe_statistics(self) -> Statistics:
        """Tell the state of its statistics before they are recomputed."""
        if isinstance(self.source, Average):
            return self.source.statistics
        return statistics_of(self.source, self.model)


class Networks:
    """The networks of some candidates; those that have one in common share it.

    Attributes:
        members: Of each candidate, the networks whose outputs it is made of.
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
        return [
            self._found.setdefault(
                (c.path.resolve(), c.key, recompute), Network(str(c.path), c, recompute)
            )
            for c in candidate.checkpoints
        ]

    def groups(self, size: int) -> list[list[Network]]:
        """The networks in groups of at most so many, an ensemble's members together if they fit.

        Args:
            size: Copies of the model that the memory holds.
        """
        size = max(1, size)
        groups: list[list[Network]] = []
        for block in self._blocks():
            for part in (block[i : i + size] for i in range(0, len(block), size)):
                room = (group for group in groups if len(group) + len(part) <= size)
                group = next(room, None)
                if group is None:
                    groups.append([*part])
                else:
                    group += part
        return groups

    def _blocks(self) -> list[list[Network]]:
        """The networks, those of one ensemble in a block, each network in its first.

        Those whose statistics are recomputed come together, so that they share what passes over the
        training data they need.
        """
        blocks: list[list[Network]] = []
        taken: set[Network] = set()
        for members in sorted(self.members, key=lambda m: (-len(m), not m[0].recompute)):
            block = [n for n in dict.fromkeys(members) if n not in taken]
            taken |= {*block}
            if block:
                blocks.append(block)
        return blocks


def load(
    group: Sequence[Network], template: nn.Module, runtime: Runtime, *, keep_nonfinite: bool = False
) -> None:
    """Give each network of a group its model: where there are averages, all from one read.

    Args:
        group: The networks.
        template: A module that the weights fit; it is copied.
        runtime: Where the models go; they are in evaluation mode.
        keep_nonfinite: Let averages that are not finite reach a model.

    Raises:
        ModelError: Weights do not fit.
    """
    weights = _read_together(group, keep_nonfinite=keep_nonfinite)
    left = Counter(id(network.source) for network in group)
    for network in group:
        left[place := id(network.source)] -= 1
        if isinstance(network.source, Weights):
            found = dict(network.source.tensors)
        elif isinstance(network.source, Checkpoint) and place not in weights:
            found = api.load(network.source)
        else:
            found = weights[place] if left[place] else weights.pop(place)
        network.model = _placed(template, found, network.name, runtime)


def _read_together(group: Sequence[Network], *, keep_nonfinite: bool) -> dict[int, StateDict]:
    """The weights of a group with averages, by source; none without: those are read in turn."""
    sources = {}
    for network in group:
        if not isinstance(network.source, Weights):
            sources[id(network.source)] = network.source
    if not any(isinstance(source, Average) for source in sources.values()):
        return {}
    planned = [s if isinstance(s, Average) else api.alone(s) for s in sources.values()]
    made = api.in_memory_many(planned, keep_nonfinite=keep_nonfinite, stale=False)
    return dict(zip(sources, made, strict=True))


def _placed(template: nn.Module, weights: StateDict, name: str, runtime: Runtime) -> nn.Module:
    # weights are loaded in training mode: some modules merge theirs when they leave it
    model = copy.deepcopy(template)
    model.train()  # an overridden one may give back nothing
    load_into(model, weights, name)
    stop_observers(model)
    model = model.to(runtime.device)
    model.eval()
    return model


def release(group: Iterable[Network], device: torch.device) -> None:
    """Give the memory of a group's models back."""
    for network in group:
        network.model = nn.Module()
    if device.type == "cuda":
        torch.cuda.empty_cache()
