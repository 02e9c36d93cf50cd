"""Accumulation of candidates' scores, batch by batch.

A single network is scored at once, an ensemble when the outputs of all members are in.
"""

from __future__ import annotations

import base64
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.significance import Disagreement
from ckptavg.evaluation.weight_sets import Network
from ckptavg.formats.names import batchnorm_layers
from ckptavg.models.batches import bytes_of
from ckptavg.tasks.base import Mean, Samples, Scores, Task


class Board:
    """Scores of one candidate, accumulated over passes.

    A pass may run out of memory and be repeated with fewer networks, so scores count only after
    ``commit``. The order of calls is ``begin``; per batch ``add`` for every network, then
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
        # State at the last commit, to which ``begin`` returns.
        self._agreed = copy.deepcopy(self.disagreement)

    @property
    def complete(self) -> bool:
        """True if all networks of the candidate have seen all of the data."""
        return self.heard.issuperset(self.members)

    def begin(self) -> None:
        """Start or restart a pass, discarding what was not committed."""
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
        """Add the predictions of a network on a batch; ignore networks of other candidates.

        A network that was committed before is ignored, too.

        Args:
            number: Position of the batch in the pass.
            network: The network that made the predictions.
            found: The predictions, as from ``Task.predict``.
            samples: Per-sample values of the predictions; None if the task has none.
            targets: Targets on the device of the predictions.
        """
        times = self.times[network]
        if not times or network in self.heard:
            return
        if self.candidate.kind != "ensemble":
            self._score(number, found, samples, targets)
            return
        mean = self._mean(number)
        # A checkpoint may be a member of the ensemble more than once.
        for _ in range(times):
            mean.add(found, targets)
            if samples is not None and samples.answers is not None:
                self.disagreement.add(number, samples.answers)
        if mean.members == len(self.members):
            value = self._waiting.pop(number).value()
            self._score(number, value, self.task.samples(value, targets), targets)

    def end_batch(self, number: int) -> None:
        """Move an ensemble's outputs to the host if further members come in a later pass."""
        if number in self._waiting:
            self._waiting[number].offload()

    def commit(self, group: Sequence[Network]) -> None:
        """Commit the pass of a group of networks over all of the data."""
        self.heard.update(n for n in group if n in self.times)
        self.disagreement.offload()
        # After a pass without networks of this candidate, parked outputs stay as they are.
        self._parked = {} if self.complete else self._parked | self._waiting
        self._waiting = {}
        self._agreed = copy.deepcopy(self.disagreement)

    def _mean(self, number: int) -> Mean:
        """Return the running mean of the ensemble on a batch, continuing earlier passes.

        Parked means are copied, so that a repeated pass starts from the same state.
        """
        if number not in self._waiting:
            parked = self._parked.get(number)
            self._waiting[number] = self.task.mean() if parked is None else copy.deepcopy(parked)
        return self._waiting[number]

    def _score(
        self, number: int, found: torch.Tensor, samples: Samples | None, targets: Any
    ) -> None:
        self.scores.update(found, targets)
        # The answers have served the disagreement already; dropping them saves memory.
        if samples is not None:
            self.samples[number] = replace(samples, answers=None)

    def details(self) -> dict[str, Any]:
        """Return further plain values for JSON: the task's details and the disagreement."""
        details = self.task.details(self.scores)
        if self.candidate.kind == "ensemble" and self.disagreement.count:
            details |= {k: v for k, v in self.disagreement.compute().items() if k != "n"}
        return details

    def describe_statistics(self) -> tuple[str, dict[str, list[str]]]:
        """Return the state of the running statistics, and lists of exceptional layers by kind."""
        candidate, network = self.candidate, self.members[0]
        if network.statistics is not None:
            return network.statistics.state, network.statistics.listed
        if candidate.average is not None:
            return candidate.average.batchnorm, candidate.average.statistics.listed
        first = candidate.weights or candidate.checkpoints[0]
        if not batchnorm_layers(first.tensors):
            return "none", {}
        provenance = candidate.provenance
        state = None if provenance is None else provenance.bn
        return state or "own", {}

    def merge(self, peers: Peers) -> None:
        """Merge the scores of all processes; every process must call this."""
        if peers.world_size == 1:
            return
        # Numbers over all processes: batches were dealt out in turn, every n-th to a process.
        own_samples = {}
        for number, scored in self.samples.items():
            own_samples[number * peers.world_size + peers.rank] = scored
        state = [self.scores.state(), self.disagreement.state(), _plain(own_samples)]
        # The gathered states include that of this process, so merging starts from empty scores.
        scores, disagreement = self.task.scores(), Disagreement(len(self.members))
        samples: dict[int, Samples] = {}
        for other_scores, other_disagreement, other_samples in peers.gather(state):
            scores.merge(other_scores)
            disagreement.merge(other_disagreement)
            samples |= _samples(other_samples)
        self.scores, self.disagreement = scores, disagreement
        self.samples = dict(sorted(samples.items()))


def joined(samples: Mapping[int, Samples]) -> Samples | None:
    """Concatenate the samples of all batches in order on the CPU; None without samples."""
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
    """Encode a tensor's dtype and bytes as text."""
    return [str(values.dtype).removeprefix("torch."), base64.b85encode(bytes_of(values)).decode()]


def _unpacked(packed: Sequence[str]) -> torch.Tensor:
    dtype, text = packed
    # torch warns of memory that is not writable, and refuses an empty buffer.
    raw = bytearray(base64.b85decode(text))
    wanted = getattr(torch, dtype)
    return torch.frombuffer(raw, dtype=wanted) if raw else torch.empty(0, dtype=wanted)


class Soundness:
    """Deferred check that predictions are finite.

    The flags of a batch are copied to the host while the next batch is computed, and are checked
    after that. So the device never waits for the host.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._flags: list[torch.Tensor] = []
        self._late: tuple[list[str], torch.Tensor, torch.cuda.Event | None] | None = None

    def add(self, name: str, sound: torch.Tensor) -> None:
        """Record the flag of a network for the current batch.

        Args:
            name: Name of the network in the error.
            sound: Bool tensor of shape (), True for finite predictions.
        """
        self._names.append(name)
        self._flags.append(sound)

    def end_batch(self) -> None:
        """Send the flags of this batch, and check the flags of the previous batch.

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
        """Check the flags of the last batch; raise an error as ``end_batch`` does."""
        self.end_batch()

    def _sent(self) -> tuple[list[str], torch.Tensor, torch.cuda.Event | None] | None:
        """Start the copy of the current batch's flags to the host."""
        if not self._flags:
            return None
        flags = torch.stack(self._flags)
        if not flags.is_cuda:
            return self._names, flags, None
        # Non-blocking: torch copies to pinned memory, and the event tells when the copy is done.
        sent = flags.to("cpu", non_blocking=True)
        return self._names, sent, torch.cuda.current_stream(flags.device).record_event()
