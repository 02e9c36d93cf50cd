"""Greedy soups against the recipe, one checkpoint after another."""

import random

import pytest

from ckptavg.searching.soup import GreedySoup


def mean(values):
    return sum(values) / len(values)


def score_of(values):
    """The worked example's score of a soup: the higher, the nearer its mean is to 3."""
    return -((mean(values) - 3) ** 2)


def greedy(weights):
    """The recipe of Wortsman et al. 2022, algorithm 1."""
    order = sorted(range(len(weights)), key=lambda i: -score_of([weights[i]]))
    kept = [order[0]]
    for i in order[1:]:
        if score_of([weights[j] for j in [*kept, i]]) >= score_of([weights[j] for j in kept]):
            kept.append(i)
    return sorted(kept)


def in_rounds(weights, budget):
    order = sorted(range(len(weights)), key=lambda i: -score_of([weights[i]]))
    soup = GreedySoup(order, len(weights), score_of([weights[order[0]]]))
    rounds = 0
    while not soup.is_done:
        proposals = soup.propose(budget)
        assert 1 <= len(proposals) <= budget
        scores = []
        for proposal in proposals:
            kept = [w for w, c in zip(weights, proposal.coefficients, strict=True) if c]
            scores.append(score_of(kept))
        soup.decide(scores)
        rounds += 1
    return soup, rounds


@pytest.mark.parametrize("budget", [1, 2, 3, 8])
def test_soup_has_the_worked_value(budget):
    weights = [2, 2, 5]
    soup, _ = in_rounds(weights, budget)
    coefficients = soup.result().coefficients
    assert sum(c * w for c, w in zip(coefficients, weights, strict=True)) == pytest.approx(3)
    assert soup.result().size == 3


@pytest.mark.parametrize("seed", range(20))
def test_soup_in_rounds_is_the_recipe(seed):
    weights = [random.Random(seed).uniform(0, 6) for _ in range(9)]
    for budget in (1, 4, 9):
        soup, rounds = in_rounds(weights, budget)
        assert sorted(soup.kept) == greedy(weights)
        dropped = len(weights) - len(soup.kept)
        if budget == 9:
            assert rounds <= dropped + 1


def test_soup_drops_what_has_no_score():
    soup = GreedySoup([0, 1, 2], 3, 1.0)
    soup.decide([float("nan")])
    soup.decide([2.0])
    assert soup.kept == [0, 2]
