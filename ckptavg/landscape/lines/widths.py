"""Widths of a minimum along rays, and their means with intervals over the directions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Exact 97.5 % quantiles of Student's t for few degrees of freedom, where the expansion is poor.
_QUANTILES = {1: 12.706204736432095, 2: 4.302652729911275, 3: 3.182446305284263}
# The same quantile of the normal distribution.
_Z = 1.959963984540054
# Level of the sign test.
_LEVEL = 0.05


@dataclass(frozen=True)
class MeanInterval:
    """Mean of independent values with its 95 % interval.

    Attributes:
        mean: The mean; NaN where a value is not finite.
        low: Lower end; NaN for a single value.
        high: Upper end; NaN for a single value.
    """

    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON; None for an end that is not known."""
        plain: dict[str, Any] = {"mean": self.mean, "low": None, "high": None}
        if not math.isnan(self.low):
            plain |= {"low": self.low, "high": self.high}
        return plain

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.mean:.4g}"
        return f"{self.mean:.4g} ({self.low:.4g} to {self.high:.4g})"


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Compute the mean of values, and its 95 % interval mean ± t·s/√n by Student's t.

    Args:
        values: At least one value.
    """
    if not all(map(math.isfinite, values)):
        return MeanInterval(math.nan, math.nan, math.nan)
    mean = statistics.fmean(values)
    if len(values) < 2:
        return MeanInterval(mean, math.nan, math.nan)
    reach = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return MeanInterval(mean, mean - reach, mean + reach)


def student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, to four digits.

    From four degrees of freedom on this is the expansion in powers of 1/ν around the normal
    quantile (Abramowitz & Stegun 1964, 26.7.5).

    Args:
        freedom: Degrees of freedom ν, at least 1.
    """
    if freedom in _QUANTILES:
        return _QUANTILES[freedom]
    z = _Z
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    quantile = z
    for power, term in enumerate(terms, 1):
        quantile += term / freedom**power
    return quantile


def find_crossing(
    positions: Sequence[float], losses: Sequence[float], threshold: float
) -> float | None:
    """Find the first position at which a loss reaches a threshold, by straight lines between.

    Args:
        positions: Distances along a ray, rising from 0.
        losses: The loss at each. One that is not finite lies above any threshold: the crossing is
            then the last position before, so that a width is never too large.
        threshold: The loss to reach.

    Returns:
        The position; None where the loss stays below.
    """
    before = 0
    for here, loss in enumerate(losses):
        if not math.isfinite(loss):
            return positions[before]
        if loss >= threshold:
            if here == before:
                return positions[here]
            share = (threshold - losses[before]) / (loss - losses[before])
            return positions[before] + share * (positions[here] - positions[before])
        before = here
    return None


@dataclass(frozen=True)
class Width:
    """Width of the minimum around a center: the distance at which the loss has risen.

    A width belongs to weights as they are. Where BatchNorm follows a layer, weights of twice the
    norm are the same function at twice the width (Dinh et al. 2017), so that the norms of two
    centers should be looked at, too.

    Attributes:
        center: Name of the center.
        each: The width in each direction; None where the loss does not rise enough.
    """

    center: str
    each: tuple[float | None, ...]

    @property
    def beyond(self) -> int:
        """Number of directions in which the loss does not rise enough."""
        return sum(width is None for width in self.each)

    @property
    def values(self) -> list[float]:
        """The widths that are known."""
        return [width for width in self.each if width is not None]

    @property
    def interval(self) -> MeanInterval | None:
        """Mean over the directions; None where a width is not known."""
        if self.beyond:
            return None
        return mean_interval(self.values)

    def difference(self, other: Width) -> MeanInterval | None:
        """Compute the mean of this width less another's, direction by direction.

        Both centers have the same directions, so the differences are paired, and what a direction
        does to both cancels.

        Returns:
            The mean difference; None where a width is not known.
        """
        if self.beyond or other.beyond:
            return None
        pairs = zip(self.values, other.values, strict=True)
        return mean_interval([mine - theirs for mine, theirs in pairs])

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        plain: dict[str, Any] = {"center": self.center, "mean": None, "low": None, "high": None}
        if self.interval is not None:
            plain |= self.interval.as_json()
        return plain | {"each": list(self.each), "beyond": self.beyond}


def describe_widths(widths: Sequence[Width], rise: str, radius: float) -> str:
    """Word the widths of centers in a sentence.

    Args:
        widths: Width of each center; the others are compared with the first.
        rise: The rise of the loss, in words.
        radius: Length of the rays.
    """
    first, *others = widths
    reached = [f"{rise} is reached {_describe_width(first, radius)} from {first.center}"]
    verdicts: list[str] = []
    for other in others:
        reached.append(f"{_describe_width(other, radius)} from {other.center}")
        verdicts.append(compare_widths(first, other).words)
    text = " and ".join(reached)
    if verdicts:
        text = f"{'; '.join(verdicts)}: {text}"
    count = len(first.each)
    if count == 1:
        text += " (in one direction)"
    elif any(width.interval is not None for width in widths):
        text += f" (mean and 95 % interval over {count} directions)"
    if any(width.beyond for width in widths):
        text += "; a larger `radius` tells more"
    return text


def _describe_width(width: Width, radius: float) -> str:
    if width.beyond == len(width.each):
        return f"nowhere within {radius:.4g}"
    if width.beyond:
        return f"in {len(width.each) - width.beyond} of {len(width.each)} within {radius:.4g}"
    return f"at t = {width.interval}"


@dataclass(frozen=True)
class WidthVerdict:
    """Comparison of the widths of two centers.

    Attributes:
        wider: Name of the wider one; None where they cannot be told apart.
        words: The verdict in words.
    """

    wider: str | None
    words: str


def compare_widths(first: Width, other: Width) -> WidthVerdict:
    """Compare the widths of two centers, direction by direction.

    Where all widths are known, the 95 % interval of their mean difference decides. Else, the sign
    test does (two-sided, at 5 %): a width that is not reached is greater than one that is, and
    directions in which both are not reached do not count.

    Args:
        first: Width of a center.
        other: Width of another center in the same directions.
    """
    difference = first.difference(other)
    wider = None
    if difference is not None:
        if difference.low > 0:
            wider = first.center
        elif difference.high < 0:
            wider = other.center
    else:
        wins, losses = _count_signs(first, other)
        if _sign_test(wins, losses) < _LEVEL:
            wider = first.center if wins > losses else other.center
    if wider is None:
        words = f"{first.center} and {other.center} cannot be told apart in width"
    elif wider == first.center:
        words = f"{first.center} is wider than {other.center}"
    else:
        words = f"{first.center} is not wider than {other.center} but narrower"
    return WidthVerdict(wider, words)


def _count_signs(first: Width, other: Width) -> tuple[int, int]:
    """Count the directions in which the first center is wider, and those in which the other is."""
    wins, losses = 0, 0
    for mine, theirs in zip(first.each, other.each, strict=True):
        mine_or_more = math.inf if mine is None else mine
        theirs_or_more = math.inf if theirs is None else theirs
        wins += mine_or_more > theirs_or_more
        losses += mine_or_more < theirs_or_more
    return wins, losses


def _sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p value of the sign test."""
    count = wins + losses
    tail = sum(math.comb(count, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2.0 * tail / float(2**count))
