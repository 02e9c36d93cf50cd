"""Scores of everything that a report shows, from as few passes over the data as memory allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.averaging.plan import Average
from ckptavg.data.loaders import open_loader
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.evaluation.candidates import Candidate, candidates_of
from ckptavg.evaluation.results import Results, without_repeats
from ckptavg.evaluation.session import score_on
from ckptavg.landscape.points import EVALUATION, PointScorer
from ckptavg.runs.run import Run


@dataclass(frozen=True)
class Subject:
    """A run that a report is about, and the averages to judge.

    Attributes:
        run: The whole run.
        selection: The averaged checkpoints.
        average: The planned average of the selection.
        further: Further planned averages by name.
        each: True to list every selected checkpoint in the table.
        keep_nonfinite: True to allow averages that are not finite.
    """

    run: Run
    selection: Run
    average: Average
    further: Mapping[str, Average]
    each: bool = False
    keep_nonfinite: bool = False

    def candidates(self, *, recompute: bool) -> list[Candidate]:
        """List the candidates of the table.

        Args:
            recompute: True to add averages with recomputed BatchNorm statistics.
        """
        several = len(self.selection) > 1
        return candidates_of(
            self.run, self.selection, self.average, each=self.each, ensemble=several,
            recompute=recompute, further=self.further,
        )  # fmt: skip


def score_candidates(
    subject: Subject, scorer: PointScorer, progress: PhaseProgress | None = None
) -> Results:
    """Score the candidates of a report's table.

    Args:
        subject: The run and its averages.
        scorer: Model, data and settings.
        progress: Called with phase, done and total, in samples.

    Raises:
        CkptavgError: As for ``evaluate``.
    """
    candidates = subject.candidates(recompute=scorer.training is not None)
    return Results(without_repeats(_score(candidates, subject, scorer, progress)), scorer.task)


def _score(
    candidates: Sequence[Candidate],
    subject: Subject,
    scorer: PointScorer,
    progress: PhaseProgress | None,
) -> Results:
    """Score candidates on the evaluation data."""
    peers = find_peers()
    data = open_loader(scorer.data, scorer.runtime, shuffle=False, peers=peers)
    statistics = None
    if scorer.training is not None and any(candidate.recompute for candidate in candidates):
        statistics = open_loader(
            scorer.training, scorer.runtime, shuffle=True, subset=scorer.subset, peers=peers
        )
    (results,) = score_on(
        candidates,
        scorer.model,
        {EVALUATION: data},
        scorer.runtime,
        statistics,
        task=scorer.task,
        forward=scorer.forward,
        exclude=scorer.exclude,
        keep_nonfinite=subject.keep_nonfinite,
        progress=progress,
        peers=peers,
    )
    return Results(results, scorer.task)
