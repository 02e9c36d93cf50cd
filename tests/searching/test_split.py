"""The two parts of the evaluation data."""

import pytest
import torch

from ckptavg.errors import EvaluationError, UsageError
from ckptavg.searching.split import FEWEST, split_samples


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.73])
def test_split_uses_each_sample_once(fraction):
    split = split_samples(101, fraction=fraction, seed=3)
    together = torch.cat([split.selection, split.report])
    assert torch.equal(together.sort().values, torch.arange(101))
    assert len(split.selection) == round(fraction * 101)


def test_split_is_seeded():
    first, again, other = (split_samples(50, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.selection, again.selection)
    assert not torch.equal(first.selection, other.selection)


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_split_takes_each_class_by_its_share(fraction):
    sizes = [400, 100, 37, 5, 1]
    classes = torch.repeat_interleave(torch.tensor([7, 2, 9, 0, 4]), torch.tensor(sizes))
    split = split_samples(len(classes), classes, fraction=fraction, seed=5)
    for label, size in zip([7, 2, 9, 0, 4], sizes, strict=True):
        chosen = int((classes[split.selection] == label).sum())
        assert abs(chosen - fraction * size) <= 1


def test_split_of_classes_gives_each_sample_the_same_chance():
    classes = torch.tensor([0] * 12 + [1] * 5)
    hits = torch.zeros(17)
    for seed in range(2000):
        hits[split_samples(17, classes, seed=seed).selection] += 1
    # 8 of 17 are chosen; the standard deviation of a share is 0.011.
    assert ((hits / 2000 - 8 / 17).abs() < 0.05).all()


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, float("nan")])
def test_split_refuses_other_shares(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        split_samples(100, fraction=fraction)


def test_split_refuses_too_few_samples():
    assert len(split_samples(2 * FEWEST).report) == FEWEST
    with pytest.raises(EvaluationError, match="too few"):
        split_samples(2 * FEWEST - 1)
