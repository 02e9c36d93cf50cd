"""Scores of proposals on every sample, many per pass over the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ckptavg.averaging.plan import Average, plan_average
from ckptavg.data.loaders import open_loader
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.identity import EvaluationCall
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.resume import keys_of
from ckptavg.evaluation.session import score_on
from ckptavg.formats import Checkpoint
from ckptavg.runs.run import Run
from ckptavg.searching.election import Scored
from ckptavg.searching.families import Proposal
from ckptavg.searching.store import ScoreStore, restore
from ckptavg.tasks import Metric

log = logging.getLogger("ckptavg")
# States of statistics that training data can improve.
_RECOMPUTABLE = ("own", "stale")


@dataclass(frozen=True)
class Variant:
    """A proposal with one way of its BatchNorm statistics.

    Attributes:
        proposal: The proposal.
        candidate: The candidate that evaluation scores.
    """

    proposal: Proposal
    candidate: Candidate


class ProposalScorer:
    """Scores proposals of a run, each on every sample.

    An average whose statistics can be recomputed is scored with them as averaged and recomputed.

    Args:
        run: The checkpoints that coefficients are for.
        call: Model, data, training data, task and options.
        metric: The metric whose contribution per sample is recorded.
        peers: The processes that share the data.
        progress: Called with phase, done and total, in samples.
        store: Scores of an earlier search, and where new ones go.
    """

    def __init__(
        self,
        run: Run,
        call: EvaluationCall,
        metric: Metric,
        peers: Peers,
        progress: PhaseProgress | None,
        store: ScoreStore,
    ) -> None:
        self.run = run
        self.call = call
        self.metric = metric
        self.peers = peers
        self.progress = progress
        self.store = store

    def variants(self, proposals: Sequence[Proposal]) -> list[Variant]:
        """Return the candidates of proposals.

        Raises:
            CkptavgError: An average cannot be planned.
        """
        variants: list[Variant] = []
        for proposal in proposals:
            for candidate in self._candidates(proposal):
                variants.append(Variant(proposal, candidate))
        return variants

    def score(self, variants: Sequence[Variant]) -> list[Scored]:
        """Score candidates in as few passes as memory allows; stored scores are used.

        Raises:
            CkptavgError: As for ``evaluate``.
        """
        keys = [self._key_of(variant) for variant in variants]
        missing: list[Variant] = []
        for variant, key in zip(variants, keys, strict=True):
            if self.store.find(key) is None:
                missing.append(variant)
        key_of = {id(v.candidate): k for v, k in zip(variants, keys, strict=True)}
        new: dict[str, Scored] = {}

        def keep(results: Sequence[Sequence[Result]]) -> None:
            """Store the results of the passes so far."""
            by_candidate = {id(result.candidate): result for result in results[0]}
            for variant in missing:
                key = key_of[id(variant.candidate)]
                result = by_candidate.get(id(variant.candidate))
                # Later passes report the candidates of earlier ones again.
                if result is not None and key not in new:
                    new[key] = _as_scored(variant.proposal, result, self.metric)
                    self.store.add(key, new[key])
            self.store.save()

        if missing:
            self._score_on([variant.candidate for variant in missing], keep)
        scored: list[Scored] = []
        for variant, key in zip(variants, keys, strict=True):
            entry = self.store.find(key)
            if key in new:
                scored.append(new[key])
            elif entry is not None:
                scored.append(Scored(variant.proposal, **restore(entry)))
        return scored

    def _score_on(
        self,
        candidates: Sequence[Candidate],
        on_results: Callable[[Sequence[Sequence[Result]]], None],
    ) -> None:
        call, peers = self.call, self.peers
        training = None
        if call.training is not None and any(candidate.recompute for candidate in candidates):
            training = open_loader(
                call.training, call.runtime, shuffle=True, subset=call.subset, peers=peers
            )
        data = open_loader(call.data, call.runtime, shuffle=False, peers=peers)
        score_on(
            candidates,
            call.model,
            {"evaluation": data},
            call.runtime,
            training,
            task=call.task,
            forward=call.forward,
            exclude=call.excluded,
            progress=self.progress,
            peers=peers,
            on_results=on_results,
            # The search compares candidates itself, all at once.
            as_points=True,
            sample_metric=self.metric.key,
        )

    def _key_of(self, variant: Variant) -> str:
        """Return the key of a candidate's stored scores."""
        # Each by itself: beside a baseline the key would change with the round.
        (key,) = keys_of([variant.candidate], self.call.identify)
        return f"{key}-{self.metric.key}"

    def _candidates(self, proposal: Proposal) -> list[Candidate]:
        """Return a proposal's candidates: one, or one per way of its statistics."""
        positions = proposal.recipe.positions
        # A checkpoint keeps its own statistics, with which it was trained and saved.
        if proposal.size == 1:
            return self._candidates_of_checkpoint(proposal, self.run[positions[0]])
        average = self._plan(proposal)
        # Late, close checkpoints can do better with statistics as averaged, so both ways are tried.
        candidates = [Candidate.of_average(average, proposal.name, recompute=False)]
        if self.call.training is not None and average.batchnorm in _RECOMPUTABLE:
            candidates.append(Candidate.of_average(average, proposal.name, recompute=True))
        return candidates

    def _candidates_of_checkpoint(
        self, proposal: Proposal, checkpoint: Checkpoint
    ) -> list[Candidate]:
        """Return the candidate of a checkpoint; of the last one also with recomputed statistics.

        Lagging statistics may be all that is wrong with the last checkpoint, and then no average is
        needed.
        """
        is_last = proposal.family == "last"
        stored = Candidate.of_checkpoint(checkpoint, proposal.name, last=is_last, recompute=False)
        if not is_last or not self._is_recomputable:
            return [stored]
        return [stored, replace(stored, recompute=True)]

    @cached_property
    def _is_recomputable(self) -> bool:
        """True if there is training data, and the run has statistics that were not frozen."""
        if self.call.training is None:
            return False
        return plan_average(self.run).batchnorm in _RECOMPUTABLE

    def _plan(self, proposal: Proposal) -> Average:
        """Plan an average of the checkpoints that have a coefficient."""
        recipe = proposal.recipe
        members = [self.run[position] for position in recipe.positions]
        if recipe.weights is not None:
            return plan_average(members, weights=recipe.weights)
        return plan_average(members, scheme=recipe.scheme)


def _as_scored(proposal: Proposal, result: Result, metric: Metric) -> Scored:
    metrics = dict(result.metrics)
    if math.isnan(metrics[metric.key]):
        log.info("%s: the outputs are not finite", proposal.name)
        return Scored(proposal, result.bn, torch.empty(0), metrics=metrics)
    samples = result.samples
    if samples is None:
        raise EvaluationError(
            f"there are no values per sample of {metric.key}, by which candidates are compared",
            "Define `samples` of the task.",
        )
    weights = None
    if samples.weights is not None:
        weights = samples.weights.cpu()
    return Scored(proposal, result.bn, samples.values.cpu(), weights, samples.scale, metrics)
