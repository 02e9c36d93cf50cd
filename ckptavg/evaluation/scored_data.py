"""Scores of several candidates on one data set, accumulated over passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidate_scores import CandidateScore, concatenate_samples
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Comparison, Result
from ckptavg.evaluation.significance import compare
from ckptavg.evaluation.weight_sets import WeightSet, WeightSets
from ckptavg.formats.running_statistics import LAYERS
from ckptavg.models.batches import Batches
from ckptavg.tasks import Samples, Task


class ScoredData:
    """Scores of all candidates on one data set, accumulated over passes.

    Args:
        phase: Name of the data in the display of progress.
        data: This process's batches.
        candidates: The candidates.
        baselines: Per candidate, the candidate that it is compared with.
        weight_sets: The candidates' weight sets.
        task: The task that scores.
        peers: The processes that share the data.
        seed: Seed of the comparisons.
        as_points: True for points of a landscape, which get an interval and no comparison.
    """

    def __init__(
        self,
        phase: str,
        data: Batches,
        candidates: Sequence[Candidate],
        baselines: Sequence[Candidate],
        weight_sets: WeightSets,
        task: Task,
        peers: Peers,
        seed: int,
        *,
        as_points: bool = False,
    ) -> None:
        self.phase = phase
        self.data = data
        self.task = task
        self.peers = peers
        self.seed = seed
        self.as_points = as_points
        self.scores: list[CandidateScore] = []
        for candidate, members in zip(candidates, weight_sets.members, strict=True):
            self.scores.append(CandidateScore(candidate, members, task))
        self._baseline_of: dict[CandidateScore, CandidateScore] = {}
        for score, baseline in zip(self.scores, baselines, strict=True):
            self._baseline_of[score] = next(
                other for other in self.scores if other.candidate is baseline
            )
        # One checksum per batch of the first pass, to recognize other data in later passes.
        self._fingerprints: list[int] = []
        self._results: dict[CandidateScore, Result] = {}

    @property
    def baselines(self) -> set[CandidateScore]:
        """Scores of all candidates that others are compared with."""
        return set(self._baseline_of.values())

    def check_batch(self, number: int, fingerprint: int) -> None:
        """Make sure that a batch is the one that the first pass had at the same position.

        Raises:
            EvaluationError: The batch is another one.
        """
        if self._fingerprints and self._fingerprints[number : number + 1] != [fingerprint]:
            raise _another_order()

    def end_pass(self, fingerprints: list[int]) -> None:
        """Make sure that a pass had as many batches as the first pass.

        Raises:
            EvaluationError: The pass had fewer.
        """
        if self._fingerprints and len(fingerprints) != len(self._fingerprints):
            raise _another_order()
        self._fingerprints = fingerprints

    def collect_results(self, group: Sequence[WeightSet]) -> list[Result]:
        """Return the results of all candidates that are complete after the pass of a group."""
        complete = [score for score in self.scores if score.complete]
        for score in complete:
            if not score.finished.isdisjoint(group):
                score.merge(self.peers)
        for score in complete:
            result = self._results.get(score)
            # Results from before the baseline was scored lack a comparison and are made again.
            if result is None or (result.versus is None and self._baseline_of[score].complete):
                self._results[score] = self._result(score)
        return [self._results[score] for score in complete]

    def _result(self, score: CandidateScore) -> Result:
        if _is_hole(score):
            return self._hole(score)
        metrics = score.scores.compute()
        details = score.details()
        # The table needs both, which a user's own task may lack.
        missing = {"n", self.task.metrics[0].key} - metrics.keys()
        if missing:
            raise EvaluationError(
                f"the scores of {type(self.task).__name__} lack {', '.join(sorted(missing))}",
                "Let compute() return metrics by their keys, and n, the number of samples.",
            )
        state, layers = score.describe_statistics()
        if layers:
            details = details | {LAYERS: layers}
        samples = concatenate_samples(score.samples)
        interval = self.task.intervals(score.scores, samples)
        norm = score.members[0].squared_norm
        versus = self._compare(score, samples)
        result = Result(score.candidate, metrics, state, versus, details, interval, norm)
        if self.as_points:
            result = replace(result, samples=samples)
        return result

    def _hole(self, score: CandidateScore) -> Result:
        """Make the result of a point whose outputs are not finite: every metric is NaN."""
        metrics = {metric.key: math.nan for metric in self.task.metrics}
        try:
            computed = score.scores.compute()
        except (ArithmeticError, ValueError):
            # The sums are NaN, which a task need not be able to take.
            pass
        else:
            # A task may have no value for some metrics, such as top-5 for three classes.
            metrics = dict.fromkeys(computed, math.nan) | {"n": computed["n"]}
        state = score.describe_statistics()[0]
        norm = score.members[0].squared_norm
        return Result(score.candidate, metrics, state, squared_norm=norm)

    def _compare(self, score: CandidateScore, samples: Samples | None) -> Comparison | None:
        """Compare a candidate with its baseline; None where one of them has no samples yet."""
        baseline = self._baseline_of[score]
        if score is baseline or not baseline.complete or _is_hole(baseline):
            return None
        baseline_samples = concatenate_samples(baseline.samples)
        if samples is None or baseline_samples is None:
            return None
        difference = compare(samples, baseline_samples, seed=self.seed)
        metric = samples.metric or self.task.metrics[0].key
        return Comparison(baseline.candidate.name, metric, difference.scale_by(samples.scale))


def _is_hole(score: CandidateScore) -> bool:
    """Return True if outputs of a candidate are not finite."""
    return any(member.is_hole for member in score.members)


def _another_order() -> EvaluationError:
    return EvaluationError(
        "the data loader gives other samples, or another order, in each pass",
        "Use shuffle=False to evaluate.",
    )
