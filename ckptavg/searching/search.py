"""The search for the best average of a run, as Python calls it."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.schemes import RunRecord
from ckptavg.data.argument_checks import check_forward, check_model
from ckptavg.data.loaders import Subset, as_subset, classes_of
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_progress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors import EvaluationError
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.identity import EvaluationCall
from ckptavg.evaluation.significance import compare
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.runtime import Runtime
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.run import RunLike, as_run
from ckptavg.searching.election import Election, Scored, elect, measure_contributions
from ckptavg.searching.families import Catalogue, Proposal, SearchedFamily, check_families
from ckptavg.searching.plan import SearchPlan, find_metric
from ckptavg.searching.result import Judgement, SearchResult
from ckptavg.searching.scoring import ProposalScorer, Variant
from ckptavg.searching.soup import GreedySoup
from ckptavg.searching.split import Split, split_samples
from ckptavg.searching.store import ScoreStore
from ckptavg.searching.verdict import judge
from ckptavg.tasks import Metric, Samples, Task
from ckptavg.tasks.named import as_task

log = logging.getLogger("ckptavg")
FAMILIES: tuple[SearchedFamily, ...] = (
    "checkpoint", "window", "sliding", "ema", "linear", "wsm", "power", "soup",
)  # fmt: skip
# Share of the budget that the first, coarse round takes.
_COARSE = 0.6
# Candidates that a round of the greedy soup scores together.
_SOUP_ROUND = 8


def search(
    run: RunLike,
    model: nn.Module,
    data: Batches | Dataset[Any],
    *,
    train_data: Batches | Dataset[Any] | None = None,
    report_data: Batches | Dataset[Any] | None = None,
    select_fraction: float = 0.5,
    families: Iterable[str] = FAMILIES,
    budget: int = 64,
    metric: str | None = None,
    repeats: int = 0,
    task: Task | str | None = None,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    amp: str = "off",
    batch_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: ProgressLike = None,
) -> SearchResult:
    """Search the best average of a run, and judge it on samples that had no say in choosing it.

    The last checkpoint and each other one stand for election, too. Candidates share passes over
    the data. Of those that cannot be told from the best the simplest wins, so the last checkpoint
    does unless something is better.

    Args:
        run: The run, or its path; the average starts with the first checkpoint of it.
        model: A module that the weights fit; it does not change.
        data: Evaluation data, a Dataset or a loader that gives the same order each time.
        train_data: Training data, from which BatchNorm statistics are recomputed.
        report_data: Data that judge the winner. Where None, a part of ``data`` does, and the rest
            chooses.
        select_fraction: Share of ``data`` that chooses, where ``report_data`` is None.
        families: Names of ``ckptavg.searching.families.SearchedFamily``.
        budget: Largest number of candidates, each counted once for all ways of its statistics.
        metric: Key of the metric that decides; the task's first where None.
        repeats: Number of further splits, for ``stability``.
        task: As for ``evaluate``.
        device: As for ``evaluate``.
        forward: As for ``evaluate``.
        exclude: As for ``evaluate``.
        amp: As for ``evaluate``.
        batch_size: As for ``evaluate``.
        workers: As for ``evaluate``.
        seed: Seed of the split, of the test and of the training data's order.
        bn_samples: As for ``evaluate``.
        results: ``.json`` file for every candidate with its scores, written after each pass.
        resume: True to score only what ``results`` does not hold for the same weights, model, data
            and options.
        progress: As for ``evaluate``.

    Returns:
        Ranking, winner and verdict; printed as a table.

    Raises:
        UsageError: A family, the metric or an option is unknown, or there is a single checkpoint.
        EvaluationError: There are too few samples, or the task has no values per sample.
        CkptavgError: As for ``evaluate``.
    """
    check_model(model)
    check_forward(forward)
    task = as_task(task)
    size = task.batch_size if batch_size is None else batch_size
    runtime = Runtime.on(device, model, amp=amp, batch_size=size, workers=workers, seed=seed)
    call = EvaluationCall(
        model, data, train_data, task, forward, runtime, exclude, as_subset(bn_samples), True
    )
    plan = SearchPlan(
        as_run(run), call, find_metric(task, metric), check_families(families), budget,
        report_data, select_fraction, repeats,
    )  # fmt: skip
    store = ScoreStore(results, resume=resume, peers=find_peers())
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        result = _run(plan, store, reporter)
    result = replace(result, notes=tuple(notes))
    # Once more, now with ranking and verdict.
    store.save(result.as_json())
    return result


def _run(plan: SearchPlan, store: ScoreStore, progress: PhaseProgress | None) -> SearchResult:
    """Score, elect and judge."""
    searcher = _Searcher(plan, store, progress)
    candidates = searcher.score_all()
    election = searcher.elect(candidates, searcher.split)
    judgement = searcher.judge(election)
    difference = None
    if judgement is not None:
        difference = judgement.difference
    winner = election.winner
    others = sum(ranked.plateau for ranked in election.ranking) - 1
    proposal = winner.scored.proposal
    counts = plan.call.task.counts
    verdict = judge(winner.title, proposal.size, plan.metric, difference, others, counts)
    contributions: tuple[float | None, ...] = ()
    if "without-one" in plan.families:
        contributions = measure_contributions(election.ranking, len(plan.run))
    result = SearchResult(
        plan, election.ranking, winner, judgement, verdict, counts, len(searcher.split.selection),
        contributions=contributions,
        stability=searcher.split_anew(candidates),
    )  # fmt: skip
    return replace(result, command=result.write_code())


class _Searcher:
    """One search: the candidates scored so far, and the split of the samples."""

    def __init__(self, plan: SearchPlan, store: ScoreStore, progress: PhaseProgress | None) -> None:
        self.plan = plan
        self.store = store
        self.progress = progress
        self.names = short_names([checkpoint.path for checkpoint in plan.run])
        self.catalogue = Catalogue.of_run(RunRecord.of_run(plan.run), self.names, plan.families)
        for family, reason in self.catalogue.left_out.items():
            log.info("the family %s is left out: %s", family, reason)
        self.scorer = self._make_scorer(plan.call)
        self.scored: list[Scored] = []
        self._split: Split | None = None

    @property
    def split(self) -> Split:
        """The samples that choose, and those that judge."""
        if self._split is None:
            self._split = self._make_split(self.plan.seed)
        return self._split

    def score_all(self) -> list[Scored]:
        """Score candidates in rounds, coarse to fine, then soups, within the budget."""
        plan = self.plan
        soup_budget = 0
        # The soup needs the scores of single checkpoints, so its part is held back.
        if "soup" in plan.families:
            soup_budget = min(len(plan.run) - 1, plan.budget // 4)
        # The last checkpoint takes one place of the budget.
        coarse = round(_COARSE * (plan.budget - soup_budget)) - 1
        self._score([self.catalogue.last, *self.catalogue.first_round(max(coarse, 1))])
        if not self.scored[0].is_finite:
            raise EvaluationError(
                f"{self.catalogue.last.name}: the outputs are not finite, so nothing can be "
                "compared with it",
                "Leave it out of the run.",
            )
        remaining = plan.budget - soup_budget - self._count()
        proposals = [scored.proposal for scored in self.scored]
        self._score(self.catalogue.next_round(proposals, self._scores(self.scored), remaining))
        if soup_budget:
            self._make_soup(plan.budget - self._count())
        return self.scored

    def elect(self, candidates: Sequence[Scored], split: Split) -> Election:
        """Elect on the samples of a split that choose."""
        return elect(candidates, self.plan.metric, split.selection, seed=self.plan.seed)

    def _make_scorer(self, call: EvaluationCall) -> ProposalScorer:
        return ProposalScorer(
            self.plan.run, call, self.plan.metric, find_peers(), self.progress, self.store
        )

    def _count(self) -> int:
        """Return the number of proposals scored so far."""
        return len({scored.proposal for scored in self.scored})

    def _score(self, proposals: Sequence[Proposal]) -> list[Scored]:
        scored = self.scorer.score(self.scorer.variants(proposals))
        self.scored += scored
        return scored

    def _scores(self, scored: Iterable[Scored]) -> list[float]:
        """Return scores on the samples that choose, more is better; −∞ for what is not finite."""
        sign = -1.0 if self.plan.metric.higher is False else 1.0
        scores: list[float] = []
        for candidate in scored:
            score = sign * candidate.score(self.split.selection)
            scores.append(-math.inf if math.isnan(score) else score)
        return scores

    def _make_soup(self, budget: int) -> None:
        """Build the greedy soup from the checkpoints that were scored by themselves."""
        singles: dict[int, float] = {}
        for scored, score in zip(self.scored, self._scores(self.scored), strict=True):
            if scored.proposal.size == 1 and score > -math.inf:
                singles[scored.proposal.recipe.positions[0]] = score
        order = sorted(singles, key=lambda position: -singles[position])
        if len(order) < 2:
            return
        soup = GreedySoup(order, len(self.plan.run), singles[order[0]])
        while budget > 0 and not soup.is_done:
            proposals = soup.propose(min(budget, _SOUP_ROUND))
            budget -= len(proposals)
            soups = self._score(proposals)
            # The better way of the statistics counts.
            best = dict.fromkeys(proposals, -math.inf)
            for candidate, score in zip(soups, self._scores(soups), strict=True):
                best[candidate.proposal] = max(best[candidate.proposal], score)
            soup.decide(list(best.values()))
        if not soup.is_done:
            log.info("the budget ends the greedy soup before all checkpoints were tried")

    def judge(self, election: Election) -> Judgement | None:
        """Compare the winner with the last checkpoint on the samples that judge.

        Returns:
            The comparison; None if the last checkpoint won.
        """
        plan = self.plan
        # With equal weights there is nothing to compare.
        winner = election.winner.scored
        last = self.scored[0]
        if winner is last:
            return None
        samples = self.split.report
        # Only these two meet the data that judge: nothing else may learn from them.
        if plan.report_data is not None:
            winner, last = self._score_on_report_data(plan.report_data, winner, last)
            samples = torch.arange(len(winner.values))
        pair = [_samples_of(scored, samples, plan.metric) for scored in (winner, last)]
        difference = compare(pair[0], pair[1], seed=plan.seed).scale_by(winner.scale)
        metrics = {plan.metric.key: winner.score(samples), "n": float(len(samples))}
        return Judgement(metrics, last.proposal.name, difference)

    def _score_on_report_data(
        self, data: Batches | Dataset[Any], winner: Scored, last: Scored
    ) -> tuple[Scored, Scored]:
        """Score the winner, with its way of statistics, and the last checkpoint."""
        call = replace(self.plan.call, data=data)
        scorer = self._make_scorer(call)
        variants: list[Variant] = []
        for scored in (winner, last):
            for variant in scorer.variants([scored.proposal]):
                if bool(variant.candidate.recompute) == scored.is_recomputed:
                    variants.append(variant)
        first, second = scorer.score(variants)
        return first, second

    def split_anew(self, candidates: Sequence[Scored]) -> dict[str, int]:
        """Elect on further splits; return how often each family won."""
        wins: Counter[str] = Counter()
        for repeat in range(self.plan.repeats):
            split = self._make_split(self.plan.seed + 1 + repeat)
            wins[self.elect(candidates, split).winner.scored.proposal.family] += 1
        return dict(wins.most_common())

    def _make_split(self, seed: int) -> Split:
        """Divide the samples; with data that judge, all samples choose."""
        plan = self.plan
        count = len(self.scored[0].values)
        if plan.report_data is not None:
            return Split(torch.arange(count), torch.arange(0))
        classes = classes_of(plan.call.data)
        # Windows of tokens, say, are other samples than the items of the data.
        if classes is not None and len(classes) != count:
            classes = None
        return split_samples(count, classes, fraction=plan.select_fraction, seed=seed)


def _samples_of(scored: Scored, positions: torch.Tensor, metric: Metric) -> Samples:
    """Return the samples at some positions, for a comparison."""
    weights = None
    if scored.weights is not None:
        weights = scored.weights[positions]
    return Samples(scored.values[positions], weights, metric=metric.key, scale=scored.scale)
