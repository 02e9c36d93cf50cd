"""Scoring of averages and ensembles of the same checkpoints in shared passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers, find_peers
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.output_distances import OutputDistances
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.session import score_on
from ckptavg.landscape.curves.verdict import PairComparison
from ckptavg.landscape.points import PointLike, PointScore, PointScorer

# Keys among the metrics of an ensemble.
OUTPUT_GAP, LAST_GAP = "output_gap", "last_gap"


@dataclass(frozen=True)
class JointScorer(PointScorer):
    """Scorer of averages and ensembles, which need the outputs of the same checkpoints.

    All points are scored at once, so that each checkpoint's outputs are computed once for all
    ensembles. Each ensemble is compared with the average of the same checkpoints.

    Attributes:
        comparisons: Comparison of each ensemble with its average, filled by ``score``.
    """

    comparisons: list[PairComparison] = field(default_factory=list, compare=False)

    def score(
        self,
        points: Sequence[PointLike],
        progress: PhaseProgress | None = None,
        on_scores: Callable[[Sequence[PointScore]], object] | None = None,
    ) -> list[PointScore]:
        """Score candidates, the first of which is a single checkpoint, see ``PointScorer.score``.

        The metrics of an ensemble have the distances of outputs besides, where these are known.

        Args:
            points: Candidates: a single checkpoint first, then averages and ensembles.
            progress: Called with phase, done and total, in samples times points.
            on_scores: Called after each pass with the scores so far.
        """
        if not points:
            return []
        peers = find_peers()
        candidates = self._candidates(points, 0)
        pairs = _pair_ensembles(candidates)
        gaps = [(ensemble, average) for ensemble, average in pairs]
        gaps += [(candidates[0], average) for _, average in pairs]
        distances = OutputDistances(gaps, self.task)
        averages = {id(ensemble): average for ensemble, average in pairs}
        sources, statistics = self._open_sources(peers)
        results = score_on(
            candidates, self.model, sources, self.runtime, statistics, task=self.task,
            forward=self.forward, exclude=self.exclude, progress=progress, peers=peers,
            as_points=True, baselines=[averages.get(id(c), c) for c in candidates],
            on_predictions=distances.add,
        )  # fmt: skip
        self._keep_comparisons(pairs, results[0])
        scores = self._with_gaps(candidates, pairs, self._scores(results), distances, peers)
        if on_scores is not None:
            on_scores(scores)
        return scores

    def _keep_comparisons(
        self, pairs: Sequence[tuple[Candidate, Candidate]], results: Sequence[Result]
    ) -> None:
        """Keep the comparison of each ensemble with the average of the same checkpoints."""
        of_candidate = {id(result.candidate): result for result in results}
        for ensemble, average in pairs:
            count = len(ensemble.checkpoints)
            self.comparisons.append(
                PairComparison(
                    f"the ensemble of {count}", f"the average of {count}",
                    of_candidate[id(ensemble)], of_candidate[id(average)], self.task,
                )
            )  # fmt: skip

    def _with_gaps(
        self,
        candidates: Sequence[Candidate],
        pairs: Sequence[tuple[Candidate, Candidate]],
        scores: Sequence[PointScore],
        distances: OutputDistances,
        peers: Peers,
    ) -> list[PointScore]:
        """Add the distances of outputs to the metrics of ensembles.

        Args:
            candidates: All candidates.
            pairs: Each ensemble with the average of the same checkpoints.
            scores: Score of each candidate.
            distances: Distances of each ensemble to its average, then of the single checkpoint to
                each average.
            peers: The processes that share the data.
        """
        known = distances.read(peers)
        gaps: dict[int, dict[str, float]] = {}
        for position, (ensemble, _) in enumerate(pairs):
            own = {OUTPUT_GAP: known[position], LAST_GAP: known[len(pairs) + position]}
            gaps[id(ensemble)] = {key: gap for key, gap in own.items() if gap is not None}
        completed: list[PointScore] = []
        for candidate, score in zip(candidates, scores, strict=True):
            data = {**score.data, **gaps.get(id(candidate), {})}
            completed.append(replace(score, data=data))
        return completed


def _pair_ensembles(candidates: Sequence[Candidate]) -> list[tuple[Candidate, Candidate]]:
    """Pair each ensemble with the average of the same checkpoints."""
    averages: dict[tuple[str, ...], Candidate] = {}
    for candidate in candidates:
        if candidate.kind != "ensemble":
            averages[_paths_of(candidate)] = candidate
    pairs: list[tuple[Candidate, Candidate]] = []
    for candidate in candidates:
        average = averages.get(_paths_of(candidate))
        if candidate.kind == "ensemble" and average is not None:
            pairs.append((candidate, average))
    return pairs


def _paths_of(candidate: Candidate) -> tuple[str, ...]:
    return tuple(str(checkpoint.path) for checkpoint in candidate.checkpoints)
