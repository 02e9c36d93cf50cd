"""Metrics against torchmetrics, scikit-learn, and values by hand."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
)
from waiting import NoWaiting

from ckptavg.errors import EvaluationError
from ckptavg.tasks.base import LogMean
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.metrics import ClassificationMetrics, Totals

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def predictions(samples=300, classes=10, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (samples,), generator=generator)


def log_probabilities(logits):
    return Classification().predict(logits, None)


def metrics_of(logits, labels, sizes=None):
    metrics = ClassificationMetrics()
    sizes = sizes or [len(labels)]
    for some, theirs in zip(logits.split(sizes), labels.split(sizes), strict=True):
        metrics.update(log_probabilities(some), theirs)
    return metrics


def scores(logits, labels, sizes=None):
    return metrics_of(logits, labels, sizes).compute()


def scores_of(probabilities, labels):
    """Scores of probabilities that are given as they are."""
    metrics = ClassificationMetrics()
    logs = torch.tensor(probabilities, dtype=torch.float64).log()
    metrics.update(logs, torch.tensor(labels))
    return metrics.compute()


def ece_by_hand(confidences, correct):
    """Guo et al. 2017, eq. 3, over the bins (i/15, (i + 1)/15]."""
    bins = {}
    for confidence, right in zip(confidences, correct, strict=True):
        bins.setdefault(max(math.ceil(confidence * 15), 1), []).append((confidence, right))
    gaps = [abs(sum(r for _, r in b) - sum(c for c, _ in b)) for b in bins.values()]
    return sum(gaps) / len(confidences)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 10, 100])
def test_top1_and_top5_match_torchmetrics(classes):
    logits, labels = predictions(classes=classes)
    found = scores(logits, labels)
    for name, k in {"top1": 1, "top5": 5}.items():
        if k > 1 and classes <= k:
            assert name not in found  # all classes are among the first five
            continue
        expected = multiclass_accuracy(logits, labels, classes, average="micro", top_k=k)
        assert found[name] == pytest.approx(100 * float(expected), abs=1e-4)
    assert found["n"] == 300


def test_top5_matches_scikit_learn():
    logits, labels = predictions(classes=12)
    expected = top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    assert scores(logits, labels)["top5"] == pytest.approx(100 * expected)


@pytest.mark.parametrize("classes", [2, 10])
def test_nll_matches_scikit_learn(classes):
    logits, labels = predictions(classes=classes)
    expected = log_loss(labels, logits.softmax(1).numpy(), labels=range(classes))
    assert scores(logits, labels)["nll"] == pytest.approx(expected, rel=1e-12)


def test_nll_is_exact_at_underflow():
    assert scores(torch.tensor([[2000.0, 0.0]]), torch.tensor([1]))["nll"] == pytest.approx(2000)


@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
def test_ece_matches_torchmetrics(classes, scale):
    logits, labels = predictions(classes=classes, scale=scale)
    expected = multiclass_calibration_error(logits.softmax(1), labels, classes, 15, "l1")
    assert scores(logits, labels)["ece"] == pytest.approx(float(expected), abs=1e-6)


def test_ece_matches_definition():
    logits, labels = predictions(samples=1000, seed=3)
    confidences, best = logits.softmax(1).max(1)
    expected = ece_by_hand(confidences.tolist(), (best == labels).tolist())
    assert scores(logits, labels)["ece"] == pytest.approx(expected, rel=1e-12)


def test_ece_counts_certainty_in_last_bin():
    found = scores_of([[1.0, 0.0], [0.96, 0.04]], [0, 1])
    assert found["ece"] == pytest.approx((1.96 - 1) / 2)


@pytest.mark.parametrize("edge", [9, 10, 12])
def test_ece_bin_is_closed_at_upper_end(edge):
    confidence, below = edge / 15, edge / 15 - 0.01
    found = scores_of([[confidence, 1 - confidence], [below, 1 - below]], [0, 1])
    assert found["ece"] == pytest.approx(abs(confidence + below - 1) / 2)


@pytest.mark.parametrize("edge", [9, 10, 12])
def test_ece_bin_is_open_at_lower_end(edge):
    confidence, above = edge / 15, edge / 15 + 0.01
    found = scores_of([[confidence, 1 - confidence], [above, 1 - above]], [0, 1])
    assert found["ece"] == pytest.approx(((1 - confidence) + above) / 2)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12))
def test_classification_metrics_are_independent_of_batches(sizes):
    logits, labels = predictions(samples=sum(sizes) + 1)
    assert scores(logits, labels, [*sizes, 1]) == pytest.approx(scores(logits, labels), rel=1e-12)


def test_classification_metrics_are_in_float64():
    logits, labels = predictions()
    low = logits.to(torch.bfloat16)
    assert scores(low, labels) == scores(low.double(), labels)


def test_classification_metrics_go_on_after_compute():
    logits, labels = predictions(samples=20)
    metrics = ClassificationMetrics()
    for half in (slice(0, 10), slice(10, 20)):
        metrics.update(log_probabilities(logits[half]), labels[half])
        found = metrics.compute()
    assert found == pytest.approx(scores(logits, labels))


def test_classification_metrics_break_ties_by_first_class():
    logits, labels = predictions(2000, classes=50)
    logits = logits.bfloat16()
    task = Classification()
    found = task.predict(logits, labels)
    assert int((found == found.amax(1, keepdim=True)).sum()) > len(found)  # there are some
    right = float(task.samples(found, labels).values.double().mean())
    order = np.argsort(-found.numpy(), axis=1, kind="stable")
    among = (order[:, :5] == labels.numpy()[:, None]).any(1).mean()
    computed = scores(logits, labels)
    assert computed["top1"] == pytest.approx(100 * right, rel=1e-12)
    assert computed["top5"] == pytest.approx(100 * among, rel=1e-12)


def test_classification_metrics_refuse_empty_data():
    with pytest.raises(EvaluationError, match="data is empty"):
        ClassificationMetrics().compute()
    with pytest.raises(EvaluationError, match="data is empty"):
        ClassificationMetrics().reliability()


# Reliability bins


def test_reliability_matches_definition():
    logits, labels = predictions(samples=1000, classes=3, seed=3)
    confidences, best = logits.softmax(1).max(1)
    bins = metrics_of(logits, labels).reliability()
    assert [b["low"] for b in bins] == pytest.approx([i / 15 for i in range(15)])
    assert [b["high"] for b in bins] == pytest.approx([i / 15 for i in range(1, 16)])
    for found in bins:
        inside = (confidences > found["low"]) & (confidences <= found["high"])
        assert found["n"] == int(inside.sum())
        if found["n"]:
            right = (best == labels)[inside].double().mean()
            assert found["accuracy"] == pytest.approx(float(right), rel=1e-12)
            assert found["confidence"] == pytest.approx(float(confidences[inside].mean()))
    assert sum(b["n"] for b in bins) == 1000


def test_reliability_gaps_add_up_to_ece():
    metrics = metrics_of(*predictions(samples=500, seed=5))
    gaps = [b["n"] * abs(b["accuracy"] - b["confidence"]) for b in metrics.reliability() if b["n"]]
    assert sum(gaps) / 500 == pytest.approx(metrics.compute()["ece"], rel=1e-12)


def test_reliability_has_no_values_for_empty_bins():
    bins = metrics_of(torch.tensor([[50.0, 0.0]]), torch.tensor([0])).reliability()
    assert all(b["n"] == 0 and b["confidence"] is b["accuracy"] is None for b in bins[:-1])
    assert bins[-1] == pytest.approx(
        {"low": 14 / 15, "high": 1, "n": 1, "confidence": 1, "accuracy": 1}
    )
    json.dumps(bins, allow_nan=False)


# Several processes, and the device


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.lists(st.integers(1, 40), max_size=4), min_size=1, max_size=4))
def test_classification_metrics_merge_across_processes(shares):
    sizes = [size for share in shares for size in share] + [1]
    logits, labels = predictions(samples=sum(sizes))
    some, theirs = iter(logits.split(sizes)), iter(labels.split(sizes))
    merged = ClassificationMetrics()
    for share in [*shares, [1]]:
        own = ClassificationMetrics()
        for _ in share:
            own.update(log_probabilities(next(some)), next(theirs))
        merged.merge(json.loads(json.dumps(own.state(), allow_nan=False)))
    whole = metrics_of(logits, labels)
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    for found, expected in zip(merged.reliability(), whole.reliability(), strict=True):
        assert found["n"] == expected["n"]
        if found["n"]:
            assert found == pytest.approx(expected, rel=1e-12)


def test_classification_metrics_take_batches_after_merge():
    logits, labels = predictions(samples=90)
    metrics = metrics_of(logits[:30], labels[:30])
    metrics.merge(metrics_of(logits[30:60], labels[30:60]).state())
    metrics.update(log_probabilities(logits[60:]), labels[60:])
    assert metrics.compute() == pytest.approx(scores(logits, labels), rel=1e-12)


def test_classification_metrics_do_not_wait_for_device():
    logits, labels = predictions()
    given, metrics = log_probabilities(logits), ClassificationMetrics()
    with NoWaiting():
        for some, theirs in zip(given.split(100), labels.split(100), strict=True):
            metrics.update(some, theirs)


@pytest.mark.gpu
@gpu
def test_classification_metrics_do_not_wait_for_gpu():
    logits, labels = predictions()
    metrics = ClassificationMetrics()
    here = [(log_probabilities(some), y.cuda()) for some, y in [(logits.cuda(), labels)] * 2]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in here:
            metrics.update(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = scores(torch.cat((logits, logits)), torch.cat((labels, labels)))
    assert metrics.compute() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_classification_metrics_take_labels_of_any_dtype(dtype):
    logits, labels = predictions()
    assert scores(logits, labels.to(dtype)) == scores(logits, labels)


def test_totals_keep_sums():
    totals, first = Totals(2), torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert totals.read().tolist() == [0, 0]
    totals.add(first)
    totals.add(torch.tensor([0.5, 0.25], dtype=torch.float64))
    assert totals.read().tolist() == [1.5, 2.25]
    assert first.tolist() == [1, 2]


# The mean of an ensemble's outputs


def ensemble(*members):
    mean = LogMean()
    for logits in members:
        mean.add(log_probabilities(torch.as_tensor(logits, dtype=torch.float64)), None)
    return mean


def test_log_mean_averages_softmax_and_not_logits():
    found = ensemble([[2.0, 0.0]], [[0.0, 1.0]]).value().exp()[0].tolist()
    assert found == pytest.approx([0.5748692, 0.4251308], abs=5e-8)
    assert found != pytest.approx([0.6224593, 0.3775407], abs=1e-2)


def test_log_mean_matches_numpy():
    members = [predictions(seed=i)[0] for i in range(5)]
    expected = np.mean([m.softmax(1).numpy() for m in members], axis=0)
    mean = ensemble(*members)
    assert mean.members == 5
    np.testing.assert_allclose(mean.value().exp().numpy(), expected, rtol=1e-12)


def test_log_mean_of_one_member_is_member():
    logits, _ = predictions()
    torch.testing.assert_close(ensemble(logits).value(), logits.log_softmax(1))


def test_log_mean_keeps_underflowing_probabilities():
    mean = ensemble([[2000.0, 0.0]], [[1000.0, 0.0]])
    assert mean.value()[0, 1].item() == pytest.approx(-1000 - math.log(2))


def test_log_mean_leaves_earlier_members_unchanged():
    first = log_probabilities(torch.tensor([[1.0, 2.0]]))
    kept = first.clone()
    mean = LogMean()
    mean.add(first, None)
    mean.add(log_probabilities(torch.tensor([[3.0, 0.0]])), None)
    mean.value()
    assert torch.equal(first, kept)


def test_log_mean_refuses_no_members():
    with pytest.raises(EvaluationError, match="no members"):
        LogMean().value()
