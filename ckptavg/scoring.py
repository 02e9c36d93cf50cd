"""Scores of candidates while data goes by.

A single network's are taken at once, an ensemble's when all of its members have been heard.
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ckptavg.batches import bytes_of
from ckptavg.candidates import Candidate
from ckptavg.errors import EvaluationError
from ckptavg.evidence import Disagreement
from ckptavg.networks import Network
from ckptavg.processes import Peers
from ckptavg.tasks.task import Mean, Samples, Scores, Task


class Board:
    """The scores of one candidate.

    A pass over the data may fail half way and be tried again with fewer networks at a time, so what
    it adds counts once it is over: ``begin``, ``add`` for every network and batch, ``commit``.
    """

    def __init__(self, candidate: Candidate, members: Sequence[Network], task: Task) -> None:
        self.candidate = candidate
        self.members = members
        self.task = task
        self.scores: Scores = task.scores()
        self.samples: dict[int, Samples] = {}
        self.disagreement = Disagreement()
        self.heard: set[Network] = set()
        self._parked: dict[int, _Waiting] = {}
        self._waiting: dict[int, _Waiting] = {}

    @property
    def complete(self) -> bool:
        """Whether all of its networks have seen all of the data."""
        return self.heard.issuperset(self.members)

    def begin(self) -> None:
        """Start a pass, or start it again."""
        if not self.complete:
            self.scores, self.samples = self.task.scores(), {}
            self.disagreement = Disagreement()
            self._waiting = {}

    def add(
        self,
        number: int,
        network: Network,
        found: torch.Tensor,
        samples: Samples | None,
        targets: Any,
    ) -> None:
        """Take in the predictions of a network on a batch, if it is one of its own."""
        times = self.members.count(network)
        if not times:
            return
        if self.candidate.kind != "ensemble":
            self._score(number, found, samples, targets)
            return
        waiting = self._of_batch(number)
        for _ in range(times):
            waiting.add(found, samples, targets)
        if waiting.mean.members == len(self.members):
            self._score_ensemble(number, self._waiting.pop(number), targets)

    def commit(self, group: Sequence[Network]) -> None:
        """End a pass of some networks over all of the data."""
        self.heard.update(n for n in group if n in self.members)
        for waiting in self._waiting.values():
            waiting.park()
        self._parked, self._waiting = self._waiting, {}

    def _of_batch(self, number: int) -> _Waiting:
        if number not in self._waiting:
            parked = self._parked.get(number)
            self._waiting[number] = (
                _Waiting(self.task.mean()) if parked is None else copy.deepcopy(parked)
            )
        return self._waiting[number]

    def _score_ensemble(self, number: int, waiting: _Waiting, targets: Any) -> None:
        mean = waiting.mean.value()
        self._score(number, mean, self.task.samples(mean, targets), targets)
        if len(waiting.answers) > 1:
            self.disagreement.add(waiting.answers)

    def _score(
        self, number: int, found: torch.Tensor, samples: Samples | None, targets: Any
    ) -> None:
        self.scores.update(found, targets)
        if samples is not None:
            self.samples[number] = samples

    def merge(self, peers: Peers) -> None:
        """Take in what the other processes have seen; every process calls this alike."""
        if peers.count == 1:
            return
        mine = {number * peers.count + peers.rank: s for number, s in self.samples.items()}
        told = [self.scores.state(), self.disagreement.state(), _plain(mine)]
        scores, disagreement = self.task.scores(), Disagreement()
        samples: dict[int, Samples] = {}
        for other_scores, other_disagreement, others in peers.gather(told):
            scores.merge(other_scores)
            disagreement.merge(other_disagreement)
            samples |= _samples(others)
        self.scores, self.disagreement = scores, disagreement
        self.samples = dict(sorted(samples.items()))


@dataclass
class _Waiting:
    """An ensemble's outputs on a batch until all its members are in.

    Attributes:
        mean: Of the outputs so far.
        answers: Each member's, where the task has answers.
    """

    mean: Mean
    answers: list[torch.Tensor] = field(default_factory=list)

    def add(self, found: torch.Tensor, samples: Samples | None, targets: Any) -> None:
        self.mean.add(found, targets)
        if samples is not None and samples.answers is not None:
            self.answers.append(samples.answers)

    def park(self) -> None:
        self.mean.park()
        self.answers = [answers.cpu() for answers in self.answers]


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
    """Whether predictions are finite, looked at one batch late so that no device is waited for."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[torch.Tensor] = []

    def add(self, name: str, sound: torch.Tensor) -> None:
        """Note a network's flag for the current batch."""
        self._names.append(name)
        self._flags.append(sound)

    def check(self, keep: int = 0) -> None:
        """Look at all flags but the last few.

        Raises:
            EvaluationError: A network's predictions were not finite.
        """
        count = len(self._flags) - keep
        if count <= 0:
            return
        for name, sound in zip(
            self._names, torch.stack(self._flags[:count]).tolist(), strict=False
        ):
            if not sound:
                raise EvaluationError(
                    f"{name}: the outputs are not finite",
                    "Recompute its BatchNorm statistics, look at the weights, or pass --amp off.",
                )
        del self._names[:count], self._flags[:count]
