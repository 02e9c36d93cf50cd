"""Greedy soups (Wortsman et al. 2022): add the next best checkpoint where that does no harm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ckptavg.searching.families import Proposal, Recipe


@dataclass
class GreedySoup:
    """Greedy soup that is built in few rounds.

    The recipe tries one checkpoint after another, best first, and keeps it if the mean of what is
    kept is not worse with it (≥, as in the paper's code). A round proposes what the soup would be
    if the next checkpoints were all kept, so that one pass over the data answers for all up to the
    first that is not.

    Args:
        order: Positions of the checkpoints in the run, best first.
        count: Number of checkpoints of the run.
        score: Score of the first checkpoint; more is better.

    Attributes:
        kept: Positions in the soup so far.
    """

    order: Sequence[int]
    count: int
    score: float
    kept: list[int] = field(init=False)
    _next: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        self.kept = [self.order[0]]

    @property
    def is_done(self) -> bool:
        """True if every checkpoint was tried."""
        return self._next >= len(self.order)

    def propose(self, budget: int) -> list[Proposal]:
        """Propose the soups of a round.

        Args:
            budget: Largest number of proposals.
        """
        proposals: list[Proposal] = []
        kept = list(self.kept)
        for position in self.order[self._next : self._next + budget]:
            kept.append(position)
            proposals.append(self._soup_of(kept))
        return proposals

    def decide(self, scores: Sequence[float]) -> None:
        """Keep or drop the checkpoints of a round.

        Args:
            scores: Scores of the round's proposals, more is better. Those after the first drop are
                not looked at, as they contain what was dropped; nor are NaN kept.
        """
        for score in scores:
            position = self.order[self._next]
            self._next += 1
            # Not "less than": a score of NaN must not be kept.
            if not score >= self.score:
                return
            self.kept.append(position)
            self.score = score

    def result(self) -> Proposal:
        """Return the soup as it is."""
        return self._soup_of(self.kept)

    def _soup_of(self, kept: Sequence[int]) -> Proposal:
        positions = tuple(sorted(kept))
        coefficients = [0.0] * self.count
        for position in positions:
            coefficients[position] = 1 / len(positions)
        return Proposal(
            f"greedy soup of {len(positions)}", "soup", tuple(coefficients), len(positions),
            (len(positions),), Recipe(positions),
        )  # fmt: skip
