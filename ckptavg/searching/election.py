"""Choice among scored candidates: the plateau of those that cannot be told from the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ckptavg.formats.running_statistics import RECOMPUTED
from ckptavg.searching.families import Proposal
from ckptavg.searching.permutation import adjusted_p_values
from ckptavg.tasks import Metric

# Candidates with a corrected p below this are worse than the best.
LEVEL = 0.05


@dataclass(frozen=True)
class Scored:
    """A proposal with one way of its BatchNorm statistics, scored on every sample.

    Attributes:
        proposal: The proposal.
        bn: State of its statistics: ``own``, ``stale``, ``recomputed``, ``none``, ...
        values: Contribution of each sample to the metric, (N,); empty if an output was not finite.
        weights: Share of each sample, (N,); None where all are alike.
        scale: Factor from the mean of the values to the metric's unit.
        metrics: All metrics on all samples, by key.
    """

    proposal: Proposal
    bn: str
    values: torch.Tensor = field(repr=False, compare=False)
    weights: torch.Tensor | None = field(default=None, repr=False, compare=False)
    scale: float = 1.0
    metrics: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def is_finite(self) -> bool:
        """False if an output was not finite."""
        return bool(len(self.values))

    @property
    def is_recomputed(self) -> bool:
        """True if the statistics were recomputed, all or some."""
        return self.bn in RECOMPUTED

    @property
    def complexity(self) -> tuple[int, int, bool]:
        """Order of simplicity: that of the proposal, then statistics as they are."""
        # Of an average, recomputed statistics are the sound ones: only a checkpoint has its own.
        is_extra = self.is_recomputed and self.proposal.size == 1
        return (*self.proposal.complexity, is_extra)

    def score(self, samples: torch.Tensor) -> float:
        """Return the metric on some samples; NaN where an output was not finite.

        Args:
            samples: Positions of the samples, (S,).
        """
        if not self.is_finite:
            return math.nan
        values = self.values[samples].double()
        if self.weights is None:
            return self.scale * float(values.mean())
        return self.scale * float(values.sum() / self.weights[samples].double().sum())


@dataclass(frozen=True)
class Ranked:
    """A candidate's place in the election.

    Attributes:
        scored: The candidate.
        select: The metric on the samples that choose; NaN where an output was not finite.
        p: Corrected p value of the best candidate's being better; 1 for the best.
        plateau: True if it cannot be told from the best.
    """

    scored: Scored
    select: float
    p: float
    plateau: bool

    @property
    def name(self) -> str:
        """Name in the ranking."""
        return self.scored.proposal.name

    @property
    def title(self) -> str:
        """Name in a sentence, which tells recomputed statistics of a single checkpoint."""
        if self.scored.is_recomputed and self.scored.proposal.size == 1:
            return f"{self.name} with recomputed statistics"
        return self.name


@dataclass(frozen=True)
class Election:
    """Result of an election.

    Attributes:
        ranking: All candidates, the best first, those without finite outputs last.
        winner: The simplest of the plateau.
    """

    ranking: tuple[Ranked, ...]
    winner: Ranked


def elect(
    candidates: Sequence[Scored], metric: Metric, samples: torch.Tensor, *, seed: int = 0
) -> Election:
    """Rank candidates on the samples that choose, and elect the simplest of the plateau.

    Simplest: fewest tuned numbers, then fewest checkpoints, then the better score. So the last
    checkpoint wins wherever it cannot be told from the best.

    Args:
        candidates: The candidates, the last checkpoint among them.
        metric: The metric, which says whether more is better.
        samples: Positions of the samples that choose, (S,).
        seed: Seed of the permutation test.
    """
    sign = -1.0 if metric.higher is False else 1.0
    finite = [candidate for candidate in candidates if candidate.is_finite]
    finite.sort(key=lambda candidate: -sign * candidate.score(samples))
    # The best of the ranking is the reference: equal candidates have differences of 0 to it.
    values = torch.stack([sign * candidate.values[samples].double() for candidate in finite])
    p_values = adjusted_p_values(values[0] - values, seed=seed).tolist()
    ranking: list[Ranked] = []
    for candidate, p in zip(finite, p_values, strict=True):
        ranking.append(Ranked(candidate, candidate.score(samples), p, p > LEVEL))
    plateau = [ranked for ranked in ranking if ranked.plateau]
    # The first of equals is the better one, as the ranking is in order.
    winner = min(plateau, key=lambda ranked: ranked.scored.complexity)
    # Named, not dropped: a diverged average is worth knowing of.
    for candidate in candidates:
        if not candidate.is_finite:
            ranking.append(Ranked(candidate, math.nan, 0.0, plateau=False))
    return Election(tuple(ranking), winner)


def measure_contributions(ranking: Sequence[Ranked], count: int) -> tuple[float | None, ...]:
    """Measure what each checkpoint contributes to the mean of all: the metric with it less without.

    Statistics count as recomputed where they were.

    Args:
        ranking: Candidates, among them the mean of all and the means of all but one.
        count: Number of checkpoints of the run.

    Returns:
        A difference per checkpoint in the metric's unit, None where a mean was not scored; empty if
        there is none at all.
    """
    scores: dict[tuple[int, ...], float] = {}
    for ranked in ranking:
        recipe = ranked.scored.proposal.recipe
        is_mean = recipe.scheme == "uniform" and recipe.weights is None
        # Stale and recomputed means are not compared with each other.
        if is_mean and (ranked.scored.is_recomputed or recipe.positions not in scores):
            scores[recipe.positions] = ranked.select
    everything = tuple(range(count))
    contributions: list[float | None] = []
    for position in everything:
        without = tuple(other for other in everything if other != position)
        if everything in scores and without in scores:
            contributions.append(scores[everything] - scores[without])
        else:
            contributions.append(None)
    if all(contribution is None for contribution in contributions):
        return ()
    return tuple(contributions)
