"""Regression metrics against scikit-learn and numpy."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import assert_scored_by_hand
from scored_batches import score_batches, score_shares
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from waiting import NoWaiting

from ckptavg.errors import EvaluationError
from ckptavg.tasks.regression import Regression

TASK = Regression()


def data(samples=200, shape=(), seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    return targets + 0.3 * noise + offset, targets + offset


def compute(outputs, targets, sizes=None):
    return score_batches(TASK, outputs, targets, sizes).compute()


def expected_of(outputs, targets):
    p, y = (np.asarray(v, dtype=np.float64).reshape(len(v), -1) for v in (outputs, targets))
    mse = mean_squared_error(y, p)
    return {
        "rmse": math.sqrt(mse),
        "mae": mean_absolute_error(y, p),
        "r2": r2_score(y, p),
        "mse": mse,
        "n": len(y),
    }


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3)])
def test_regression_metrics_match_scikit_learn(shape):
    outputs, targets = data(shape=shape)
    assert compute(outputs, targets) == pytest.approx(expected_of(outputs, targets), rel=1e-12)


@pytest.mark.parametrize(("outputs", "targets"), [((), (1,)), ((1,), ()), ((1, 1), (1,))])
def test_regression_ignores_axis_of_length_one(outputs, targets):
    p, y = data()
    p, y = p.reshape(200, *outputs), y.reshape(200, *targets)
    TASK.check(p, y)
    assert compute(p, y) == compute(*data())
    assert TASK.samples(TASK.predict(p, y), y).values.shape == (200,)


def test_regression_takes_flat_outputs_for_any_targets():
    p, y = data(shape=(2, 3))
    TASK.check(p.flatten(1), y)
    assert compute(p.flatten(1), y) == compute(p, y)


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_r2_keeps_precision_far_from_zero(offset):
    """Where the difference of the sums of squares has none left."""
    outputs, targets = data(offset=offset)
    found, expected = compute(outputs, targets, [60, 140]), expected_of(outputs, targets)
    assert found == pytest.approx(expected, rel=1e-10)


def test_r2_is_independent_of_unit():
    outputs, targets = data()
    found = compute(1e-9 * outputs, 1e-9 * targets)
    assert found["r2"] == pytest.approx(compute(outputs, targets)["r2"], rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
@pytest.mark.parametrize(("error", "expected"), [(0.0, 1.0), (0.5, 0.0)])
def test_r2_of_constant_targets_is_one_or_zero(value, error, expected):
    targets = torch.full((1000,), value, dtype=torch.float64)
    found = compute(targets + error, targets, [300, 333, 367])
    assert found["r2"] == expected == r2_score(np.full(8, value), np.full(8, value + error))


def test_r2_is_mean_over_outputs():
    outputs, targets = data(shape=(3,))
    targets[:, 1] = 0.1
    found = compute(outputs, targets)["r2"]
    assert found == pytest.approx((r2_score(targets[:, ::2], outputs[:, ::2]) * 2 + 0) / 3)


def test_regression_metrics_are_defined_for_one_sample():
    found = compute(torch.tensor([3.0]), torch.tensor([1.0]))
    assert found == {"rmse": 2, "mae": 2, "r2": 0, "mse": 4, "n": 1}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bool])
def test_regression_takes_targets_of_any_dtype(dtype):
    outputs, targets = data()
    whole = (targets > 0).to(dtype)
    TASK.check(outputs, whole)
    assert compute(outputs, whole) == compute(outputs, whole.double())


def test_regression_metrics_are_in_float64():
    outputs, targets = data()
    low = outputs.to(torch.bfloat16)
    assert compute(low, targets) == compute(low.double(), targets)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), offset=st.floats(-1e6, 1e6))
def test_regression_metrics_are_independent_of_batches(sizes, offset):
    outputs, targets = data(samples=sum(sizes) + 2, shape=(2,), offset=offset)
    found = compute(outputs, targets, [*sizes, 2])
    assert found == pytest.approx(expected_of(outputs, targets), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=4))
def test_regression_metrics_merge_across_processes(shares):
    """Also where a process had no data."""
    shares = [*shares, [2]]
    outputs, targets = data(samples=sum(map(sum, shares)), shape=(3,), offset=50.0)
    merged = score_shares(TASK, outputs, targets, shares)
    assert merged.compute() == pytest.approx(expected_of(outputs, targets), rel=1e-10)


def test_regression_updates_do_not_wait_for_device():
    outputs, targets = data()
    with NoWaiting():
        scores = score_batches(TASK, outputs, targets, [100, 100])
        TASK.samples(TASK.predict(outputs, targets), targets)
    assert scores.compute() == pytest.approx(compute(outputs, targets), rel=1e-12)


# Ensembles and pairs


def test_regression_ensemble_averages_outputs():
    members = [data(seed=i)[0] for i in range(4)]
    targets = data()[1]
    mean, scores = TASK.mean(), TASK.scores()
    for outputs in members:
        mean.add(TASK.predict(outputs, targets), targets)
        mean.offload()
    scores.update(mean.value(), targets)
    expected = expected_of(torch.stack(members).mean(0), targets)
    assert scores.compute() == pytest.approx(expected, rel=1e-12)


def test_regression_samples_compare_mse():
    outputs, targets = torch.tensor([[1.0, 2.0], [0.5, 0.0]]), torch.tensor([[0, 4], [0, 1]])
    found = TASK.samples(TASK.predict(outputs, targets), targets)
    assert (found.metric, found.weights, found.answers) == ("mse", None, None)
    assert found.values.tolist() == [float(Fraction(5, 2)), float(Fraction(5, 8))]
    assert float(found.values.mean()) == compute(outputs, targets)["mse"]


def test_regression_scores_checkpoints_and_ensemble(tmp_path):
    assert_scored_by_hand(tmp_path, TASK, lambda values: values, compute, "mse")


# Data and models that do not fit


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        ((4, 3), (4,)),
        ((4,), (5,)),
        ((4, 1), (4, 2)),
        ((4, 2, 3), (4, 3, 2)),
        ((), (4,)),
        ((4,), ()),
        ((4, 0), (4, 0)),
    ],
)
def test_regression_refuses_shapes_that_differ(outputs, targets):
    with pytest.raises(EvaluationError, match="same number of values per sample") as caught:
        TASK.check(torch.zeros(outputs), torch.zeros(targets))
    assert f"{tuple(outputs)} and {tuple(targets)}" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_regression_refuses_nonfinite_targets(value):
    outputs, targets = data()
    targets[100] = value
    with pytest.raises(EvaluationError, match="targets that are not finite"):
        TASK.check(outputs, targets)


def test_regression_refuses_changing_number_of_outputs():
    scores = score_batches(TASK, *data(shape=(3,)))
    outputs, targets = data(shape=(1,))
    with pytest.raises(EvaluationError, match="3 values per sample and then 1"):
        scores.update(TASK.predict(outputs, targets), targets)


def test_regression_finds_values_in_outputs():
    outputs, targets = data()
    wrapped = SimpleNamespace(loss=None, logits=outputs[:, None])
    TASK.check(wrapped, targets)
    assert torch.equal(TASK.predict(wrapped, targets)[:, 0], outputs)


@pytest.mark.parametrize("batches", [[], [0]])
def test_regression_refuses_empty_data(batches):
    scores = TASK.scores()
    for size in batches:
        scores.update(torch.zeros(size, 1, dtype=torch.float64), torch.zeros(size))
    with pytest.raises(EvaluationError, match="data is empty"):
        scores.compute()


def test_regression_metrics_are_as_declared():
    assert {m.key for m in TASK.metrics} | {"n"} == compute(*data()).keys()
