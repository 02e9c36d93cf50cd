"""Classifiers as people write them: one logit, activations inside, labels of every form."""

import json
import logging

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import log_loss
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_accuracy, multiclass_calibration_error

from ckptavg import Candidate, evaluate
from ckptavg.errors import EvaluationError
from ckptavg.formats import open_checkpoint
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.metrics import ClassificationMetrics
from ckptavg.tasks.multilabel import MultiLabel

COUNT = 90
X = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(1))
BINARY = (X[:, 0] + 0.8 * X[:, 1] > 0.3).long()
CLASSES = 4
MANY = (X[:, 0] * 2).round().long().clamp(-1, 2) + 1
SIZE = 32  # of a batch; the last one is smaller


class Net(nn.Module):
    """A linear network with something at its end."""

    def __init__(self, classes, end=None):
        super().__init__()
        self.head, self.end = nn.Linear(6, classes), end

    def forward(self, x):
        outputs = self.head(x)
        return outputs if self.end is None else self.end(outputs)


def trained(seed, classes):
    torch.manual_seed(seed)
    net = Net(classes)
    with torch.no_grad():
        net.head.weight.mul_(4)
    return net


@pytest.fixture(params=[1, CLASSES], ids=["one_logit", "four_classes"])
def classes(request):
    return request.param


def saved(directory, classes):
    """Paths of three checkpoints, and their logits in float64."""
    paths, logits = [], []
    for seed in range(3):
        net = trained(seed, classes)
        paths.append(directory / f"epoch_{seed}.pt")
        torch.save(net.state_dict(), paths[-1])
        with torch.no_grad():
            logits.append(net.double()(X.double()))
    return paths, logits


def batches(labels, x=X):
    return list(zip(x.split(SIZE), labels.split(SIZE), strict=True))


def probabilities(logits):
    """By the definitions of sigmoid and softmax, as (N, classes)."""
    values = logits.numpy()
    if values.shape[1] == 1:
        present = 1 / (1 + np.exp(-values))
        return np.concatenate([1 - present, present], 1)
    powers = np.exp(values - values.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def assert_scores(result, expected, labels):
    right = expected.argmax(1) == labels.numpy()
    assert result.metrics.keys() == {"top1", "nll", "ece", "n"}
    assert result.metrics["n"] == COUNT
    assert result.metrics["top1"] == pytest.approx(100 * right.mean())
    nll = log_loss(labels, expected, labels=range(expected.shape[1]))
    assert result.metrics["nll"] == pytest.approx(nll, rel=1e-5)
    ece = multiclass_calibration_error(
        torch.from_numpy(expected), labels, expected.shape[1], 15, "l1"
    )
    assert result.metrics["ece"] == pytest.approx(float(ece), rel=1e-4)


# One logit


@pytest.mark.parametrize("end", [None, nn.Flatten(0)], ids=["column", "flat"])
def test_classification_takes_one_logit_as_binary(tmp_path, end):
    paths, logits = saved(tmp_path, 1)
    results = evaluate(
        [*paths, Candidate.of_ensemble([*map(open_checkpoint, paths)])],
        Net(1, end),
        batches(BINARY),
        device="cpu",
    )
    each = [probabilities(some) for some in logits]
    for result, expected in zip(results, [*each, np.mean(each, 0)], strict=True):
        assert_scores(result, expected, BINARY)
    oracle = binary_accuracy(logits[0].sigmoid()[:, 0], BINARY)
    assert results[0].metrics["top1"] == pytest.approx(100 * float(oracle))


def test_classification_compares_binary_pairs_by_mcnemar(tmp_path):
    paths, logits = saved(tmp_path, 1)
    _, second, _ = evaluate(paths, Net(1), batches(BINARY))
    right = [((some[:, 0] > 0) == BINARY) for some in logits[:2]]
    gained, lost = int((right[1] & ~right[0]).sum()), int((right[0] & ~right[1]).sum())
    expected = binomtest(gained, gained + lost).pvalue
    assert second.versus.difference.p == pytest.approx(expected)
    assert second.versus.difference.value == pytest.approx(100 * (gained - lost) / COUNT)


def test_classification_takes_zero_logit_as_class_zero():
    task = Classification()
    found = task.predict(torch.tensor([[0.0], [1e-12], [-1e-12]]), None)
    assert task.samples(found, torch.tensor([0, 1, 0])).values.tolist() == [1, 1, 1]


def test_classification_nll_is_exact_for_extreme_logits():
    task, metrics = Classification(), ClassificationMetrics()
    metrics.update(task.predict(torch.tensor([[-2000.0]]), None), torch.tensor([1]))
    assert metrics.compute()["nll"] == pytest.approx(2000)


# Labels


FORMS = {
    "column": lambda y, classes: y[:, None],
    "one_hot": F.one_hot,
    "one_hot_floats": lambda y, classes: F.one_hot(y, classes).float(),
    "one_hot_bools": lambda y, classes: F.one_hot(y, classes).bool(),
    "floats": lambda y, classes: y.float(),
    "column_of_floats": lambda y, classes: y.double()[:, None],
    "bytes": lambda y, classes: y.to(torch.uint8),
}


@pytest.mark.parametrize("form", FORMS)
def test_classification_takes_labels_of_every_form(tmp_path, classes, form):
    paths, _ = saved(tmp_path, classes)
    labels = BINARY if classes == 1 else MANY
    candidates = [*paths, Candidate.of_ensemble([*map(open_checkpoint, paths)])]
    expected = evaluate(candidates, Net(classes), batches(labels))
    given = FORMS[form](labels, max(classes, 2))
    found = evaluate(candidates, Net(classes), batches(given))
    for one, other in zip(found, expected, strict=True):
        assert one.metrics == other.metrics
        assert one.versus == other.versus


def test_classification_takes_bools_as_binary_labels(tmp_path):
    paths, _ = saved(tmp_path, 1)
    for labels in (BINARY.bool(), BINARY.bool()[:, None]):
        found, expected = (evaluate(paths[:1], Net(1), batches(y))[0] for y in (labels, BINARY))
        assert found.metrics == expected.metrics


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ((2, 1), [0, 2], "label 2, but the model tells 0 from 1 by a single output"),
        ((2, 1), [-1, 1], "label -1, but the model tells 0 from 1 by a single output"),
        ((2,), [0.3, 1.0], "not whole numbers: soft labels"),
        ((2, 4), [0, 4], "label 4, but the model has 4 classes"),
        ((2, 4), [[0.5, 0.5, 0, 0], [1, 0, 0, 0]], "neither 0 nor 1: soft labels"),
        ((2, 4), [[1, 1, 0, 0], [1, 0, 0, 0]], "a sample with 2 labels.* `task='multi-label'`"),
        ((2, 4), [[0, 0, 0, 0], [1, 0, 0, 0]], "a sample with 0 labels"),
        ((2, 4), [[0, 1, 0], [1, 0, 0]], r"one-hot \(N, 4\) are expected, but got \(2, 3\)"),
        (
            (2, 4, 3, 3),
            [[[0] * 3] * 3] * 2,
            r"\(2, 4, 3, 3\) and \(2, 3, 3\).* pass another `task`",
        ),
        ((2, 4, 5), [0, 1], r"\(2, 4, 5\) and \(2,\)"),
    ],
)
def test_classification_names_wrong_labels(outputs, labels, message):
    with pytest.raises(EvaluationError, match=message) as caught:
        Classification().check(torch.zeros(outputs), torch.tensor(labels))
    assert "\n" not in str(caught.value)


def test_classification_refuses_classes_instead_of_logits():
    with pytest.raises(EvaluationError, match=r"returns torch\.int64, classes instead of logits"):
        Classification().check(torch.zeros(4, dtype=torch.int64), torch.zeros(4))


def test_classification_ignores_trailing_axes_of_one():
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    Classification().check(logits[..., None, None], labels)
    found = Classification().predict(logits[..., None, None], labels)
    torch.testing.assert_close(found, logits.double().log_softmax(1))


# Top-5


@pytest.mark.parametrize(("count", "there"), [(2, False), (5, False), (6, True)])
def test_classification_top5_needs_six_classes(count, there):
    task, scores = Classification(), ClassificationMetrics()
    scores.update(task.predict(torch.randn(9, count), None), torch.zeros(9, dtype=torch.int64))
    assert ("top5" in scores.compute()) is there
    merged = ClassificationMetrics()
    merged.merge(json.loads(json.dumps(scores.state())))
    merged.merge(json.loads(json.dumps(ClassificationMetrics().state())))
    assert merged.compute() == scores.compute()


# Activations inside the model


def own_softmax(outputs):
    powers = outputs.exp()
    return powers / powers.sum(1, keepdim=True)


def flat_sigmoid(outputs):
    return torch.sigmoid(outputs).squeeze(1).float()


ENDS = {
    "softmax": (CLASSES, nn.Softmax(1)),
    "softmax_by_hand": (CLASSES, own_softmax),
    "log_softmax": (CLASSES, nn.LogSoftmax(1)),
    "sigmoid": (1, nn.Sigmoid()),
    "flat_sigmoid": (1, flat_sigmoid),
}


@pytest.mark.parametrize("end", ENDS)
def test_classification_takes_activations_in_model(tmp_path, caplog, end):
    caplog.set_level(logging.INFO, "ckptavg")
    classes, function = ENDS[end]
    paths, logits = saved(tmp_path, classes)
    labels = BINARY if classes == 1 else MANY
    candidates = [*paths, Candidate.of_ensemble([*map(open_checkpoint, paths)])]
    results = evaluate(candidates, Net(classes, function), batches(labels))
    each = [probabilities(some) for some in logits]
    for result, expected in zip(results, [*each, np.mean(each, 0)], strict=True):
        assert_scores(result, expected, labels)
    notes = [text for text in caplog.messages if "taken as such, not as logits" in text]
    assert len(notes) == (end != "log_softmax")


@pytest.mark.parametrize(("end", "dtype"), [("softmax", torch.bfloat16), ("sigmoid", torch.half)])
def test_classification_notices_probabilities_in_half(end, dtype):
    task = Classification()
    classes, function = ENDS[end]
    x = torch.randn(64, classes, generator=torch.Generator().manual_seed(0))
    outputs = task.watch(lambda: function(x.to(dtype)))
    expected = outputs.double()
    expected = torch.cat((1 - expected, expected), 1) if classes == 1 else expected
    torch.testing.assert_close(task.predict(outputs, None).exp(), expected)


@pytest.mark.parametrize(
    "rows",
    [[[0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.25, 0.75]] * 3, [[2.0, -1.0], [0.5, 0.5]]],
    ids=["one", "unit", "equal", "negative"],
)
def test_classification_takes_logits_that_sum_to_one(rows):
    logits = torch.tensor(rows)
    expected = logits.double().log_softmax(1)
    assert torch.equal(Classification().predict(logits, None), expected)


def test_classification_nll_is_finite_for_certain_softmax(tmp_path):
    task = Classification()
    outputs = task.watch(lambda: torch.tensor([[200.0, 0.0], [1.0, 0.0]]).softmax(1))
    found = task.predict(outputs, None)
    assert bool(task.is_finite(found))
    assert found[0].tolist() == pytest.approx([0, np.log(torch.finfo(torch.float32).tiny)])
    task.scores()
    one = task.watch(lambda: torch.tensor([200.0, -200.0]).sigmoid())
    assert bool(task.is_finite(task.predict(one, None)))


def test_classification_notes_weak_logits(caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    logits = torch.linspace(0.1, 0.9, 20)[:, None]
    found = Classification().predict(logits, None)
    torch.testing.assert_close(found[:, 1].exp(), logits[:, 0].double().sigmoid())
    assert "taken for a logit" in caplog.text


def test_classification_notes_sigmoid_per_class(caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    task = Classification()
    outputs = task.watch(lambda: torch.randn(20, 3).sigmoid())
    torch.testing.assert_close(task.predict(outputs, None), outputs.double().log_softmax(1))
    assert "no distribution over classes" in caplog.text


def test_classification_ignores_gate_before_logits():
    task, x = Classification(), torch.randn(20, 1)
    outputs = task.watch(lambda: 1e-3 + x.sigmoid() * 0.5)
    found = task.predict(outputs, None)
    torch.testing.assert_close(found[:, 1:].exp(), outputs.double().sigmoid())


def test_classification_notices_sigmoid_in_forward(tmp_path):
    paths, logits = saved(tmp_path, 1)

    def forward(model, batch):
        return model(batch[0]).sigmoid()

    [result] = evaluate(paths[:1], Net(1), batches(BINARY), forward=forward)
    assert_scores(result, probabilities(logits[0]), BINARY)


def test_classification_takes_logits_after_probabilities(tmp_path):
    paths, logits = saved(tmp_path, CLASSES)
    task = Classification()
    evaluate(paths[:1], Net(CLASSES, nn.Softmax(1)), batches(MANY), task=task)
    [result] = evaluate(paths[:1], Net(CLASSES), batches(MANY), task=task)
    assert_scores(result, probabilities(logits[0]), MANY)


def test_multi_label_takes_sigmoid_in_model(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    paths, _ = saved(tmp_path, CLASSES)
    labels = (X[:, :CLASSES] > 0.2).long()
    expected, found = (
        evaluate(paths, Net(CLASSES, end), batches(labels), task=MultiLabel())
        for end in (None, nn.Sigmoid())
    )
    for one, other in zip(found, expected, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
    assert "a sigmoid is in it" in caplog.text
