"""Points in weight space, scored with statistics recomputed at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset, open_loader
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.session import score_on
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.runtime import Runtime
from ckptavg.runs.run import Run
from ckptavg.tasks import Task

EVALUATION, TRAINING = "evaluation", "training data"


@dataclass(frozen=True)
class PointScore:
    """Metrics of a point, by their keys.

    Attributes:
        data: Metrics on the evaluation data.
        train: Metrics on the training data; None without any.
        bn: State of the BatchNorm statistics that the point was scored with.
    """

    data: Mapping[str, float]
    train: Mapping[str, float] | None
    bn: str


@dataclass(frozen=True)
class PointScorer:
    """Model, data and settings by which points of a run are scored.

    Attributes:
        run: The checkpoints.
        model: A module that the weights fit; it does not change.
        data: Evaluation data.
        training: Training data: statistics are recomputed from it, and the loss is measured on it.
        task: The task that scores.
        runtime: Device, precision and loading of the data.
        forward: As for ``evaluate``.
        exclude: Shell patterns of layers that keep their statistics.
        subset: Training samples that the statistics are recomputed from; all where None.
    """

    run: Run
    model: nn.Module
    data: Batches | Dataset[Any]
    training: Batches | Dataset[Any] | None
    task: Task
    runtime: Runtime
    forward: Forward | None = None
    exclude: str | Sequence[str] = ()
    subset: Subset | None = None

    def score(
        self,
        points: Sequence[Sequence[float]],
        progress: PhaseProgress | None = None,
    ) -> list[PointScore]:
        """Score points, as many per pass over the data as memory holds.

        A point that is a checkpoint keeps the checkpoint's own statistics, so that its scores are
        those of ``evaluate``.

        Args:
            points: Coefficients of each point, one per checkpoint, with sum 1.
            progress: Called with phase, done and total, in samples.

        Raises:
            CkptavgError: As for ``evaluate``.
        """
        peers = find_peers()
        candidates = [self._candidate(coefficients) for coefficients in points]
        sources = {EVALUATION: open_loader(self.data, self.runtime, shuffle=False, peers=peers)}
        statistics = None
        if self.training is not None:
            sources[TRAINING] = open_loader(self.training, self.runtime, shuffle=False, peers=peers)
            if any(candidate.recompute for candidate in candidates):
                statistics = open_loader(
                    self.training, self.runtime, shuffle=True, subset=self.subset, peers=peers
                )
        results = score_on(
            candidates,
            self.model,
            sources,
            self.runtime,
            statistics,
            task=self.task,
            forward=self.forward,
            exclude=self.exclude,
            progress=progress,
            peers=peers,
        )
        scores: list[PointScore] = []
        for position, result in enumerate(results[0]):
            train = results[1][position].metrics if self.training is not None else None
            scores.append(PointScore(result.metrics, train, result.bn))
        return scores

    def _candidate(self, coefficients: Sequence[float]) -> Candidate:
        """Return the candidate of a point: a checkpoint, or an average of several."""
        weighted = [position for position, value in enumerate(coefficients) if value]
        if len(weighted) == 1:
            return Candidate.of_checkpoint(self.run[weighted[0]], recompute=False)
        recompute = self.training is not None
        return Candidate.of_average(self.run, weights=coefficients, recompute=recompute)
