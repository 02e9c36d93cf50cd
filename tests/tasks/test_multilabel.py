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
def test_multi_label_metrics_match_scikit_learn(labels, scale):
    logits, targets = data(labels=labels, scale=scale)
    expected = expected_of(logits.double().sigmoid(), targets)
    found = compute(logits, targets)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-12)


def test_multi_label_map_ranks_extreme_logits():
    """Their sigmoid is 1, and would tie them."""
    logits = torch.tensor([[50.0], [60.0], [2000.0], [-3000.0]])
    assert compute(logits, torch.tensor([[0], [1], [1], [0]]))["map"] == 100


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
def test_multi_label_map_is_independent_of_logit_range(shift):
    """torchmetrics would take those with logits from 0 to 1 for probabilities."""
    logits = torch.cat((torch.linspace(0, 1, 20), torch.linspace(-3, 4, 20)))[:, None] + shift
    targets = torch.tensor([[0], [1], [1], [0]]).repeat(10, 1)
    expected = 100 * average_precision_score(targets, logits)
    assert compute(logits, targets, [20, 20])["map"] == pytest.approx(expected, rel=1e-5)


def test_multi_label_map_ties_equal_outputs():
    """Vectorized and scalar logarithms may differ in their last bit."""
    logits = torch.full((67, 1), 0.3).to(torch.bfloat16)
    targets = (torch.arange(67) % 3 == 0).long()[:, None]
    expected = 100 * average_precision_score(targets, np.zeros(67))
    for sizes in ([67], [1] * 67, [33, 34]):
        assert compute(logits, targets, sizes)["map"] == pytest.approx(expected, rel=1e-6)


def test_multi_label_nll_is_exact_at_underflow():
    found = compute(torch.tensor([[2000.0, -2000.0]]), torch.tensor([[0, 1]]))
    assert found["nll"] == pytest.approx(2000)


def test_multi_label_nll_keeps_confident_labels():
    found = compute(torch.tensor([[45.0]]), torch.tensor([[1]]))
    assert found["nll"] == pytest.approx(math.exp(-45), rel=1e-12)


def test_multi_label_map_leaves_out_absent_label():
    logits, targets = data()
    targets[:, 2] = 0
    keep = [0, 1, 3, 4]
    found = compute(logits, targets)
    assert found["map"] == compute(logits[:, keep], targets[:, keep])["map"]
    assert found["f1_macro"] == pytest.approx(
        compute(logits[:, keep], targets[:, keep])["f1_macro"] * 4 / 5, rel=1e-6
    )


def test_multi_label_map_is_zero_without_labels():
    logits, targets = data()
    assert compute(logits, torch.zeros_like(targets))["map"] == 0


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64]
)
def test_multi_label_takes_targets_of_any_dtype(dtype):
    logits, targets = data()
    TASK.check(logits, targets.to(dtype))
    assert compute(logits, targets.to(dtype)) == compute(logits, targets)
    values = TASK.samples(TASK.predict(logits, targets), targets.to(dtype)).values
    assert float(values.mean()) == pytest.approx(compute(logits, targets)["nll"], rel=1e-12)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8))
def test_multi_label_metrics_are_independent_of_batches(sizes):
    logits, targets = data(samples=sum(sizes) + 1)
    assert compute(logits, targets, [*sizes, 1]) == pytest.approx(
        compute(logits, targets), rel=1e-12
    )


@settings(max_examples=15, deadline=None)
@given(shares=st.lists(st.lists(st.integers(1, 30), max_size=3), min_size=1, max_size=4))
def test_multi_label_metrics_merge_across_processes(shares):
    """Also where a process had no data."""
    shares = [*shares, [1]]
    logits, targets = data(samples=sum(map(sum, shares)))
    merged = score_shares(TASK, logits, targets, shares)
    assert merged.compute() == pytest.approx(compute(logits, targets), rel=1e-6)


def test_multi_label_metrics_go_on_after_compute():
    logits, targets = data()
    scores = TASK.scores()
    for some, theirs in zip(logits.split(90), targets.split(90), strict=True):
        scores.update(TASK.predict(some, theirs), theirs)
        scores.compute()
        scores.state()
    assert scores.compute() == pytest.approx(compute(logits, targets), rel=1e-12)


def test_multi_label_updates_do_not_wait_for_device():
    logits, targets = data()
    with NoWaiting():
        scores = score_batches(TASK, logits, targets, [100, 100])
        TASK.samples(TASK.predict(logits, targets), targets)
    assert scores.compute() == pytest.approx(compute(logits, targets), rel=1e-12)


def test_multi_label_metrics_move_many_scores_off_device(monkeypatch):
    left = []
    leave = multilabel.MultiLabelMetrics._leave_device
    monkeypatch.setattr(multilabel, "_MOST_ON_DEVICE", 600)
    monkeypatch.setattr(
        multilabel.MultiLabelMetrics, "_leave_device", lambda s: (left.append(s.count), leave(s))
    )
    score_batches(TASK, *data(), [50, 50, 50, 50])
    assert left == [150]  # 250 scores a batch


# Ensembles and pairs


def test_multi_label_ensemble_averages_probabilities():
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


def test_multi_label_ensemble_keeps_extreme_probabilities():
    mean = TASK.mean()
    for logit in (2000.0, 1000.0):
        mean.add(TASK.predict(torch.tensor([[logit]]), None), None)
    log_p, log_q = mean.value()[0, 0].tolist()
    assert log_p == pytest.approx(0, abs=1e-300)
    assert log_q == pytest.approx(-1000 - math.log(2))


def test_multi_label_samples_compare_nll():
    logits, targets = data()
    found = TASK.samples(TASK.predict(logits, targets), targets)
    assert (found.metric, found.weights, found.answers) == ("nll", None, None)
    assert found.values.shape == (200,)
    expected = compute(logits, targets)["nll"]
    assert float(found.values.mean()) == pytest.approx(expected, rel=1e-12)


def test_multi_label_scores_checkpoints_and_ensemble(tmp_path):
    assert_scored_by_hand(tmp_path, TASK, lambda values: (values > 0.5).long(), compute, "nll")


# Data and models that do not fit


@pytest.mark.parametrize("value", [-1, 2, 0.5, math.nan, math.inf])
def test_multi_label_refuses_targets_other_than_0_and_1(value):
    logits, targets = data()
    targets = targets.double()
    targets[150, 3] = value
    with pytest.raises(EvaluationError, match=rf"target {float(value)}, but 0 or 1"):
        TASK.check(logits, targets)


@pytest.mark.parametrize(
    ("outputs", "targets"), [((4, 3), (4,)), ((4,), (4,)), ((4, 3), (4, 2)), ((4, 0), (4, 0))]
)
def test_multi_label_refuses_shapes_that_differ(outputs, targets):
    with pytest.raises(EvaluationError, match=r"shape \(N, labels\)") as caught:
        TASK.check(torch.zeros(outputs), torch.zeros(targets))
    assert str(tuple(outputs)) in str(caught.value)


def test_multi_label_suggests_classification():
    with pytest.raises(EvaluationError, match="Pass `task='image-classification'`"):
        TASK.check(torch.zeros(4, 1), torch.zeros(4))


def test_multi_label_finds_nonfinite_outputs():
    logits, targets = data(samples=4)
    assert bool(TASK.is_finite(TASK.predict(logits, targets)))
    for value in (math.nan, math.inf):
        logits[2, 1] = value
        assert not bool(TASK.is_finite(TASK.predict(logits, targets)))


def test_multi_label_finds_logits_in_outputs():
    logits, targets = data()
    outputs = SimpleNamespace(loss=None, logits=logits)
    TASK.check(outputs, targets)
    torch.testing.assert_close(TASK.predict(outputs, targets), TASK.predict(logits, targets))


def test_multi_label_refuses_empty_data():
    with pytest.raises(EvaluationError, match="data is empty"):
        TASK.scores().compute()


def test_multi_label_names_missing_torchmetrics(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EvaluationError, match="pip install torchmetrics"):
        MultiLabel()


@pytest.mark.slow
def test_multi_label_imports_torchmetrics_late():
    code = (
        "import sys; from ckptavg.tasks.multilabel import MultiLabel; MultiLabel().scores(); "
        "assert 'torchmetrics' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_multi_label_metrics_are_as_declared():
    assert {m.key for m in TASK.metrics} | {"n"} == compute(*data()).keys()
