"""Confidence intervals against scipy, numpy and worked values."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import TensorDataset

from ckptavg import evaluate
from ckptavg.tasks import Samples
from ckptavg.tasks.intervals import mean_interval, samples_interval, wilson_interval
from ckptavg.tasks.language import CausalLM
from ckptavg.tasks.metrics import ClassificationMetrics
from ckptavg.tasks.regression import Regression

Z = 1.959964


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 20), (7, 9), (93, 100), (5, 5)])
def test_wilson_interval_is_scipys(right, count):
    expected = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson_interval(right, count) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_wilson_interval_has_the_worked_value():
    """81 of 263, Newcombe (1998, Statistics in Medicine 17, 857-872), table I, method 3."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_samples_interval_of_right_or_wrong_is_wilsons_in_percent():
    samples = Samples(torch.tensor([1, 1, 0, 1], dtype=torch.uint8), scale=100.0)
    low, high = stats.binomtest(3, 4).proportion_ci(method="wilson")
    assert samples_interval(samples) == pytest.approx((100 * low, 100 * high))


def test_samples_interval_of_numbers_is_normal():
    values = np.random.default_rng(0).exponential(size=200)
    expected = stats.norm.interval(0.95, values.mean(), stats.sem(values))
    assert samples_interval(Samples(torch.tensor(values))) == pytest.approx(expected)


def test_samples_interval_weighs_texts_by_tokens():
    nll, tokens = np.array([3.0, 10.0, 4.0, 0.0]), np.array([2, 5, 1, 0])
    ratio = 17 / 8
    errors = (nll - ratio * tokens)[:3]
    reach = Z * math.sqrt(3 / 2 * (errors**2).sum()) / 8
    samples = Samples(torch.tensor(nll), torch.tensor(tokens))
    assert samples_interval(samples) == pytest.approx((ratio - reach, ratio + reach), rel=1e-6)


def test_samples_interval_covers_the_true_ratio_as_often_as_it_says():
    generator, covered = np.random.default_rng(1), 0
    for _ in range(400):
        tokens = generator.integers(1, 60, size=80)
        nll = generator.gamma(tokens, 2.0)
        low, high = samples_interval(Samples(torch.tensor(nll), torch.tensor(tokens)))
        covered += low <= 2.0 <= high
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize(
    "samples",
    [
        Samples(torch.tensor([0.5])),
        Samples(torch.tensor([0.5, math.nan])),
        Samples(torch.tensor([0.5, 0.0]), torch.tensor([2, 0])),
        Samples(torch.empty(0)),
    ],
    ids=["single", "nan", "single-text", "empty"],
)
def test_samples_interval_is_unknown(samples):
    assert samples_interval(samples) is None


def test_mean_interval_of_equal_values_has_no_width():
    assert mean_interval(3 * 0.1, 3 * 0.1**2, 3) == pytest.approx((0.1, 0.1), abs=1e-8)


def test_classification_intervals_are_those_of_the_merged_parts():
    generator = torch.Generator().manual_seed(0)
    logs = torch.randn(50, 7, generator=generator).double().log_softmax(1)
    labels = torch.randint(7, (50,), generator=generator)
    whole, first, second = ClassificationMetrics(), ClassificationMetrics(), ClassificationMetrics()
    whole.update(logs, labels)
    first.update(logs[:20], labels[:20])
    second.update(logs[20:], labels[20:])
    first.merge(second.state())
    for key, interval in whole.intervals().items():
        assert first.intervals()[key] == pytest.approx(interval)
    hits = int((logs.argmax(1) == labels).sum())
    top5 = int((logs.topk(5).indices == labels[:, None]).any(1).sum())
    nll = -logs.gather(1, labels[:, None]).numpy()[:, 0]
    for key, right in (("top1", hits), ("top5", top5)):
        low, high = stats.binomtest(right, 50).proportion_ci(method="wilson")
        assert whole.intervals()[key] == pytest.approx((100 * low, 100 * high))
    expected = stats.norm.interval(0.95, nll.mean(), stats.sem(nll))
    assert whole.intervals()["nll"] == pytest.approx(expected)


def test_results_have_intervals_around_the_metrics():
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    data = TensorDataset(x, torch.randint(3, (40,)))
    (result,) = evaluate([nn.Linear(4, 3)], nn.Linear(4, 3), data, batch_size=16)
    assert result.interval.keys() == {"top1", "nll"}
    for key, (low, high) in result.interval.items():
        assert low < result.metrics[key] < high
    assert "interval" not in result.as_json()


def test_regression_intervals_are_of_the_squared_error_and_its_root():
    torch.manual_seed(0)
    x, model = torch.randn(30, 4), nn.Linear(4, 1)
    y = torch.randn(30)
    (result,) = evaluate([model], nn.Linear(4, 1), TensorDataset(x, y), task=Regression())
    errors = (model(x)[:, 0] - y).detach().double().square().numpy()
    low, high = stats.norm.interval(0.95, errors.mean(), stats.sem(errors))
    assert result.interval["mse"] == pytest.approx((low, high), rel=1e-5)
    assert result.interval["rmse"] == pytest.approx((math.sqrt(low), math.sqrt(high)), rel=1e-5)


def test_language_intervals_are_of_nll_and_perplexity():
    torch.manual_seed(0)
    task, logits = CausalLM(), torch.randn(6, 5, 11)
    targets = torch.randint(11, (6, 5))
    targets[0, 2:] = -100
    predictions = task.predict(logits, targets)
    samples = task.samples(predictions, targets)
    intervals = task.intervals(task.scores(), samples)
    low, high = intervals["nll"]
    assert intervals["perplexity"] == pytest.approx((math.exp(low), math.exp(high)))
    assert low < float(samples.values.sum() / samples.weights.sum()) < high
