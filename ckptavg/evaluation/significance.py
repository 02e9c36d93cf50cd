"""Whether a difference between candidates is more than noise, and what an ensemble's members add.

Candidates are scored on the same samples, so they are compared in pairs, sample by sample: what
makes a sample hard is common to both and cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ckptavg.errors import EvaluationError
from ckptavg.tasks.base import Samples
from ckptavg.tasks.metrics import Totals

RESAMPLES = 2000
GROUPS = 10_000  # what a bootstrap draws from at most
_CHUNK = 2**20  # draws at a time
_Z = 1.959963984540054  # standard deviations of a normal distribution's central 95 %
_ROUNDING = 1e-12  # of a sum of float64, relative to its terms


@dataclass(frozen=True)
class Difference:
    """By how much one candidate's metric exceeds another's on the same samples.

    Attributes:
        value: The difference, mine − other, in the unit of the samples' values.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p: How often chance alone makes a difference of at least this size, either way, between
            candidates that are equally good.
        test: What gave interval and p: ``mcnemar`` or ``bootstrap``.
        n: Samples that were compared.
    """

    value: float
    low: float
    high: float
    p: float
    test: str
    n: int

    def scaled(self, factor: float) -> Difference:
        """The difference in another unit: times a factor above 0, such as 100 for percentages."""
        ends = {name: factor * getattr(self, name) for name in ("value", "low", "high")}
        return replace(self, **ends)


def compare(mine: Samples, other: Samples, *, seed: int = 0) -> Difference:
    """Compare two candidates on the same samples.

    Right or wrong (values of 0 and 1 without weights): the difference of the proportions, the exact
    McNemar test (two-sided binomial on the samples that only one has right) and the adjusted
    interval of Agresti & Min (2005): half a sample is added to each cell of the 2 × 2 table.

    Anything else: the difference of ``values.sum() / weights.sum()``, the percentile interval of a
    paired bootstrap (Efron & Tibshirani 1993, ch. 13) of 2000 resamples, and a randomization test
    that exchanges the two candidates sample by sample (Noreen 1989), whose p is at least 1/2001
    (Phipson & Smyth 2010). Intervals of fewer than some tens of samples are too narrow; that of a
    single one has no width. Of more than 10 000 samples, that many random groups are resampled and
    exchanged instead of single ones, so time does not grow.

    The intervals and the tests are made in different ways, and may differ about a borderline case.

    Args:
        mine: One candidate's samples.
        other: The other's, in the same order.
        seed: Of the resampling.

    Raises:
        EvaluationError: The samples are none, or not the same, or not finite.
    """
    _check(mine, other)
    if mine.weights is None and _is_binary(mine.values) and _is_binary(other.values):
        return _compare_proportions(mine.values.bool().cpu(), other.values.bool().cpu())
    weights = torch.ones_like(mine.values) if mine.weights is None else mine.weights
    counted = weights.cpu() > 0  # a text of one token has none to predict
    differences = (_float64(mine.values) - _float64(other.values))[counted]
    return _compare_means(differences, _float64(weights)[counted], seed)


def _check(mine: Samples, other: Samples) -> None:
    if mine.metric != other.metric:
        raise EvaluationError(f"samples of {mine.metric} and {other.metric} cannot be compared")
    if mine.values.shape != other.values.shape or not _same(mine.weights, other.weights):
        raise EvaluationError("candidates that were scored on other samples cannot be compared")
    for values in (mine.values, other.values, mine.weights):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise EvaluationError("samples that are not finite cannot be compared")
    if not len(mine.values) or (mine.weights is not None and not bool((mine.weights > 0).any())):
        raise EvaluationError("the evaluation data is empty", "Check --data.")


def _same(mine: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return torch.equal(mine.cpu(), other.cpu())


def _is_binary(values: torch.Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _float64(values: torch.Tensor) -> torch.Tensor:
    return values.cpu().double()


def _compare_proportions(mine: torch.Tensor, other: torch.Tensor) -> Difference:
    only_mine, only_other = int((mine & ~other).sum()), int((other & ~mine).sum())
    n = len(mine)
    low, high = _agresti_min(only_mine, only_other, n)
    p = _mcnemar(only_mine, only_other)
    return Difference((only_mine - only_other) / n, low, high, p, "mcnemar", n)


def _agresti_min(only_mine: int, only_other: int, n: int) -> tuple[float, float]:
    """The 95 % interval "Wald+2" of Agresti & Min 2005, Statistics in Medicine 24, 729–740."""
    centre = (only_mine - only_other) / (n + 2)
    variance = only_mine + only_other + 1 - (only_mine - only_other) ** 2 / (n + 2)
    reach = _Z * math.sqrt(variance) / (n + 2)
    return max(-1.0, centre - reach), min(1.0, centre + reach)


def _mcnemar(only_mine: int, only_other: int) -> float:
    """Twice the smaller tail of a binomial of one half, up to 1: exact for any count.

    The tail is summed from its largest term outwards, each term from the one before. Terms beyond
    10·√n of them are less than e⁻¹⁹⁰ of the largest.
    """
    n, fewer = only_mine + only_other, min(only_mine, only_other)
    if n - 2 * fewer <= 1:
        return 1.0
    ways = math.lgamma(n + 1) - math.lgamma(fewer + 1) - math.lgamma(n - fewer + 1)
    terms = min(fewer, 10 * math.isqrt(n) + 10)
    at = torch.arange(fewer, fewer - terms, -1, dtype=torch.float64)
    tail = 1 + float((at / (n - at + 1)).cumprod(0).sum())
    return min(1.0, 2 * tail * math.exp(ways - n * math.log(2)))


def _compare_means(differences: torch.Tensor, weights: torch.Tensor, seed: int) -> Difference:
    generator = torch.Generator().manual_seed(seed)
    sums, sizes = _grouped(differences, weights, generator)
    resampled = torch.cat(
        [sums[drawn].sum(1) / sizes[drawn].sum(1) for drawn in _draws(len(sums), generator)]
    )
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(resampled, ends).tolist()
    p = _randomization(sums, generator)
    value = float(differences.sum() / weights.sum())
    return Difference(value, low, high, p, "bootstrap", len(differences))


def _grouped(
    differences: torch.Tensor, weights: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of samples' differences and weights in random groups of equal size, give or take one.

    Sums of random groups vary as their samples do: the variance of their mean is expected to be the
    same. With so many groups it is within 1 %, less than what 2000 resamples leave open.
    """
    n = len(differences)
    if n <= GROUPS:
        return differences, weights
    groups = torch.randperm(n, generator=generator) % GROUPS
    empty = torch.zeros(GROUPS, dtype=torch.float64)
    return empty.index_add(0, groups, differences), empty.index_add(0, groups, weights)


def _draws(n: int, generator: torch.Generator, below: int | None = None) -> Iterator[torch.Tensor]:
    """Rows of n random integers below a bound, n unless given: 2000 in all, some at a time."""
    rows = max(1, _CHUNK // n)
    for done in range(0, RESAMPLES, rows):
        size = (min(rows, RESAMPLES - done), n)
        yield torch.randint(n if below is None else below, size, generator=generator)


def _randomization(sums: torch.Tensor, generator: torch.Generator) -> float:
    """P of exchanging the candidates at random, which turns the signs of their differences."""
    total, extreme = float(sums.sum()), 0
    # Sums that are equal but for rounding, which is relative to their terms, are ties.
    least = abs(total) - _ROUNDING * float(sums.abs().sum())
    for turned in _draws(len(sums), generator, below=2):
        exchanged = total - 2 * (turned.double() @ sums)
        extreme += int((exchanged.abs() >= least).sum())
    return (extreme + 1) / (RESAMPLES + 1)


class Disagreement:
    """How often the members of an ensemble choose different classes, batch by batch.

    Members that always agree add nothing to each other, whatever their outputs; diverse ones are
    what makes an ensemble better than its members (Fort et al. 2019).

    Args:
        members: How many the ensemble has.
    """

    def __init__(self, members: int) -> None:
        self.members = members
        self.count = 0
        self._totals = Totals(2)  # pairs of members that differ; samples on which any two do
        self._waiting: dict[int, list[torch.Tensor]] = {}

    def add(self, batch: int, answers: torch.Tensor) -> None:
        """Take in a member's answers; its batch is counted once all members' are in.

        Args:
            batch: The batch's number; members may come in several passes over the data.
            answers: (N,) integers, the class that was chosen for each sample.
        """
        waiting = self._waiting.setdefault(batch, [])
        waiting.append(answers)
        if len(waiting) == self.members:
            found = [some.to(answers.device) for some in self._waiting.pop(batch)]
            self._count(torch.stack(found))

    def park(self) -> None:
        """Leave the device with what waits for further members."""
        for waiting in self._waiting.values():
            waiting[:] = [answers.cpu() for answers in waiting]

    def compute(self) -> dict[str, float]:
        """``disagreement``: the share of samples on which two members differ, mean over all pairs.

        ``not_unanimous`` is the share on which not all members agree, and ``n`` the samples.

        Raises:
            EvaluationError: There were no samples, or some lack members.
        """
        if self._waiting:
            raise EvaluationError("members of an ensemble have not answered all batches")
        if not self.count:
            raise EvaluationError("the evaluation data is empty", "Check --data.")
        differing, divided = self._totals.read().tolist()
        pairs = math.comb(self.members, 2)
        return {
            "disagreement": differing / (pairs * self.count) if pairs else 0.0,
            "not_unanimous": divided / self.count,
            "n": self.count,
        }

    def state(self) -> dict[str, Any]:
        """What has been counted, as plain values for JSON."""
        return {"n": self.count, "totals": self._totals.read().tolist()}

    def merge(self, state: dict[str, Any]) -> None:
        """Take in what another process has counted of the same members."""
        self.count += state["n"]
        self._totals.add(torch.tensor(state["totals"], dtype=torch.float64))

    def _count(self, answers: torch.Tensor) -> None:
        """Count a batch: answers of all members (members, N)."""
        self.count += answers.shape[1]
        differing = sum(
            ((answers[i] != answers[i + 1 :]).sum() for i in range(self.members - 1)),
            start=torch.zeros((), dtype=torch.int64, device=answers.device),
        )
        divided = (answers != answers[0]).any(0).sum()
        self._totals.add(torch.stack((differing, divided)).double())
