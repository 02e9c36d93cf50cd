"""P values corrected for the number of candidates."""

import itertools

import torch

from ckptavg.searching import permutation
from ckptavg.searching.permutation import adjusted_p_values


def exact(differences):
    """Single-step and step-down p values over all 2ᴺ exchanges, by enumeration."""
    candidates, count = differences.shape
    scale = [sum(d * d for d in row) ** 0.5 for row in differences.tolist()]
    rows = [
        [d / s for d in row] if s else [0.0] * count
        for row, s in zip(differences.tolist(), scale, strict=True)
    ]
    observed = [sum(row) for row in rows]
    order = sorted(range(candidates), key=lambda k: -observed[k])
    p = [0.0] * candidates
    running = 0.0
    for rank, k in enumerate(order):
        rest, hits = order[rank:], 0
        for signs in itertools.product((-1, 1), repeat=count):
            largest = max(sum(s * d for s, d in zip(signs, rows[j], strict=True)) for j in rest)
            hits += largest >= observed[k] - 1e-9
        running = max(running, hits / 2**count)
        p[k] = running
    return torch.tensor(p)


def test_adjusted_p_values_match_enumeration(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(permutation, "RESAMPLES", 100_000)
    differences = torch.randn(4, 8) + torch.tensor([1.2, 0.6, 0.0, -0.3])[:, None]
    torch.testing.assert_close(
        adjusted_p_values(differences), exact(differences).double(), atol=6e-3, rtol=0
    )


def test_adjusted_p_value_of_equal_candidates_is_1():
    differences = torch.zeros(3, 50)
    assert adjusted_p_values(differences).tolist() == [1, 1, 1]


def test_adjusted_p_values_are_larger_than_unadjusted():
    torch.manual_seed(1)
    differences = torch.randn(30, 200) + 0.15
    together = adjusted_p_values(differences)
    for k in range(30):
        assert together[k] >= adjusted_p_values(differences[k : k + 1])[0] - 0.02


def test_adjusted_p_values_keep_the_level():
    """With 40 candidates that are all equally good, any is rejected in about 5 % of the data."""
    torch.manual_seed(2)
    rejected = 0
    for seed in range(200):
        reference = torch.randint(2, (120,))
        others = torch.randint(2, (40, 120))
        rejected += bool((adjusted_p_values(reference - others, seed=seed) <= 0.05).any())
    assert rejected <= 20  # P(more | 5 %) < 0.2 %


def test_adjusted_p_value_of_a_worse_candidate_is_small():
    torch.manual_seed(3)
    reference = (torch.rand(500) < 0.95).long()
    good, bad = (torch.rand(500) < 0.95).long(), (torch.rand(500) < 0.6).long()
    p = adjusted_p_values(torch.stack([reference - good, reference - bad]))
    assert p[0] > 0.05 > 0.001 > p[1]


def test_adjusted_p_values_are_the_same_for_any_chunk(monkeypatch):
    torch.manual_seed(4)
    differences = torch.randn(5, 64)
    whole = adjusted_p_values(differences, seed=7)
    monkeypatch.setattr(permutation, "_CHUNK", 64 * 8)
    assert torch.equal(adjusted_p_values(differences, seed=7), whole)
