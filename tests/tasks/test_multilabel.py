"""Multi-label metrics against scikit-learn and values by hand."""

import importlib.util
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import assert_scored_by_hand
from scored_batches import score_batches, score_shares
from sklearn.metrics import average_precision_score, f1_score, log_loss
from waiting import NoWaiting

from ckptavg.errors import EvaluationError
from ckptavg.tasks import multilabel
from ckptavg.tasks.multilabel import MultiLabel

TASK = MultiLabel()


def data(samples=200, labels=5, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(samples, labels, generator=generator)
    logits = scale * (truth + torch.randn(samples, labels, generator=generator))
    targets = (truth > 0.5).long()
    targets[0] = 1  # each label has a sample
    return logits, targets


def compute(logits, targets, sizes=None):
    return score_batches(TASK, logits, targets, sizes).compute()


def expected_of(probabilities, targets):
    y, p = np.asarray(targets), np.asarray(probabilities, dtype=np.float64)
    kinds = ("micro", "macro") if y.shape[1] > 1 else ("binary", "binary")
    f1 = [100 * f1_score(y, p > 0.5, average=kind) for kind in kinds]
    per_label = [log_loss(y[:, i], p[:, i], labels=[0, 1]) for i in range(y.shape[1])]
    return {
        "map": 100 * average_precision_score(y, p, average="macro"),
        "f1_micro": f1[0],
        "f1_macro": f1[1],
        "nll": np.mean(per_label),
        "n": len(y),
    }


@pytest.mark.parametrize("labels", [1, 2, 20])
@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_metrics_match_scikit_learn(labels, scale):
    logits, targets = data(labels=labels, scale=scale)
    expected = expected_of(logits.double().sigmoid(), targets)
    found = compute(logits, targets)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-12)


def test_the_order_of_extreme_logits_counts():
    """Their sigmoid is 1, and would tie them."""
    logits = torch.tensor([[50.0], [60.0], [2000.0], [-3000.0]])
    assert compute(logits, torch.tensor([[0], [1], [1], [0]]))["map"] == 100


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
def test_batches_of_whatever_range_are_ranked_alike(shift):
    """torchmetrics would take those with logits from 0 to 1 for probabilities."""
    logits = torch.cat((torch.linspace(0, 1, 20), torch.linspace(-3, 4, 20)))[:, None] + shift
    targets = torch.tensor([[0], [1], [1], [0]]).repeat(10, 1)
    expected = 100 * average_precision_score(targets, logits)
    assert compute(logits, targets, [20, 20])["map"] == pytest.approx(expected, rel=1e-5)


def test_equal_outputs_tie_wherever_they_stand():
    """Vectorized and scalar logarithms may differ in their last bit."""
    logits = torch.full((67, 1), 0.3).to(torch.bfloat16)
    targets = (torch.arange(67) % 3 == 0).long()[:, None]
    expected = 100 * average_precision_score(targets, np.zeros(67))
    for sizes in ([67], [1] * 67, [33, 34]):
        assert compute(logits, targets, sizes)["map"] == pytest.approx(expected, rel=1e-6)


def test_nll_is_exact_where_the_probability_underflows():
    found = compute(torch.tensor([[2000.0, -2000.0]]), torch.tensor([[0, 1]]))
    assert found["nll"] == pytest.approx(2000)


def test_nll_keeps_what_confident_labels_add():
    found = compute(torch.tensor([[45.0]]), torch.tensor([[1]]))
    assert found["nll"] == pytest.approx(math.exp(-45), rel=1e-12)


def test_a_label_that_no_sample_has_is_left_out_of_the_mean_average_precision():
    logits, targets = data()
    targets[:, 2] = 0
    keep = [0, 1, 3, 4]
    found = compute(logits, targets)
    assert found["map"] == compute(logits[:, keep], targets[:, keep])["map"]
    assert found["f1_macro"] == pytest.approx(
        compute(logits[:, keep], targets[:, keep])["f1_macro"] * 4 / 5, rel=1e-6
    )


def test_data_without_any_label_have_no_mean_average_precision_to_speak_of():
    logits, targets = data()
    assert compute(logits, torch.zeros_like(targets))["map"] == 0


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64]
)
def test_targets_may_have_any_type(dtype):
    logits, targets = data()
    TASK.check(logits, targets.to(dtype))
    assert compute(logits, targets.to(dtype)) == compute(logits, targets)
    values = TASK.samples(TASK.predict(logits, targets), targets.to(dtype)).values
    assert float(values.mean()) == pytest.approx(compute(logits, targets)["nll"], rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_metrics_are_the_same_for_any_split_into_batches(sizes):
    logits, targets = data(samples=sum(sizes) + 1)
    assert compute(logits, targets, [*sizes, 1]) == pytest.approx(
        compute(logits, targets), rel=1e-12
    )


@settings(max_examples=15, deadline=None)
@given(shares=st.lists(st.lists(st.integers(1, 30), max_size=3), min_size=1, max_size=4))
def test_metrics_of_several_processes_are_those_of_one(shares):
    """Also where a process had no data."""
    shares = [*shares, [1]]
    logits, targets = data(samples=sum(map(sum, shares)))
    merged = score_shares(TASK, logits, targets, shares)
    assert merged.compute() == pytest.approx(compute(logits, targets), rel=1e-6)


def test_metrics_do_not_end_with_compute_or_state():
    logits, targets = data()
    scores = TASK.scores()
    for some, theirs in zip(logits.split(90), targets.split(90), strict=True):
        scores.update(TASK.predict(some, theirs), theirs)
        scores.compute()
        scores.state()
    assert scores.compute() == pytest.approx(compute(logits, targets), rel=1e-12)


def test_updates_do_not_wait_for_the_device():
    logits, targets = data()
    with NoWaiting():
        scores = score_batches(TASK, logits, targets, [100, 100])
        TASK.samples(TASK.predict(logits, targets), targets)
    assert scores.compute() == pytest.approx(compute(logits, targets), rel=1e-12)


def test_many_scores_leave_the_device(monkeypatch):
    left = []
    leave = multilabel.MultiLabelMetrics._leave_device
    monkeypatch.setattr(multilabel, "_MOST_ON_DEVICE", 600)
    monkeypatch.setattr(
        multilabel.MultiLabelMetrics, "_leave_device", lambda s: (left.append(s.count), leave(s))
    )
    score_batches(TASK, *data(), [50, 50, 50, 50])
    assert left == [150]  # 250 scores a batch


# Ensembles and pairs


def test_an_ensemble_averages_probabilities_and_not_logits():
    members = [3 * data(seed=i)[0] for i in range(4)]
    targets = data()[1]
    mean, scores = TASK.mean(), TASK.scores()
    for logits in members:
        mean.add(TASK.predict(logits, targets), targets)
        mean.offload()
    scores.update(mean.value(), targets)
    expected = expected_of(torch.stack(members).double().sigmoid().mean(0), targets)
    assert scores.compute() == pytest.approx(expected, rel=1e-5)
    of_logits = expected_of(torch.stack(members).mean(0).sigmoid(), targets)
    assert scores.compute()["nll"] != pytest.approx(of_logits["nll"], rel=1e-2)


def test_an_ensemble_keeps_extreme_probabilities():
    mean = TASK.mean()
    for logit in (2000.0, 1000.0):
        mean.add(TASK.predict(torch.tensor([[logit]]), None), None)
    log_p, log_q = mean.value()[0, 0].tolist()
    assert log_p == pytest.approx(0, abs=1e-300)
    assert log_q == pytest.approx(-1000 - math.log(2))


def test_pairs_compare_the_nll():
    logits, targets = data()
    found = TASK.samples(TASK.predict(logits, targets), targets)
    assert (found.metric, found.weights, found.answers) == ("nll", None, None)
    assert found.values.shape == (200,)
    expected = compute(logits, targets)["nll"]
    assert float(found.values.mean()) == pytest.approx(expected, rel=1e-12)


def test_checkpoints_are_compared_and_their_ensemble_is_scored(tmp_path):
    assert_scored_by_hand(tmp_path, TASK, lambda values: (values > 0.5).long(), compute, "nll")


# Data and models that do not fit


@pytest.mark.parametrize("value", [-1, 2, 0.5, math.nan, math.inf])
def test_targets_other_than_0_and_1_are_an_error(value):
    logits, targets = data()
    targets = targets.double()
    targets[150, 3] = value
    with pytest.raises(EvaluationError, match=rf"target {float(value)}, but 0 or 1"):
        TASK.check(logits, targets)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 3), (4,)), ((4,), (4,)), ((4, 3), (4, 2)), ((4, 0), (4, 0))]
)
def test_outputs_and_targets_of_other_shapes_are_an_error(outputs, targets):
    with pytest.raises(EvaluationError, match=r"shape \(N, labels\)") as caught:
        TASK.check(torch.zeros(outputs), torch.zeros(targets))
    assert str(tuple(outputs)) in str(caught.value)


def test_one_class_a_sample_is_said_to_be_another_task():
    with pytest.raises(EvaluationError, match="Pass `task='image-classification'`"):
        TASK.check(torch.zeros(4, 1), torch.zeros(4))


def test_outputs_that_are_not_finite_are_not_sound():
    logits, targets = data(samples=4)
    assert bool(TASK.is_finite(TASK.predict(logits, targets)))
    for value in (math.nan, math.inf):
        logits[2, 1] = value
        assert not bool(TASK.is_finite(TASK.predict(logits, targets)))


def test_logits_are_found_in_what_a_model_returns():
    logits, targets = data()
    outputs = SimpleNamespace(loss=None, logits=logits)
    TASK.check(outputs, targets)
    torch.testing.assert_close(TASK.predict(outputs, targets), TASK.predict(logits, targets))


def test_no_samples_are_an_error():
    with pytest.raises(EvaluationError, match="data is empty"):
        TASK.scores().compute()


def test_torchmetrics_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EvaluationError, match="pip install torchmetrics"):
        MultiLabel()


@pytest.mark.slow
def test_torchmetrics_is_not_imported_before_it_is_used():
    code = (
        "import sys; from ckptavg.tasks.multilabel import MultiLabel; MultiLabel().scores(); "
        "assert 'torchmetrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_metrics_are_those_that_are_computed():
    assert {m.key for m in TASK.metrics} | {"n"} == compute(*data()).keys()
