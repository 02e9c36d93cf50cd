"""Accumulation of candidates' scores, batch by batch.

A single weight set is scored at once, an ensemble when the outputs of all members are in.
"""

from __future__ import annotations

import base64
import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.significance import Disagreement
from ckptavg.evaluation.weight_sets import WeightSet
from ckptavg.formats.statistics_names import batchnorm_layers
from ckptavg.models.batches import bytes_of
from ckptavg.tasks.base import Mean, Samples, Scores, Task

OnPredictions: TypeAlias = Callable[[Candidate, int, torch.Tensor], None]
"""Called with a candidate, the position of a batch in the pass, and the predictions on it."""


class CandidateScore:
    """Scores of a candidate, accumulated over passes.

    A pass may run out of memory and be repeated with fewer weight sets, so scores count only after
    ``commit``. The order of calls is ``begin``; per batch ``add`` for every weight set, then
    ``end_batch``; ``commit``.

    Args:
        candidate: The candidate.
        members: The weight sets whose outputs are scored or averaged, repeated ones included.
        task: The task that scores.

    Attributes:
        on_predictions: Called with each batch's predictions; None for no call.
        scores: Metrics of the batches so far.
        samples: Per-sample values by number of the batch.
        disagreement: Disagreement among the members.
        finished: Members that have seen all of the data.
    """

    def __init__(self, candidate: Candidate, members: Sequence[WeightSet], task: Task) -> None:
        self.candidate = candidate
        self.on_predictions: OnPredictions | None = None
        self.members = members
        self._repeats = Counter(members)
        self.task = task
        self.scores: Scores = task.scores()
        self.samples: dict[int, Samples] = {}
        self.disagreement = Disagreement(len(members))
        self.finished: set[WeightSet] = set()
        self._offloaded: dict[int, Mean] = {}
        self._waiting: dict[int, Mean] = {}
        # State at the last commit, to which ``begin`` returns.
        self._committed = copy.deepcopy(self.disagreement)

    @property
    def complete(self) -> bool:
        """True if all members have seen all of the data."""
        return self.finished.issuperset(self.members)

    def begin(self) -> None:
        """Start or restart a pass, discarding what was not committed."""
        if not self.complete:
            self.scores, self.samples = self.task.scores(), {}
            self.disagreement = copy.deepcopy(self._committed)
            self._waiting = {}

    def add(
        self,
        number: int,
        weight_set: WeightSet,
        predictions: torch.Tensor,
        samples: Samples | None,
        targets: Any,
    ) -> None:
        """Add the predictions of a member on a batch.

        Weight sets of other candidates are ignored, and so are members committed before.

        Args:
            number: Position of the batch in the pass.
            weight_set: The weight set that made the predictions.
            predictions: The predictions, as from ``Task.predict``.
            samples: Per-sample values of the predictions; None if the task has none.
            targets: Targets on the device of the predictions.
        """
        repeats = self._repeats[weight_set]
        if not repeats or weight_set in self.finished:
            return
        if self.candidate.kind != "ensemble":
            self._score(number, predictions, samples, targets)
            return
        mean = self._mean(number)
        # A checkpoint may be a member of the ensemble more than once.
        for _ in range(repeats):
            mean.add(predictions, targets)
            if samples is not None and samples.answers is not None:
                self.disagreement.add(number, samples.answers)
        if mean.members == len(self.members):
            mean_predictions = self._waiting.pop(number).value()
            mean_samples = self.task.samples(mean_predictions, targets)
            self._score(number, mean_predictions, mean_samples, targets)

    def end_batch(self, number: int) -> None:
        """Move an ensemble's outputs to the host if further members come in a later pass."""
        if number in self._waiting:
            self._waiting[number].offload()

    def commit(self, group: Sequence[WeightSet]) -> None:
        """Commit the pass of a group of weight sets over all of the data."""
        self.finished.update(self._repeats.keys() & set(group))
        self.disagreement.offload()
        # After a pass without members of this candidate, offloaded outputs stay as they are.
        self._offloaded |= self._waiting
        if self.complete:
            self._offloaded = {}
        self._waiting = {}
        self._committed = copy.deepcopy(self.disagreement)

    def _mean(self, number: int) -> Mean:
        """Return the running mean of the ensemble on a batch, continuing earlier passes.

        Offloaded means are copied, so that a repeated pass starts from the same state.
        """
        if number in self._waiting:
            mean = self._waiting[number]
        elif number in self._offloaded:
            mean = copy.deepcopy(self._offloaded[number])
        else:
            mean = self.task.mean()
        self._waiting[number] = mean
        return mean

    def _score(
        self, number: int, predictions: torch.Tensor, samples: Samples | None, targets: Any
    ) -> None:
        self.scores.update(predictions, targets)
        if self.on_predictions is not None:
            self.on_predictions(self.candidate, number, predictions)
        # The answers have served the disagreement already; dropping them saves memory.
        if samples is not None:
            self.samples[number] = replace(samples, answers=None)

    def details(self) -> dict[str, Any]:
        """Return further plain values for JSON: the task's details and the disagreement."""
        details = self.task.details(self.scores)
        if self.candidate.kind == "ensemble" and self.disagreement.count:
            disagreement = self.disagreement.compute()
            # The number of samples is among the metrics.
            disagreement.pop("n")
            details |= disagreement
        if self.candidate.swag is not None:
            details["swag"] = self.candidate.swag.describe(len(self.candidate.checkpoints))
        return details

    def describe_statistics(self) -> tuple[str, dict[str, list[str]]]:
        """Return the state of the running statistics, and lists of exceptional layers by kind."""
        candidate = self.candidate
        # All members are recomputed or none, so that the first one tells.
        statistics = self.members[0].statistics
        if statistics is not None:
            return statistics.state, statistics.listed
        if candidate.planned:
            planned = candidate.planned[0].statistics
            return planned.state, planned.listed
        first = candidate.weights or candidate.checkpoints[0]
        if not batchnorm_layers(first.tensors):
            return "none", {}
        recorded = None
        if candidate.provenance is not None:
            recorded = candidate.provenance.bn
        return recorded or "own", {}

    def merge(self, peers: Peers) -> None:
        """Merge the scores of all processes; every process must call this."""
        if peers.world_size == 1:
            return
        # Numbers over all processes: batches were dealt out in turn, every n-th to a process.
        plain_samples = []
        for number, samples in self.samples.items():
            plain_samples.append([number * peers.world_size + peers.rank, *_to_plain(samples)])
        state = [self.scores.state(), self.disagreement.state(), plain_samples]
        # The gathered states include that of this process, so merging starts from empty scores.
        self.scores, self.disagreement = self.task.scores(), Disagreement(len(self.members))
        merged: dict[int, Samples] = {}
        for scores, disagreement, plain_samples in peers.gather(state):
            self.scores.merge(scores)
            self.disagreement.merge(disagreement)
            for number, *plain in plain_samples:
                merged[number] = _from_plain(plain)
        self.samples = dict(sorted(merged.items()))


def concatenate_samples(samples: Mapping[int, Samples]) -> Samples | None:
    """Concatenate the samples of all batches in order on the CPU; None without samples."""
    if not samples:
        return None
    parts = [samples[number] for number in sorted(samples)]
    values = torch.cat([part.values for part in parts]).cpu()
    weights = None
    part_weights = [part.weights for part in parts if part.weights is not None]
    if part_weights:
        weights = torch.cat(part_weights).cpu()
    return Samples(values, weights, metric=parts[0].metric, scale=parts[0].scale)


def _to_plain(samples: Samples) -> list[Any]:
    """Convert the samples of a batch to plain values for JSON."""
    weights = None
    if samples.weights is not None:
        weights = _encode(samples.weights)
    return [samples.metric, samples.scale, _encode(samples.values), weights]


def _from_plain(plain: Sequence[Any]) -> Samples:
    """Restore samples from the output of ``_to_plain``."""
    metric, scale, values, weights = plain
    if weights is not None:
        weights = _decode(weights)
    return Samples(_decode(values), weights, None, metric, scale)


def _encode(values: torch.Tensor) -> list[str]:
    """Encode a tensor's dtype and bytes as text."""
    return [str(values.dtype).removeprefix("torch."), base64.b85encode(bytes_of(values)).decode()]


def _decode(encoded: Sequence[str]) -> torch.Tensor:
    dtype_name, text = encoded
    dtype = getattr(torch, dtype_name)
    if not text:
        # frombuffer refuses an empty buffer.
        return torch.empty(0, dtype=dtype)
    # torch warns of memory that is not writable, such as that of bytes.
    return torch.frombuffer(bytearray(base64.b85decode(text)), dtype=dtype)


class FiniteCheck:
    """Deferred check that predictions are finite.

    The flags of a batch are copied to the host while the next batch is computed, and are checked
    after that. So the device never waits for the host.

    Args:
        holes: Set that receives the names of weight sets whose predictions are not finite, instead
            of an error; None for the error.
    """

    def __init__(self, holes: set[str] | None = None) -> None:
        self._holes = holes
        self._names: list[str] = []
        self._flags: list[torch.Tensor] = []
        self._previous: _BatchFlags | None = None

    def add(self, name: str, is_finite: torch.Tensor) -> None:
        """Record the flag of a weight set for the current batch.

        Args:
            name: Name of the weight set in the error.
            is_finite: Bool tensor of shape (), True for finite predictions.
        """
        self._names.append(name)
        self._flags.append(is_finite)

    def end_batch(self) -> None:
        """Send the flags of this batch, and check the flags of the previous batch.

        Raises:
            EvaluationError: Predictions of a weight set were not finite.
        """
        previous = self._previous
        self._previous = None
        if self._flags:
            self._previous = _BatchFlags.send(self._names, self._flags)
        self._names, self._flags = [], []
        if previous is None:
            return
        for name in previous.wait():
            if self._holes is None:
                raise EvaluationError(
                    f"{name}: the outputs are not finite",
                    "Recompute its BatchNorm statistics, look at the weights, or pass `amp='off'`.",
                )
            self._holes.add(name)

    def end(self) -> None:
        """Check the flags of the last batch; raise an error as ``end_batch`` does."""
        self.end_batch()


@dataclass(frozen=True)
class _BatchFlags:
    """Flags of a batch on the way to the host.

    Attributes:
        names: A name per weight set.
        flags: (weight sets,), bool, on the host; valid once the copy is complete.
        copied: Event after the copy; None where nothing is copied.
    """

    names: Sequence[str]
    flags: torch.Tensor
    copied: torch.cuda.Event | None

    @classmethod
    def send(cls, names: Sequence[str], flags: Sequence[torch.Tensor]) -> _BatchFlags:
        """Start the copy of flags to the host."""
        stacked = torch.stack(list(flags))
        if not stacked.is_cuda:
            return cls(names, stacked, None)
        # Non-blocking: torch copies to pinned memory, and the event tells when the copy is done.
        on_host = stacked.to("cpu", non_blocking=True)
        stream = torch.cuda.current_stream(stacked.device)
        return cls(names, on_host, stream.record_event())

    def wait(self) -> list[str]:
        """Wait for the flags, and return the names of weight sets that are not finite."""
        if self.copied is not None:
            self.copied.synchronize()
        names: list[str] = []
        for name, is_finite in zip(self.names, self.flags.tolist(), strict=True):
            if not is_finite:
                names.append(name)
        return names
