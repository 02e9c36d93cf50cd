"""Paired comparisons against scipy and exact enumeration; disagreement against counting by hand."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from waiting import NoWaiting

from ckptavg.errors import EvaluationError
from ckptavg.evaluation import significance
from ckptavg.evaluation.significance import Difference, Disagreement, compare
from ckptavg.tasks import Samples


def right_or_wrong(both, only_mine, only_other, neither):
    mine = [1] * both + [1] * only_mine + [0] * only_other + [0] * neither
    other = [1] * both + [0] * only_mine + [1] * only_other + [0] * neither
    return tuple(Samples(torch.tensor(v, dtype=torch.uint8)) for v in (mine, other))


def values(n, seed=0, shift=0.0, spread=1.0):
    generator = np.random.default_rng(seed)
    hard = generator.exponential(size=n)
    pairs = (hard + spread * generator.normal(size=n) + s for s in (shift, 0.0))
    return tuple(Samples(torch.tensor(v)) for v in pairs)


# Right or wrong


@settings(max_examples=60, deadline=None)
@given(*(st.integers(0, 60) for _ in range(3)), st.integers(1, 60))
def test_mcnemar_matches_scipys_binomial_test(both, only_mine, only_other, neither):
    found = compare(*right_or_wrong(both, only_mine, only_other, neither))
    discordant, n = only_mine + only_other, both + only_mine + only_other + neither
    expected = stats.binomtest(only_mine, discordant).pvalue if discordant else 1
    assert found.p == pytest.approx(expected, rel=1e-12)
    assert found.value == pytest.approx((only_mine - only_other) / n, rel=1e-15)
    assert (found.test, found.n) == ("mcnemar", n)
    assert -1 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("only_mine", "only_other"), [(0, 7), (3, 9), (5, 5), (6, 5), (30, 11)])
def test_mcnemar_is_the_exact_sum_of_binomial_terms(only_mine, only_other):
    n, fewer = only_mine + only_other, min(only_mine, only_other)
    tail = Fraction(sum(math.comb(n, i) for i in range(fewer + 1)), 2**n)
    found = compare(*right_or_wrong(3, only_mine, only_other, 4)).p
    assert found == pytest.approx(float(min(1, 2 * tail)), rel=1e-13)


@pytest.mark.parametrize("n", [1000, 100_000, 10_000_000])
@pytest.mark.parametrize("sigmas", [0.1, 1, 3, 8, 30])
def test_mcnemar_of_many_samples_matches_scipy(n, sigmas):
    fewer = max(0, int(n / 2 - sigmas * math.sqrt(n) / 2))
    expected = 2 * stats.binom.cdf(fewer, n, 0.5)
    assert significance._mcnemar(n - fewer, fewer) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_mcnemar_of_a_huge_difference_is_zero():
    assert significance._mcnemar(1_000_000, 0) == 0


def test_interval_is_that_of_agresti_and_min():
    """Half a sample more in each cell of the table, then the interval of a plain Wald test."""
    both, only_mine, only_other, neither = (Fraction(c) + Fraction(1, 2) for c in (40, 12, 5, 9))
    n = both + only_mine + only_other + neither
    centre = (only_mine - only_other) / n
    reach = 1.959964 * math.sqrt(((only_mine + only_other) / n - centre**2) / n)
    found = compare(*right_or_wrong(40, 12, 5, 9))
    assert found.low == pytest.approx(float(centre) - reach, rel=1e-6)
    assert found.high == pytest.approx(float(centre) + reach, rel=1e-6)


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.05, 0.15), (0.02, 0.02), (0.4, 0.2)])
def test_interval_covers_true_difference_in_95_percent(shares):
    """Exactly: the probability of all tables of 60 samples whose interval holds the truth."""
    n, (mine, other) = 60, shares
    covered = sum(
        stats.multinomial.pmf([b, c, n - b - c], n, [mine, other, 1 - mine - other])
        for b, c in itertools.product(range(n + 1), repeat=2)
        if b + c <= n
        and (ends := significance._agresti_min(b, c, n))
        and ends[0] <= mine - other <= ends[1]
    )
    assert 0.935 <= covered <= 0.999


def test_interval_stays_within_possible_differences():
    assert compare(*right_or_wrong(0, 1, 0, 0)).high == 1
    assert compare(*right_or_wrong(0, 0, 1, 0)).low == -1


def test_compare_takes_binary_values_of_any_dtype():
    mine, other = right_or_wrong(20, 8, 2, 5)
    expected = compare(mine, other)
    for dtype in (torch.bool, torch.int64, torch.float32, torch.float64):
        assert compare(Samples(mine.values.to(dtype)), Samples(other.values.to(dtype))) == expected


# Anything else


def test_bootstrap_matches_scipy():
    mine, other = values(200, shift=0.2)
    found = compare(mine, other)
    differences = (mine.values - other.values).numpy()
    expected = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=0
    )
    sigma = expected.standard_error
    assert found.test == "bootstrap"
    assert found.value == pytest.approx(differences.mean(), rel=1e-12)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.15 * sigma)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.15 * sigma)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2])
def test_bootstrap_p_matches_scipys_permutation_test(shift):
    mine, other = values(100, shift=shift, seed=3)
    expected = stats.permutation_test(
        (mine.values.numpy(), other.values.numpy()),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        n_resamples=20_000,
        rng=0,
    ).pvalue
    assert compare(mine, other).p == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("differences", [[1.0, 2.0, 3.0], [0.1, 0.2, -0.3], [0.3, 0.3, 0.3, -0.3]])
def test_bootstrap_p_of_few_samples_matches_enumeration(differences):
    """With ties, which rounding must not split."""
    total = abs(sum(Fraction(str(d)) for d in differences))
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    sums = (
        sum(s * Fraction(str(d)) for s, d in zip(row, differences, strict=True)) for row in signs
    )
    expected = sum(abs(s) >= total for s in sums) / len(signs)
    mine = Samples(torch.tensor(differences, dtype=torch.float64))
    found = compare(mine, Samples(torch.zeros(len(differences))))
    assert found.p == pytest.approx(expected, abs=0.035)


def with_weights(n, seed=0, better=0.0):
    """NLL sums of texts whose lengths vary widely, as a language model's."""
    generator = np.random.default_rng(seed)
    tokens = torch.tensor(generator.integers(1, 2000, n))
    hard = torch.tensor(generator.gamma(9, 1 / 3, n))
    noise = torch.tensor(generator.normal(size=n)) * tokens.sqrt()
    mine, other = tokens * (hard - better) + noise, tokens * hard
    return tuple(Samples(v, weights=tokens) for v in (mine, other)), tokens.double()


def test_compare_divides_by_sum_of_weights():
    (mine, other), tokens = with_weights(300, better=0.02)
    found = compare(mine, other)
    differences = (mine.values - other.values).numpy()
    expected = stats.bootstrap(
        (differences, tokens.numpy()),
        lambda d, w, axis: d.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=0,
    )
    sigma = expected.standard_error
    assert found.value == pytest.approx(differences.sum() / float(tokens.sum()), rel=1e-12)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.15 * sigma)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.15 * sigma)


def test_compare_ignores_samples_without_weight():
    (mine, other), _ = with_weights(50)
    padded = [
        Samples(torch.cat((s.values, torch.zeros(30))), torch.cat((s.weights, torch.zeros(30))))
        for s in (mine, other)
    ]
    assert compare(*padded) == compare(mine, other)


def test_compare_bootstraps_binary_values_with_weights():
    mine, other = right_or_wrong(20, 8, 2, 5)
    weights = torch.ones(35)
    found = compare(Samples(mine.values, weights), Samples(other.values, weights))
    assert found.test == "bootstrap"
    assert found.value == pytest.approx(6 / 35)


@pytest.mark.slow
def test_bootstrap_of_groups_matches_single_samples(monkeypatch):
    """Sorted, so that neighbours in a group would be alike."""
    mine, other = values(20_000, shift=0.01)
    order = (mine.values - other.values).argsort()
    mine, other = Samples(mine.values[order]), Samples(other.values[order])
    grouped = compare(mine, other)
    monkeypatch.setattr(significance, "GROUPS", 20_000)
    single = compare(mine, other)
    sigma = float((mine.values - other.values).std()) / math.sqrt(20_000)
    assert grouped.value == single.value
    assert grouped.low == pytest.approx(single.low, abs=0.2 * sigma)
    assert grouped.high == pytest.approx(single.high, abs=0.2 * sigma)
    assert grouped.p == pytest.approx(single.p, abs=0.05)


@pytest.mark.slow
def test_bootstrap_rarely_finds_differences_among_equals():
    """Of 200 comparisons, 10 ± 3 are to have an interval without 0, and as many a p below 5 %."""
    found = [compare(*values(40, seed=i)) for i in range(200)]
    assert 2 <= sum(not d.low <= 0 <= d.high for d in found) <= 24
    assert 2 <= sum(d.p < 0.05 for d in found) <= 20


def test_bootstrap_interval_follows_the_seed():
    pair = values(100)
    assert compare(*pair) == compare(*pair, seed=0)
    assert compare(*pair).low != compare(*pair, seed=1).low


def test_compare_leaves_random_state_unchanged():
    before = torch.get_rng_state()
    compare(*values(100))
    assert torch.equal(torch.get_rng_state(), before)


# Whatever the samples


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=8))
def test_compare_is_antisymmetric(pairs):
    mine, other = (Samples(torch.tensor(v, dtype=torch.float64)) for v in zip(*pairs, strict=True))
    one, turned = compare(mine, other), compare(other, mine)
    assert turned.value == pytest.approx(-one.value)
    assert (turned.low, turned.high) == pytest.approx((-one.high, -one.low), abs=1e-12)
    assert turned.p == one.p


@pytest.mark.parametrize("pair", [right_or_wrong(20, 0, 0, 15), values(30, spread=0.0)])
def test_compare_finds_no_difference_between_equals(pair):
    found = compare(*pair)
    assert found.value == 0
    assert found.p == 1
    assert found.low <= 0 <= found.high


def test_interval_of_equal_binary_values_has_width():
    found = compare(*right_or_wrong(20, 0, 0, 15))
    assert found.low == -found.high
    assert found.high == pytest.approx(1.96 / 37, rel=1e-4)


@pytest.mark.parametrize("pair", [right_or_wrong(0, 1, 0, 0), values(1)])
def test_compare_of_one_sample_gives_p_1(pair):
    assert compare(*pair).p == 1


def test_difference_scale_by_changes_the_unit():
    found = Difference(0.01, -0.02, 0.04, 0.3, "mcnemar", 50).scale_by(100)
    assert found == Difference(1.0, -2.0, 4.0, 0.3, "mcnemar", 50)


def bad(mine, other, weights=None, others_weights=None):
    as_tensors = [torch.tensor(v) for v in (mine, other)]
    pair = zip(as_tensors, (weights, others_weights), strict=True)
    return [Samples(v, None if w is None else torch.tensor(w)) for v, w in pair]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (bad([], []), "data is empty"),
        (bad([1.0, 2.0], [0.5, 1.0], [0, 0], [0, 0]), "data is empty"),
        (bad([1.0, 2.0], [1.0]), "other samples"),
        (bad([1.0, 2.0], [2.0, 1.0], [3, 4], [4, 3]), "other samples"),
        (bad([1.0, 2.0], [2.0, 1.0], [3, 4]), "other samples"),
        (bad([1.0, math.nan], [2.0, 1.0]), "not finite"),
        (bad([1.0, 2.0], [math.inf, 1.0]), "not finite"),
        ((Samples(torch.ones(2)), Samples(torch.ones(2), metric="nll")), "None and nll"),
    ],
)
def test_compare_refuses_unlike_samples(pair, message):
    with pytest.raises(EvaluationError, match=message):
        compare(*pair)


# Disagreement


def disagreement(answers, size=3):
    """Of all members' answers (members, N), in batches."""
    found = Disagreement(len(answers))
    for number, batch in enumerate(torch.as_tensor(answers).split(size, dim=1)):
        for member in batch:
            found.add(number, member)
    return found


def disagreement_by_hand(answers):
    pairs = list(itertools.combinations(answers, 2))
    shares = [
        Fraction(sum(a != b for a, b in zip(*pair, strict=True)), len(answers[0])) for pair in pairs
    ]
    divided = sum(len(set(sample)) > 1 for sample in zip(*answers, strict=True))
    return {
        "disagreement": float(sum(shares) / len(pairs)),
        "not_unanimous": divided / len(answers[0]),
        "n": len(answers[0]),
    }


def test_disagreement_matches_hand_count():
    found = disagreement([[0, 1, 2, 2], [0, 1, 1, 2], [0, 2, 0, 2]]).compute()
    assert found == pytest.approx({"disagreement": 5 / 12, "not_unanimous": 2 / 4, "n": 4})


tables = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=2, max_size=6)
)


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(1, 5))
def test_disagreement_is_independent_of_batches(answers, size):
    assert disagreement(answers, size).compute() == pytest.approx(disagreement_by_hand(answers))


@pytest.mark.parametrize("members", [1, 4])
def test_disagreement_of_equal_members_is_zero(members):
    found = disagreement([[0, 1, 2]] * members).compute()
    assert found == {"disagreement": 0, "not_unanimous": 0, "n": 3}


def test_disagreement_takes_members_of_several_passes():
    answers = torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2], [0, 2, 0, 2]])
    found = Disagreement(3)
    for group in (answers[:2], answers[2:]):
        for number, batch in enumerate(group.split(3, dim=1)):
            for member in batch:
                found.add(number, member)
        found.offload()
    assert found.compute() == disagreement(answers).compute()


def test_disagreement_merges_processes():
    answers = [[0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 0, 0], [0, 2, 0, 2, 0, 1]]
    whole = disagreement(answers)
    found = disagreement([row[:4] for row in answers])
    for state in (disagreement([row[4:] for row in answers]).state(), Disagreement(3).state()):
        found.merge(json.loads(json.dumps(state)))
    assert found.compute() == whole.compute()


def test_disagreement_does_not_wait_for_the_device():
    with NoWaiting():
        disagreement(torch.tensor([[0, 1, 2, 2], [0, 1, 1, 2], [0, 2, 0, 2]]))


def test_disagreement_needs_answers():
    with pytest.raises(EvaluationError, match="data is empty"):
        Disagreement(2).compute()


def test_disagreement_needs_answers_of_all_members():
    found = Disagreement(2)
    found.add(0, torch.tensor([1, 2]))
    with pytest.raises(EvaluationError, match="have not answered"):
        found.compute()
