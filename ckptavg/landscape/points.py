"""Points in weight space, scored with statistics recomputed at each."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.plan import Average, plan_average, reweigh
from ckptavg.data.argument_checks import check_data, check_forward, check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader
from ckptavg.data.samplers import single_use_error
from ckptavg.display.pass_progress import PassProgress, duration_text
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers, find_peers
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.identity import EvaluationCall
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.resume import digest_of, keys_of
from ckptavg.evaluation.session import score_on
from ckptavg.landscape.landscape import L2_LOSS
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.runtime import Runtime, count_models_that_fit
from ckptavg.runs.run import Run
from ckptavg.tasks import Task
from ckptavg.tasks.named import as_task

log = logging.getLogger("ckptavg")
# A child of the logger above: shown as its notes are, and no remark on the results.
_timing = logging.getLogger("ckptavg.timing")

EVALUATION, TRAINING = "evaluation", "training data"
# Points of the first pass, and the most of any pass. Each pass has twice as many as the one before:
# the first tells the time soon, and little is lost when the work is interrupted. Beyond the most,
# reading the data takes a small part of the time anyway.
_FIRST_PASS, _LARGEST_PASS = 9, 128

PointLike: TypeAlias = "Sequence[float] | Candidate"
"""Coefficients, one per checkpoint with sum 1; or a candidate, for any other weights."""


Scorer = TypeVar("Scorer", bound="PointScorer")


@dataclass(frozen=True)
class PointScore:
    """Metrics of a point, by their keys.

    Attributes:
        data: Metrics on the evaluation data; all NaN for a hole, whose outputs are not finite.
        train: Metrics on the training data; None without any. With a weight decay λ, ``l2_loss`` is
            the loss plus λ/2·‖w‖² over all parameters.
        bn: State of the BatchNorm statistics that the point was scored with; empty where unknown.
        interval: 95 % interval of metrics on the evaluation data, by key.
    """

    data: Mapping[str, float]
    train: Mapping[str, float] | None
    bn: str = ""
    interval: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def is_hole(self) -> bool:
        """True if the outputs at the point are not finite."""
        values = (value for key, value in self.data.items() if key != "n")
        return all(not math.isfinite(value) for value in values)


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
        weight_decay: λ of the L2 term λ/2·‖w‖²; None for no such term.
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
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Refuse data for a single pass, and a weight decay that cannot be meant."""
        for data in (self.data, self.training):
            # A user's own loader may be its own iterator and start again.
            is_plain = type(data).__module__ in {"builtins", "itertools"}
            if isinstance(data, Iterator) and is_plain:
                raise single_use_error()
        decay = self.weight_decay
        if decay is None:
            return
        if not (isinstance(decay, (int, float)) and 0 <= decay < math.inf):
            raise UsageError(f"weight_decay is expected to be a number from 0 on but got {decay!r}")
        if self.training is None:
            raise UsageError(
                "`weight_decay` adds to the loss on training data, and there is none",
                "Pass `train_data`.",
            )
        if self.task.loss not in {metric.key for metric in self.task.metrics}:
            raise UsageError(
                f"`weight_decay` needs a loss to add to, and {type(self.task).__name__} names none",
                "Set `loss` of the task to the key of a metric.",
            )

    @classmethod
    def open(
        cls: type[Scorer],
        run: Run,
        model: nn.Module,
        data: Batches | Dataset[Any],
        *,
        train_data: Batches | Dataset[Any] | None = None,
        task: Task | str | None = None,
        device: str | torch.device | None = None,
        forward: Forward | None = None,
        exclude: str | Sequence[str] = (),
        amp: str = "off",
        batch_size: int | None = None,
        workers: int = 0,
        seed: int = 0,
        bn_samples: int | Subset | None = None,
        weight_decay: float | None = None,
    ) -> Scorer:
        """Make a scorer of the keywords of ``evaluate``.

        Args:
            run: The checkpoints.
            model: A module that the weights fit.
            data: Evaluation data.
            train_data: Training data, from which statistics are recomputed; None without any.
            task: As for ``evaluate``.
            device: As for ``evaluate``.
            forward: As for ``evaluate``.
            exclude: As for ``evaluate``.
            amp: As for ``evaluate``.
            batch_size: As for ``evaluate``.
            workers: As for ``evaluate``.
            seed: As for ``evaluate``.
            bn_samples: As for ``evaluate``.
            weight_decay: Factor λ of the L2 term λ/2·‖w‖² of the training loss; None without it.

        Raises:
            UsageError: An argument cannot be meant.
            EvaluationError: The device is not available, or data can be read only once.
        """
        check_model(model)
        check_forward(forward)
        check_data(data)
        if train_data is not None:
            check_data(train_data)
        task = as_task(task)
        size = task.batch_size if batch_size is None else batch_size
        runtime = Runtime.on(device, model, amp=amp, batch_size=size, workers=workers, seed=seed)
        return cls(
            run, model, data, train_data, task, runtime, forward, exclude, as_subset(bn_samples),
            weight_decay,
        )  # fmt: skip

    def score(
        self,
        points: Sequence[PointLike],
        progress: PhaseProgress | None = None,
        on_scores: Callable[[Sequence[PointScore]], object] | None = None,
    ) -> list[PointScore]:
        """Score points, many per pass over the data.

        A point that is a checkpoint keeps the checkpoint's own statistics, so that its scores are
        those of ``evaluate``. A point whose outputs are not finite is a hole: its metrics are NaN.

        Args:
            points: The points, the first ones first in time.
            progress: Called with phase, done and total, in samples times points.
            on_scores: Called after each pass with the scores of the points so far.

        Raises:
            CkptavgError: As for ``evaluate``.
        """
        peers = find_peers()
        sources, statistics = self._open_sources(peers)
        fit = min(peers.gather(count_models_that_fit(self.model, self.runtime.device)))
        sizes = _pass_sizes(len(points), max(1, fit))
        shown = PassProgress(progress or (lambda *_: None), len(points))
        scores: list[PointScore] = []
        started = time.monotonic()
        for size in sizes:
            start = len(scores)
            candidates = self._candidates(points[start : start + size], start)
            shown.begin(start, size)
            results = score_on(
                candidates, self.model, sources, self.runtime, statistics, task=self.task,
                forward=self.forward, exclude=self.exclude, progress=shown, peers=peers,
                as_points=True,
            )  # fmt: skip
            scores += self._scores(results)
            if on_scores is not None:
                on_scores(scores)
            if start == 0 and len(sizes) > 1:
                self._announce(len(points), len(sizes), (time.monotonic() - started) / size)
        return scores

    def identify(self) -> str:
        """Compute a digest of all that decides scores beside a point's own coefficients.

        These are the checkpoints' files, the model, the data and the options, as ``evaluate``
        recognizes them.
        """
        call = EvaluationCall(
            self.model, self.data, self.training, self.task, self.forward, self.runtime,
            self.exclude, self.subset, keep_nonfinite=True,
        )  # fmt: skip
        average = Candidate.of_average(self.run, recompute=self.training is not None)
        (key,) = keys_of([average], call.identify)
        return digest_of({"average": key, "weight_decay": self.weight_decay})

    def _open_sources(self, peers: Peers) -> tuple[dict[str, Batches], Batches | None]:
        """Open the data to score on, and the data of the statistics."""
        sources = {EVALUATION: open_loader(self.data, self.runtime, shuffle=False, peers=peers)}
        if self.training is None:
            return sources, None
        sources[TRAINING] = open_loader(self.training, self.runtime, shuffle=False, peers=peers)
        statistics = open_loader(
            self.training, self.runtime, shuffle=True, subset=self.subset, peers=peers
        )
        return sources, statistics

    def _candidates(self, points: Sequence[PointLike], start: int) -> list[Candidate]:
        """Return the candidates of points, numbered from a position on."""
        candidates: list[Candidate] = []
        for number, point in enumerate(points, start + 1):
            candidate = point if isinstance(point, Candidate) else self.candidate_at(point)
            # Holes are told by their names.
            candidates.append(replace(candidate, name=f"point {number}"))
        stale = [c for c in candidates if c.average is not None and c.average.batchnorm == "stale"]
        if stale and self.training is None:
            log.info(
                "the BatchNorm statistics of points between checkpoints are averages of the "
                "checkpoints' own, which are stale: pass `train_data` to recompute them"
            )
        return candidates

    def candidate_at(self, coefficients: Sequence[float]) -> Candidate:
        """Return the candidate of a point: a checkpoint, or an average of several.

        Args:
            coefficients: One per checkpoint of the run, with sum 1.
        """
        weighted = [position for position, value in enumerate(coefficients) if value]
        if len(weighted) == 1:
            return Candidate.of_checkpoint(self.run[weighted[0]], recompute=False)
        planned = self._plan(coefficients)
        has_stale = planned.batchnorm not in ("none", "frozen")
        return Candidate.of_average(planned, recompute=has_stale and self.training is not None)

    def _plan(self, coefficients: Sequence[float]) -> Average:
        """Plan the average of a point; points of the same checkpoints share the checks."""
        used = tuple(bool(value) for value in coefficients)
        if used in self._plans:
            return reweigh(self._plans[used], coefficients)
        planned = plan_average(self.run, weights=coefficients)
        self._plans[used] = planned
        return planned

    @cached_property
    def _plans(self) -> dict[tuple[bool, ...], Average]:
        """Plans by the checkpoints that have a coefficient other than 0."""
        return {}

    def _scores(self, results: Sequence[Sequence[Result]]) -> list[PointScore]:
        """Return the scores of the points of a pass."""
        scores: list[PointScore] = []
        for position, result in enumerate(results[0]):
            train = None
            if self.training is not None:
                train = self._with_l2(results[1][position])
            scores.append(PointScore(result.metrics, train, result.bn, result.interval))
        return scores

    def _with_l2(self, result: Result) -> dict[str, float]:
        """Add the loss with the L2 term to metrics on training data.

        The term is λ/2·‖w‖² over all parameters, as in the code of Garipov et al. 2018 and
        Izmailov et al. 2018 (``l2_regularizer``).
        """
        metrics = dict(result.metrics)
        norm = result.squared_norm
        if self.weight_decay is not None and self.task.loss is not None and norm is not None:
            metrics[L2_LOSS] = metrics[self.task.loss] + self.weight_decay / 2 * norm
        return metrics

    def _announce(self, points: int, passes: int, seconds_per_point: float) -> None:
        """Tell the time that the points will take, measured on the first of them."""
        _timing.info(
            "%d points in about %d passes over the data, at most about %s",
            points, passes, duration_text(seconds_per_point * points),
        )  # fmt: skip


def require_finite(scores: Sequence[PointScore]) -> None:
    """Refuse a landscape of holes, and note the number of holes among other points.

    Raises:
        EvaluationError: No point has finite outputs.
    """
    holes = sum(score.is_hole for score in scores)
    if not holes:
        return
    if holes == len(scores):
        raise EvaluationError(
            f"the outputs are not finite at any of {holes} points",
            "Look at the weights and the data; `amp='off'` may help.",
        )
    log.info("%d of %d points are holes: the outputs there are not finite", holes, len(scores))


def _pass_sizes(count: int, fit: int) -> list[int]:
    """Divide points into passes of growing size.

    Args:
        count: Number of points.
        fit: Number of models that memory holds.
    """
    sizes: list[int] = []
    size = min(_FIRST_PASS, fit)
    # Few points share a single pass.
    if count <= 2 * _FIRST_PASS:
        size = min(2 * _FIRST_PASS, fit)
    while count > 0:
        sizes.append(min(size, count))
        count -= size
        size = min(2 * size, _LARGEST_PASS, fit)
    return sizes
