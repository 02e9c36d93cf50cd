"""Scoring of candidates in as few passes over the data as memory allows.

As many weight sets as fit in memory share a pass: weights are read (averages from the stream),
statistics recomputed over the training data where needed, and outputs scored. The models stay on
the device throughout. Outputs of an ensemble's members are computed once and shared with members
that are candidates themselves.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ckptavg.averaging.lora import exact_mean
from ckptavg.batchnorm.statistics_pass import recompute_statistics
from ckptavg.data.loaders import require_reiterable
from ckptavg.data.prefetch import prefetch_to_device, with_progress
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.evaluation.candidate_scores import CandidateScore, FiniteCheck, OnPredictions
from ckptavg.evaluation.candidates import Candidate, baseline_of, layers_of
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.scored_data import ScoredData
from ckptavg.evaluation.weight_sets import WeightSet, WeightSets, load_models, release_models
from ckptavg.formats.running_statistics import match_layers
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward, bytes_of, map_tensors, tensors_of
from ckptavg.models.load import unwrap_distributed
from ckptavg.models.memory_format import MemoryFormat
from ckptavg.models.oom_retry import OomSynchronizedPeers, log_pass_count, run_in_groups_that_fit
from ckptavg.models.runtime import Runtime, count_models_that_fit
from ckptavg.tasks import Task
from ckptavg.tasks.classification import Classification


def score(
    candidates: Sequence[Candidate],
    model: nn.Module,
    data: Batches,
    runtime: Runtime,
    training: Batches | None = None,
    *,
    task: Task | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    keep_nonfinite: bool = False,
    progress: PhaseProgress | None = None,
    peers: Peers | None = None,
    on_results: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """Score candidates as ``evaluate`` does, in the same order, on loaders that are open already.

    Args:
        candidates: The candidates to score.
        model: As for ``evaluate``.
        data: This process's batches of the evaluation data.
        runtime: Device, precision and batch size of the models.
        training: This process's batches of the training data; None without any.
        task: As for ``evaluate``.
        forward: As for ``evaluate``.
        exclude: As for ``evaluate``.
        keep_nonfinite: As for ``evaluate``.
        progress: Called as ``progress(phase, done, total)`` in samples; total is 0 where unknown.
        peers: The processes that share the data; this process alone where None.
        on_results: Called after each pass with the results so far, once the baseline is scored.

    Raises:
        UsageError: There are no candidates, or recomputing lacks training data.
        CkptavgError: As for ``evaluate``.
    """

    def report(results: Sequence[Sequence[Result]]) -> None:
        if on_results is not None:
            on_results(results[0])

    (results,) = score_on(
        candidates, model, {"evaluation": data}, runtime, training, task=task, forward=forward,
        exclude=exclude, keep_nonfinite=keep_nonfinite, progress=progress, peers=peers,
        on_results=report,
    )  # fmt: skip
    return results


def score_on(
    candidates: Sequence[Candidate],
    model: nn.Module,
    sources: Mapping[str, Batches],
    runtime: Runtime,
    training: Batches | None = None,
    *,
    task: Task | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    keep_nonfinite: bool = False,
    progress: PhaseProgress | None = None,
    peers: Peers | None = None,
    on_results: Callable[[Sequence[Sequence[Result]]], None] | None = None,
    as_points: bool = False,
    baselines: Sequence[Candidate] | None = None,
    sample_metric: str | None = None,
    on_predictions: OnPredictions | None = None,
) -> list[list[Result]]:
    """Score candidates on several data sets, with weights and statistics made once for all.

    Args:
        candidates: The candidates to score.
        model: As for ``evaluate``.
        sources: This process's batches of each data set, by the name that progress shows.
        runtime: Device, precision and batch size of the models.
        training: This process's batches of the training data; None without any.
        task: As for ``evaluate``.
        forward: As for ``evaluate``.
        exclude: As for ``evaluate``.
        keep_nonfinite: As for ``evaluate``.
        progress: As for ``score``.
        peers: As for ``score``.
        on_results: Called after each pass with the results so far on each data set.
        as_points: True for points of a landscape, which have no baseline. The results have the norm
            of the weights, and metrics of NaN where outputs are not finite.
        baselines: Baseline of each candidate, one of the candidates. Where None, the baseline is
            the last checkpoint of the run, else the first candidate; points have none.
        sample_metric: Key of the metric whose per-sample values are compared; the task's choice
            where None.
        on_predictions: Called with the predictions of each candidate on each batch of the first
            data set. A pass that runs out of memory is repeated, and so are the calls.

    Returns:
        The results on each data set, one per candidate.

    Raises:
        UsageError: As for ``score``.
        CkptavgError: As for ``evaluate``.
    """
    if not candidates:
        raise UsageError("there is nothing to evaluate")
    exact_mean.require_models(
        checkpoint for candidate in candidates for checkpoint in candidate.checkpoints
    )
    if training is None and any(c.recompute for c in candidates):
        raise UsageError("recomputing statistics needs training data (`train_loader`)")
    peers = peers or SingleProcess()
    task = task or Classification()
    if baselines is None and as_points:
        # A candidate that is its own baseline gets no comparison.
        baselines = candidates
    elif baselines is None:
        baselines = [baseline_of(candidates)] * len(candidates)
    session = _Session(
        candidates, baselines, unwrap_distributed(model), runtime, task, peers, sources,
        as_points=as_points,
    )  # fmt: skip
    session.forward = forward
    session.progress = progress or session.progress
    session.keep_nonfinite = keep_nonfinite or as_points
    session.sample_metric = sample_metric
    for score in session.scored[0].scores:
        score.on_predictions = on_predictions
    if exclude:
        session.excluded = match_layers(exclude, layers_of(candidates))
    with malloc.keep_freed_memory(runtime.device):
        return session.run(training, on_results or (lambda _: None))


class _Session:
    """One evaluation: candidates, their weight sets and the passes over the data."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        baselines: Sequence[Candidate],
        model: nn.Module,
        runtime: Runtime,
        task: Task,
        peers: Peers,
        sources: Mapping[str, Batches],
        *,
        as_points: bool = False,
    ) -> None:
        self.candidates = candidates
        self.model = model
        self.runtime = runtime
        self.task = task
        self.peers = OomSynchronizedPeers(peers)
        self.forward: Forward | None = None
        self.progress: PhaseProgress = lambda *_: None
        self.keep_nonfinite = False
        self.sample_metric: str | None = None
        self.as_points = as_points
        # Names of the weight sets of a pass whose outputs are not finite.
        self._holes: set[str] = set()
        self.excluded: Collection[str] = ()
        self.weight_sets = WeightSets(candidates)
        self.scored: list[ScoredData] = []
        for phase, data in sources.items():
            scored = ScoredData(
                phase, data, candidates, baselines, self.weight_sets, task, self.peers,
                runtime.seed, as_points=as_points,
            )  # fmt: skip
            self.scored.append(scored)
        self.memory_format = MemoryFormat(model, runtime.device, scoring=True)

    def run(
        self,
        training: Batches | None,
        on_results: Callable[[Sequence[Sequence[Result]]], None],
    ) -> list[list[Result]]:
        """Run one pass per group of weight sets.

        Args:
            training: This process's batches of the training data; None without any.
            on_results: Called with the results so far on each data set, once the baselines are
                scored; of points from the first pass on.

        Returns:
            The results on each data set, one per candidate.
        """
        if self.peers.world_size > 1:
            _require_state(self.task)
        # All processes must form the same groups, so the smallest device decides.
        size = min(self.peers.gather(count_models_that_fit(self.model, self.runtime.device)))
        # Baselines are scored first, since the other results include a comparison with them.
        baselines = self.scored[0].baselines
        baseline_members: set[WeightSet] = set()
        for baseline in baselines:
            baseline_members.update(baseline.members)
        groups = sorted(self.weight_sets.groups(size), key=baseline_members.isdisjoint)
        # Only the caller knows the number of all passes over points.
        if not self.as_points:
            log_pass_count(len(self.candidates), len(groups))
        for scored in self.scored:
            scored.data = require_reiterable(scored.data, len(groups))
        if training is not None:
            training_passes = sum(_recomputes(group) for group in groups)
            training = require_reiterable(training, training_passes)
        results: list[list[Result]] = []

        def run_pass(group: Sequence[WeightSet], number: int, of: int) -> None:
            """Score one group and publish the results so far.

            Args:
                group: The weight sets to score in one pass.
                number: Number of the pass, from 1.
                of: Number of all passes.
            """
            numbering = ""
            if of > 1:
                numbering = f", pass {number} of {of}"
            try:
                self._pass(group, training, numbering)
            finally:
                # Also after an out-of-memory error: the repeated pass needs the memory.
                release_models(group, self.runtime.device)
            results[:] = [scored.collect_results(group) for scored in self.scored]
            if self.as_points or all(baseline.complete for baseline in baselines):
                on_results([*results])

        run_in_groups_that_fit(groups, run_pass, self.runtime, self.peers)
        return results

    def _pass(
        self,
        group: Sequence[WeightSet],
        training: Batches | None,
        numbering: str,
    ) -> None:
        """Load the models of a group, recompute statistics where needed, and score."""
        load_models(group, self.model, self.runtime, keep_nonfinite=self.keep_nonfinite)
        if self.as_points:
            self._holes = set()
            for weight_set in group:
                weight_set.measure_norm()
        if training is not None and _recomputes(group):
            self._recompute(group, self._with_progress(training, f"BatchNorm{numbering}"))
        for scored in self.scored:
            # A pass that ran out of memory is repeated; ``begin`` discards its partial scores.
            for score in scored.scores:
                score.begin()
            batches = self._with_progress(scored.data, f"{scored.phase}{numbering}")
            self._score(group, scored, batches)
        # This exchange also tells each process whether another process ran out of memory.
        holes = set(chain.from_iterable(self.peers.gather(sorted(self._holes))))
        for weight_set in group:
            weight_set.is_hole = weight_set.name in holes
        for scored in self.scored:
            for score in scored.scores:
                score.commit(group)

    def _recompute(self, group: Sequence[WeightSet], training: Batches) -> None:
        """Recompute the statistics of the weight sets that ask for it."""
        chosen = [weight_set for weight_set in group if weight_set.recompute]
        recomputed = recompute_statistics(
            [weight_set.model for weight_set in chosen],
            [weight_set.describe_statistics() for weight_set in chosen],
            self.excluded,
            training,
            self.runtime,
            self._forward_on_batch,
            self.peers,
            keep_nonfinite=self.as_points,
        )
        for weight_set, (_, statistics) in zip(chosen, recomputed, strict=True):
            weight_set.statistics = statistics

    def _with_progress(self, batches: Batches, phase: str) -> Batches:
        return with_progress(
            batches, functools.partial(self.progress, phase), self.peers, self.runtime.seed
        )

    def _forward_on_batch(self, model: nn.Module, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        return self.task.run(model, batch)

    def _score(self, group: Sequence[WeightSet], scored: ScoredData, batches: Batches) -> None:
        """Score a group over one data set, which must be the same in every pass."""
        for weight_set in group:
            # Only after recomputing: on a CPU, channels_last makes statistics inaccurate.
            self.memory_format.place(weight_set.model)
        fingerprints: list[int] = []
        finite_check = FiniteCheck(self._holes if self.as_points else None)
        for number, batch in enumerate(prefetch_to_device(batches, self.runtime.device)):
            # Targets as loaded are on the host, so a checksum does not wait for the device.
            host_targets = self.task.part(self.model, batch.loaded)[1]
            fingerprints.append(_fingerprint(host_targets))
            scored.check_batch(number, fingerprints[-1])
            inputs, targets = self.task.part(self.model, batch.on_device)
            # A user's function gets the batch as the loader yields it, with the targets.
            if self.forward is not None:
                inputs = batch.on_device
            parts = _Parts(number, self.memory_format.to_device(inputs), targets, host_targets)
            for weight_set in group:
                self._score_batch(weight_set, parts, finite_check, scored.scores)
            for score in scored.scores:
                score.end_batch(number)
            finite_check.end_batch()
        finite_check.end()
        scored.end_pass(fingerprints)

    def _score_batch(
        self,
        weight_set: WeightSet,
        batch: _Parts,
        finite_check: FiniteCheck,
        scores: Sequence[CandidateScore],
    ) -> None:
        run = self.forward or self.task.forward

        def forward(inputs: Any) -> Any:
            """Run the model on inputs under autocast."""
            with self.runtime.autocast():
                return run(weight_set.model, inputs)

        with torch.inference_mode():
            outputs = self.task.watch(
                lambda: self.memory_format.run(forward, weight_set.model, batch.inputs)
            )
            self.task.check(outputs, batch.host_targets)
            predictions = self.task.predict(outputs, batch.targets)
            # Predictions are on the CPU if the device lacks float64.
            targets = map_tensors(batch.targets, lambda tensor: tensor.to(predictions.device))
            finite_check.add(weight_set.name, self.task.is_finite(predictions))
            if self.sample_metric is None:
                samples = self.task.samples(predictions, targets)
            else:
                samples = self.task.samples_of(self.sample_metric, predictions, targets)
            for score in scores:
                score.add(batch.number, weight_set, predictions, samples, targets)


def _recomputes(group: Sequence[WeightSet]) -> bool:
    """Return True if statistics of a group are to be recomputed."""
    return any(weight_set.recompute for weight_set in group)


@dataclass(frozen=True)
class _Parts:
    """Parts of a batch.

    Attributes:
        number: Position of the batch in the pass.
        inputs: Argument of the forward function, on the device.
        targets: Targets on the device.
        host_targets: Targets as the loader yielded them.
    """

    number: int
    inputs: Any
    targets: Any
    host_targets: Any


def _fingerprint(targets: Any) -> int:
    """Compute a checksum of targets, to recognize passes over different data."""
    checksum = 0
    for tensor in tensors_of(targets):
        checksum = zlib.crc32(bytes_of(tensor), checksum)
    return checksum


def _require_state(task: Task) -> None:
    """Make sure that the scores of a task can be merged across processes."""
    scores = task.scores()
    missing = [name for name in ("state", "merge") if not hasattr(scores, name)]
    if missing:
        raise EvaluationError(
            f"the scores of {type(task).__name__} have no {' and no '.join(missing)}, "
            "which several processes need to share scores",
            "Define these methods, or start a single process.",
        )
