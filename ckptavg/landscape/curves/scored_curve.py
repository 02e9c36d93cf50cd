"""Curves whose points are scored with a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ckptavg.data.loaders import open_loader
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.session import score_on
from ckptavg.landscape.curves.named_runs import NamedRun, StepAxis, landmarks_of
from ckptavg.landscape.curves.series import (
    CHECKPOINTS,
    RUNNING,
    Stretch,
    average_of,
    candidates_by_coefficients,
    lines_of,
    list_stretches,
    series_name,
    window_name,
)
from ckptavg.landscape.curves.verdict import (
    Gap,
    PairComparison,
    advise_later_start,
    compare_ends,
    measure_gap,
)
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.points import EVALUATION, PointScore, PointScorer
from ckptavg.landscape.store import Scores, score_landscape


@dataclass(frozen=True)
class ScoredCurve:
    """A curve that is scored.

    Attributes:
        runs: The runs.
        axis: Coordinate of each checkpoint.
        window: Number of checkpoints of the sliding average; None for no such line.
        scorer: Scores the points.
    """

    runs: Sequence[NamedRun]
    axis: StepAxis
    window: int | None
    scorer: PointScorer

    @cached_property
    def stretches(self) -> list[Stretch]:
        """The points of all lines."""
        return list_stretches(self.runs, self.window)

    def score(
        self,
        results: str | os.PathLike[str] | None,
        *,
        resume: bool,
        progress: PhaseProgress | None,
        notes: Sequence[str],
    ) -> Landscape:
        """Score all points and compare the ends of the lines, see ``curve``.

        Args:
            results: File of the landscape; None for none.
            resume: True to continue the file.
            progress: Called with phase, done and total.
            notes: Remarks, which grow meanwhile.
        """
        total = len(self.axis.steps)
        recompute = self.scorer.training is not None
        candidates = candidates_by_coefficients(self.stretches, total, recompute=recompute)
        comparisons = self._compare_ends(progress)

        def build(scores: Scores) -> Landscape:
            return self.lay_out(scores, comparisons)

        return score_landscape(
            self.scorer, candidates, build, results=results, resume=resume, progress=progress,
            notes=notes,
        )  # fmt: skip

    def _compare_ends(self, progress: PhaseProgress | None) -> list[list[PairComparison]]:
        """Compare the end of each run's averages with the run's last checkpoint.

        Returns:
            Per run, the comparison of the running average, then that of the sliding average.
        """
        scorer = self.scorer
        recompute = scorer.training is not None
        candidates: list[Candidate] = []
        baselines: list[Candidate] = []
        for named in self.runs:
            last = Candidate.of_checkpoint(named.run[-1], recompute=False)
            averages = [average_of(named.run, recompute=recompute)]
            if self.window is not None:
                averages.append(average_of(named.run.last(self.window), recompute=recompute))
            candidates += [last, *averages]
            baselines += [last] * (1 + len(averages))
        results = self._score_on_evaluation(candidates, baselines, progress)
        per_run = len(results) // len(self.runs)
        comparisons: list[list[PairComparison]] = []
        for number, named in enumerate(self.runs):
            last_result, average, *others = results[number * per_run : (number + 1) * per_run]
            of_run = [compare_ends(len(named), average, last_result, scorer.task)]
            for other in others:
                name = f"the {window_name(len(other.candidate.checkpoints))}"
                of_run.append(
                    PairComparison(name, "the last checkpoint", other, last_result, scorer.task)
                )
            comparisons.append(of_run)
        return comparisons

    def _score_on_evaluation(
        self,
        candidates: Sequence[Candidate],
        baselines: Sequence[Candidate],
        progress: PhaseProgress | None,
    ) -> list[Result]:
        """Score candidates on the evaluation data alone, each against its baseline."""
        scorer, peers = self.scorer, find_peers()
        statistics = None
        if scorer.training is not None:
            statistics = open_loader(
                scorer.training, scorer.runtime, shuffle=True, subset=scorer.subset, peers=peers
            )
        (results,) = score_on(
            candidates, scorer.model,
            {EVALUATION: open_loader(scorer.data, scorer.runtime, shuffle=False, peers=peers)},
            scorer.runtime, statistics, task=scorer.task, forward=scorer.forward,
            exclude=scorer.exclude, progress=progress, peers=peers, as_points=True,
            baselines=baselines,
        )  # fmt: skip
        return results

    def lay_out(self, scores: Scores, comparisons: Sequence[Sequence[PairComparison]]) -> Landscape:
        """Lay out the points that have scores.

        Args:
            scores: Scores by coefficients over the checkpoints of all runs.
            comparisons: Per run, the running average against the last checkpoint, then further
                averages.
        """
        total = len(self.axis.steps)
        landmarks = landmarks_of(self.runs, self.axis)
        points: list[Point] = []
        averages: list[Landmark] = []
        for stretch in self.stretches:
            coefficients = stretch.coefficients(total)
            score = scores.get(coefficients)
            if score is None:
                continue
            x = self.axis.steps[stretch.last]
            points.append(
                Point(
                    x, None, coefficients, score.data, score.train, score.interval, stretch.series
                )
            )
            if stretch.stop == len(stretch.run) and stretch.start == 0:
                averages.append(
                    Landmark(
                        stretch.series, None, None, None, x, coefficients=coefficients,
                        data=score.data, train=score.train,
                    )
                )  # fmt: skip
            if stretch.series == series_name(self.runs, stretch.run, CHECKPOINTS):
                landmarks[stretch.last] = replace(
                    landmarks[stretch.last], data=score.data, train=score.train
                )
        return Landscape(
            kind="curve",
            axes=(self.axis.title, ""),
            metrics=tuple(self.scorer.task.metrics),
            points=tuple(points),
            checkpoints=tuple(landmarks),
            averages=tuple(averages),
            facts=self._facts(scores, comparisons),
        )

    def _facts(
        self, scores: Scores, comparisons: Sequence[Sequence[PairComparison]]
    ) -> Mapping[str, Any]:
        """Return the verdict in numbers and in words."""
        sentences: list[str] = []
        plain: list[dict[str, Any]] = []
        gaps: list[Gap] = []
        for named, of_run in zip(self.runs, comparisons, strict=True):
            words = [comparison.describe() for comparison in of_run]
            for comparison in of_run:
                entry = comparison.as_json("average", "last")
                plain.append({"run": named.name, "count": comparison.count, **entry})
            checkpoints, average = self._scores_of(named, scores)
            if average is not None:
                words += advise_later_start(of_run[0], checkpoints)
                gap = measure_gap(named.name, checkpoints, average, self.scorer.task)
                if gap is not None:
                    gaps.append(gap)
                    words.append(gap.describe())
            prefix = f"{named.name}: " if len(self.runs) > 1 else ""
            sentences += [f"{prefix}{text}" for text in words]
        return {
            "comparisons": plain,
            "gaps": [gap.as_json() for gap in gaps],
            "lines": lines_of(self.runs, self.window, scored=True),
            "sentences": sentences,
            "text": ". ".join(sentences),
        }

    def _scores_of(
        self, named: NamedRun, scores: Scores
    ) -> tuple[list[PointScore], PointScore | None]:
        """Return the scores of a run's checkpoints, and of the average of all.

        The average is None before all points are scored.
        """
        total = len(self.axis.steps)
        checkpoints: list[PointScore] = []
        average: PointScore | None = None
        for stretch in self.stretches:
            if stretch.run is not named:
                continue
            score = scores.get(stretch.coefficients(total))
            if score is None:
                return checkpoints, None
            if stretch.series == series_name(self.runs, named, CHECKPOINTS):
                checkpoints.append(score)
            elif stretch.series == series_name(self.runs, named, RUNNING):
                average = score
        return checkpoints, average
