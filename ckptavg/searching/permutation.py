"""Tests of many candidates at once, corrected for their number."""

from __future__ import annotations

import torch

RESAMPLES = 2000
# Random signs drawn at a time, which bounds memory.
_CHUNK = 2**22
# Statistics that differ by less than this differ by rounding alone.
_ROUNDING = 1e-9


def adjusted_p_values(differences: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    """Test for each candidate whether a reference is better, corrected for all candidates.

    The statistic of a candidate is t = Σᵢ dᵢ / √(Σᵢ dᵢ²) over its differences d, one per sample. If
    both were equally good, exchanging them on any sample would change nothing but the sign of that
    sample's differences, for all candidates together. The largest statistic of all candidates under
    2000 random exchanges is what an observed one is held against (step-down max-T: Westfall & Young
    1993, algorithm 4.1), so that the probability of any wrong rejection is at most the level,
    however many candidates there are and however alike.

    Args:
        differences: (candidates, samples), the reference minus the candidate where more is better.
            For sums over tokens: the difference of the sums per sample.
        seed: Seed of the exchanges.

    Returns:
        One-sided p values, (candidates,), float64: small where the reference is better.
    """
    differences = differences.double()
    scale = differences.square().sum(1).sqrt()
    # A candidate that never differs has the statistic 0 in every exchange.
    scale[scale == 0] = torch.inf
    scaled = differences / scale[:, None]
    observed = scaled.sum(1)
    order = observed.argsort(descending=True)
    exceeding = torch.zeros(len(observed), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    count = differences.shape[1]
    rows = max(1, _CHUNK // max(1, count))
    for start in range(0, RESAMPLES, rows):
        shape = (min(rows, RESAMPLES - start), count)
        # The same signs for all candidates keep their correlation, which makes the test sharp.
        signs = torch.randint(2, shape, generator=generator).double().mul_(2).sub_(1)
        statistics = (signs @ scaled.T)[:, order]
        # Step down: a candidate is held against itself and those with smaller statistics.
        largest = statistics.flip(1).cummax(1).values.flip(1)
        exceeding += (largest >= observed[order] - _ROUNDING).sum(0)
    # The observed arrangement counts as one of the exchanges (Phipson & Smyth 2010).
    ordered = ((exceeding + 1) / (RESAMPLES + 1)).cummax(0).values
    adjusted = torch.empty_like(ordered)
    adjusted[order] = ordered
    return adjusted
