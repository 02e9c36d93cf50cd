"""Scores of candidates while data goes by.

A single network's are taken at once, an ensemble's when all of its members have been heard.
"""

from __future__ import annotations

import base64
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ckptavg.distributed.processes import Peers
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.significance import Disagreement
from ckptavg.evaluation.weight_sets import Network
from ckptavg.formats.names import batchnorm_layers
from ckptavg.models.batches import bytes_of
from ckptavg.tasks.base import Mean, Samples, Scores, Task


class Board:
    """The scores of one candidate.

    A pass over the data may fail half way and be tried again with fewer networks at a time, so what
    it adds counts once it is over: ``begin``; for every batch ``add`` for every network, then
    ``end_batch``; ``commit``.
    """

    def __init__(self, candidate: Candidate, members: Sequence[Network], task: Task) -> None:
        self.candidate = candidate
        self.members = members
        self.times = Counter(members)
        self.task = task
        self.scores: Scores = task.scores()
        self.samples: dict[int, Samples] = {}
        self.disagreement = Disagreement(len(members))
        self.heard: set[Network] = set()
        self._parked: dict[int, Mean] = {}
        self._waiting: dict[int, Mean] = {}
        self._agreed = copy.deepcopy(self.disagreement)  # as of the last pass

    @property
    def complete(self) -> bool:
        """Whether all of its networks have seen all of the data."""
        return self.heard.issuperset(self.members)

    def begin(self) -> None:
        """Start a pass, or start it again."""
        if not self.complete:
            self.scores, self.samples = self.task.scores(), {}
            self.disagreement = copy.deepcopy(self._agreed)
            self._waiting = {}

    def add(
        self,
        number: int,
        network: Network,
        found: torch.Tensor,
        samples: Samples | None,
        targets: Any,
    ) -> None:
        """Take in the predictions of a network on a batch, if it is one of its own and is new."""
        times = self.times[network]
        if not times or network in self.heard:
            return
        if self.candidate.kind != "ensemble":
            self._score(number, found, samples, targets)
            return
        mean = self._mean(number)
        for _ in range(times):
            mean.add(found, targets)
            if samples is not None and samples.answers is not None:
                self.disagreement.add(number, samples.answers)
        if mean.members == len(self.members):
            value = self._waiting.pop(number).value()
            self._score(number, value, self.task.samples(value, targets), targets)

    def end_batch(self, number: int) -> None:
        """Let an ensemble's outputs leave the device if further members come in a later pass."""
        if number in self._waiting:
            self._waiting[number].park()

    def commit(self, group: Sequence[Network]) -> None:
        """End a pass of some networks over all of the data."""
        self.heard.update(n for n in group if n in self.times)
        self.disagreement.park()
        # a pass without any of its networks adds nothing to what waits for further ones
        self._parked = {} if self.complete else self._parked | self._waiting
        self._waiting = {}
        self._agreed = copy.deepcopy(self.disagreement)

    def _mean(self, number: int) -> Mean:
        """The ensemble's outputs on a batch so far; those of earlier passes stay as they are."""
        if number not in self._waiting:
            parked = self._parked.get(number)
            self._waiting[number] = self.task.mean() if parked is None else copy.deepcopy(parked)
        return self._waiting[number]

    def _score(
        self, number: int, found: torch.Tensor, samples: Samples | None, targets: Any
    ) -> None:
        self.scores.update(found, targets)
        if samples is not None:  # its answers have been compared, or never will be
            self.samples[number] = replace(samples, answers=None)

    def details(self) -> dict[str, Any]:
        """What JSON says beside the metrics, as plain values."""
        found = self.task.details(self.scores)
        if self.candidate.kind == "ensemble" and self.disagreement.count:
            found |= {k: v for k, v in self.disagreement.compute().items() if k != "n"}
        return found

    def describe_statistics(self) -> tuple[str, dict[str, list[str]]]:
        """Tell the state of the running statistics, and the layers that stand out by kind."""
        candidate, network = self.candidate, self.members[0]
        if network.statistics is not None:
            return network.statistics.state, network.statistics.listed
        if candidate.average is not None:
            return candidate.average.batchnorm, candidate.average.statistics.listed
        first = candidate.weights or candidate.checkpoints[0]
        if not batchnorm_layers(first.tensors):
            return "none", {}
        made = candidate.provenance
        return str(made.get("bn", "own")) if made else "own", {}

    def merge(self, peers: Peers) -> None:
        """Take in what the other processes have seen; every process calls this alike."""
        if peers.count == 1:
            return
        mine = {number * peers.count + peers.rank: s for number, s in self.samples.items()}
        told = [self.scores.state(), self.disagreement.state(), _plain(mine)]
        scores, disagreement = self.task.scores(), Disagreement(len(self.members))
        samples: dict[int, Samples] = {}
        for other_scores, other_disagreement, others in peers.gather(told):
            scores.merge(other_scores)
            disagreement.merge(other_disagreement)
            samples |= _samples(others)
        self.scores, self.disagreement = scores, disagreement
        self.samples = dict(sorted(samples.items()))


def joined(samples: Mapping[int, Samples]) -> Samples | None:
    """The samples of all batches, in order, on the CPU; None where there are none."""
    if not samples:
        return None
    parts = [samples[number] for number in sorted(samples)]
    weights = [part.weights for part in parts if part.weights is not None]
    return Samples(
        torch.cat([part.values for part in parts]).cpu(),
        torch.cat(weights).cpu() if weights else None,
        metric=parts[0].metric,
        scale=parts[0].scale,
    )


def _plain(samples: Mapping[int, Samples]) -> list[Any]:
    return [
        [number, s.metric, s.scale, _packed(s.values), s.weights is not None and _packed(s.weights)]
        for number, s in samples.items()
    ]


def _samples(plain: Sequence[Any]) -> dict[int, Samples]:
    return {
        number: Samples(
            _unpacked(values), _unpacked(weights) if weights else None, None, metric, scale
        )
        for number, metric, scale, values, weights in plain
    }


def _packed(values: torch.Tensor) -> list[str]:
    """A tensor's type and bytes, as text."""
    return [str(values.dtype).removeprefix("torch."), base64.b85encode(bytes_of(values)).decode()]


def _unpacked(packed: Sequence[str]) -> torch.Tensor:
    dtype, text = packed
    raw = bytearray(base64.b85decode(text))
    wanted = getattr(torch, dtype)
    return torch.frombuffer(raw, dtype=wanted) if raw else torch.empty(0, dtype=wanted)


class Soundness:
    """Whether predictions are finite.

    The flags of a batch are on their way to the host while the next one is computed, and are looked
    at after that, so that the device never waits for the host to have looked.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[torch.Tensor] = []
        self._late: tuple[list[str], torch.Tensor, torch.cuda.Event | None] | None = None

    def add(self, name: str, sound: torch.Tensor) -> None:
        """Note a network's flag for the current batch."""
        self._names.append(name)
        self._flags.append(sound)

    def end_batch(self) -> None:
        """Look at the flags of the batch before this one.

        Raises:
            EvaluationError: A network's predictions were not finite.
        """
        late, self._late = self._late, self._sent()
        self._names, self._flags = [], []
        if late is None:
            return
        names, flags, arrived = late
        if arrived is not None:
            arrived.synchronize()
        for name, sound in zip(names, flags.tolist(), strict=True):
            if not sound:
                raise EvaluationError(
                    f"{name}: the outputs are not finite",
                    "Recompute its BatchNorm statistics, look at the weights, or pass --amp off.",
                )

    def end(self) -> None:
        """Look at the flags of the last batch; raises as ``end_batch``."""
        self.end_batch()

    def _sent(self) -> tuple[list[str], torch.Tensor, torch.cuda.Event | None] | None:
        """The current batch's flags, under way to the host."""
        if not self._flags:
            return None
        flags = torch.stack(self._flags)
        if not flags.is_cuda:
            return self._names, flags, None
        sent = flags.to("cpu", non_blocking=True)  # into pinned memory
        return self._names, sent, torch.cuda.current_stream(flags.device).record_event()
