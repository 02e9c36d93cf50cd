"""What evaluation knows of a kind of model: the base of tasks, classification, tasks by name."""

import copy

import numpy as np
import pytest
import torch
from helpers import opened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptavg import Candidate, evaluate
from ckptavg.averaging.plan import plan_average
from ckptavg.errors import EvaluationError, SpecError, UsageError
from ckptavg.specs.tasks import default_task, make_task
from ckptavg.tasks import Metric, Samples, Task
from ckptavg.tasks.base import ArithmeticMean, LogMean, in_float64
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.named import as_task


@pytest.mark.parametrize("name", ["image-classification", "causal-lm", "regression"])
def test_task_names_its_training_loss_among_its_metrics(name):
    task = as_task(name)
    metrics = {metric.key: metric for metric in task.metrics}
    assert metrics[task.loss].higher is False
    assert Task.loss is None


class Sums:
    """A mean of values, as little as there can be of it."""

    def __init__(self):
        self.count, self.total = 0, 0.0

    def update(self, predictions, targets):
        self.count += len(predictions)
        self.total += float((predictions - targets).square().sum())

    def compute(self):
        if not self.count:
            raise EvaluationError("the evaluation data is empty")
        return {"loss": self.total / self.count, "n": self.count}

    def state(self):
        return [self.count, self.total]

    def merge(self, state):
        self.count += state[0]
        self.total += state[1]


class Squares(Task):
    """As little of a task as a user can write."""

    metrics = (Metric("loss", "squared error", ".3f", False),)

    def predict(self, outputs, targets):
        return outputs.double().flatten()

    def scores(self):
        return Sums()


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x * self.slope


X = torch.arange(1.0, 7.0)[:, None]
Y = 3 * X.flatten()
DATA = list(zip(X.split(4), Y.split(4), strict=True))


@pytest.fixture
def lines(tmp_path):
    """Checkpoints whose slopes are 1, 2, 6."""
    return opened(tmp_path, [{"slope": torch.tensor([slope])} for slope in (1.0, 2.0, 6.0)])


# A task of the user's own


def loss_of(slope):
    return float(((slope * X.flatten() - Y) ** 2).mean())


def test_task_of_user_scores_every_kind_of_candidate(lines):
    candidates = [
        *lines,
        Candidate.of_average(plan_average(lines), "average", recompute=False),
        Candidate.of_ensemble(lines),
    ]
    results = evaluate(candidates, Line(), DATA, task=Squares())
    assert [r.metrics["loss"] for r in results] == pytest.approx([*map(loss_of, (1, 2, 6, 3, 3))])
    assert {r.metrics["n"] for r in results} == {6}
    assert all(r.versus is None and r.details == {} for r in results)


def test_task_with_samples_is_compared(lines):
    class Compared(Squares):
        def samples(self, predictions, targets):
            return Samples((predictions - targets).square(), scale=10.0)

    first, second, _ = evaluate(lines, Line(), DATA, task=Compared())
    assert first.versus is None
    assert second.versus.reference == "epoch_1.pt"
    assert second.versus.metric == "loss"
    assert second.versus.difference.value == pytest.approx(10 * (loss_of(2) - loss_of(1)))


def test_task_may_override_split_and_forward(lines):
    class Unusual(Squares):
        def split(self, batch):
            return batch["in"], {"of": [batch["out"]]}

        def forward(self, model, inputs):
            return {"doubled": 2 * model(inputs)}

        def predict(self, outputs, targets):
            assert isinstance(targets, dict)
            return outputs["doubled"].double().flatten()

        def scores(self):
            class Inner(Sums):
                def update(self, predictions, targets):
                    super().update(predictions, targets["of"][0])

            return Inner()

    data = [{"in": x, "out": y} for x, y in DATA]
    results = evaluate(lines, Line(), data, task=Unusual())
    assert [r.metrics["loss"] for r in results] == pytest.approx([*map(loss_of, (2, 4, 12))])


def test_task_may_refuse_outputs(lines):
    class Refusing(Squares):
        def check(self, outputs, targets):
            if len(targets) < 4:
                raise EvaluationError("too few")

    with pytest.raises(EvaluationError, match="too few"):
        evaluate(lines, Line(), DATA, task=Refusing())


def test_task_decides_by_is_finite(lines):
    class Lenient(Squares):
        def is_finite(self, predictions):
            return torch.tensor(True)

    data = [(torch.full((2, 1), torch.inf), torch.zeros(2))]
    with pytest.raises(EvaluationError, match=r"epoch_1\.pt: the outputs are not finite"):
        evaluate(lines, Line(), data, task=Squares())
    assert evaluate(lines, Line(), data, task=Lenient())[0].metrics["loss"] == torch.inf


def test_task_passes_own_errors_on(lines):
    class Broken(Squares):
        def predict(self, outputs, targets):
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        evaluate(lines, Line(), DATA, task=Broken())


# How an ensemble's members combine


def members(draw, positive):
    shape = draw(st.tuples(st.integers(0, 4), st.integers(1, 5)))
    count, seed = draw(st.integers(1, 6)), draw(st.integers(0, 99))
    values = np.random.default_rng(seed).normal(size=(count, *shape)) * 3
    return np.exp(values) if positive else values


@settings(max_examples=60)
@given(st.data(), st.sets(st.integers(0, 5)))
def test_mean_matches_numpy_wherever_parked(data, parks):
    positive = data.draw(st.booleans())
    values = members(data.draw, positive)
    mean = LogMean() if positive else ArithmeticMean()
    given_values = torch.from_numpy(np.log(values) if positive else values)
    kept = given_values.clone()
    for i, some in enumerate(given_values):
        if i in parks:
            mean.offload()
            mean = copy.deepcopy(mean)
        mean.add(some, None)
    assert mean.members == len(values)
    expected = np.log(values.mean(0)) if positive else values.mean(0)
    np.testing.assert_allclose(mean.value().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(given_values, kept)  # others use the same predictions


def test_log_mean_averages_zero_and_tiny_probabilities():
    mean = LogMean()
    for logs in ([-torch.inf, -800.0], [0.0, -801.0]):
        mean.add(torch.tensor([logs], dtype=torch.float64), None)
    expected = [np.log(0.5), -800 + np.log1p(np.exp(-1)) - np.log(2)]
    assert mean.value()[0].tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("kind", [ArithmeticMean, LogMean])
def test_mean_refuses_no_members(kind):
    mean = kind()
    mean.offload()
    with pytest.raises(EvaluationError, match="no members"):
        mean.value()


def test_log_mean_matches_worked_ensemble():
    mean, task = Classification().mean(), Classification()
    for logits in ([2.0, 0.0], [0.0, 1.0]):
        mean.add(task.predict(torch.tensor([logits]), None), None)
    assert mean.value().exp()[0].tolist() == pytest.approx([0.5748692, 0.4251308], abs=1e-7)


# Classification


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_classification_predicts_float64_log_probabilities(dtype):
    logits = torch.tensor([[1.0, -2.0, 0.5], [800.0, 0.0, 1.0]]).to(dtype)
    found = Classification().predict({"logits": logits}, None)
    values = logits.double().numpy()
    expected = values - np.logaddexp.reduce(values, axis=1, keepdims=True)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_in_float64_drops_gradients():
    logits = torch.ones(2, 3, requires_grad=True)
    assert not in_float64(logits).requires_grad


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 2]), torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([1.0, 2.0]),
     torch.tensor([False, True]), torch.tensor([], dtype=torch.int64)],
    ids=["int64", "uint8", "float", "bool", "empty"],
)  # fmt: skip
def test_classification_takes_labels_that_are_classes(labels):
    Classification().check(torch.zeros(len(labels), 3), labels)


@pytest.mark.parametrize(
    ("labels", "word"),
    [([0, 3], "label 3, but the model has 3"), ([-1, 9], "label -1,"), ([0.5, 1.0], "not whole")],
)
def test_classification_refuses_labels_outside_classes(labels, word):
    with pytest.raises(EvaluationError, match=word):
        Classification().check(torch.zeros(2, 3), torch.tensor(labels))


def test_classification_samples_are_right_or_wrong():
    logs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]]).log()
    found = Classification().samples(logs, torch.tensor([1.0, 1.0, 1.0]))
    assert found.values.tolist() == [1, 0, 1]
    assert found.answers.tolist() == [1, 0, 1]
    assert (found.weights, found.scale, found.metric) == (None, 100.0, None)


# By name


@pytest.mark.parametrize(
    ("name", "first"),
    [("image-classification", "top1"), ("multi-label", None), ("regression", "rmse")],
)
def test_make_task_knows_tasks_by_name(name, first):
    task = make_task(name)
    assert isinstance(task, Task)
    assert first in (None, task.metrics[0].key)


def test_as_task_takes_name_or_task():
    own = Squares()
    assert as_task(own) is own
    assert as_task("regression").metrics == make_task("regression").metrics
    assert type(as_task(None)) is Classification


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Squares, r"is the class Squares\. Call it: Squares\(\)"),
        ("language", "is 'language'$"),
        (7, "is 7$"),
    ],
    ids=["class", "unknown", "number"],
)
def test_as_task_refuses_anything_else(task, told):
    with pytest.raises(UsageError, match=f"regression, but {told}"):
        as_task(task)


def test_make_task_lists_known_names():
    with pytest.raises(UsageError, match=r"image-classification, causal-lm.*'segmentation'"):
        make_task("segmentation")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("text:corpus.txt", "causal-lm"),
        ("tokens:corpus.bin", "causal-lm"),
        ("imagefolder:val", "image-classification"),
        ("cifar10:data", "image-classification"),
    ],
)
def test_default_task_follows_from_data(data, expected):
    assert default_task(data) == expected


TASK_FILE = """
from ckptavg.tasks import Metric, Task
class Mine(Task):
    metrics = (Metric("a", "a", ".1f", True),)
    def predict(self, outputs, targets):
        return outputs
    def scores(self):
        return None
class Empty(Task):
    pass
def made():
    return Mine()
def text():
    return "no task"
"""


@pytest.mark.parametrize("name", ["Mine", "made"])
def test_make_task_loads_task_from_file(tmp_path, name):
    (tmp_path / "tasks_of_mine.py").write_text(TASK_FILE)
    assert make_task(f"{tmp_path / 'tasks_of_mine.py'}:{name}").metrics[0].key == "a"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "expected to give a ckptavg.tasks.Task but gives a str"),
        ("Empty", "has no metrics"),
        ("Other", "has no attribute 'Other'"),
    ],
)
def test_make_task_refuses_other_objects(tmp_path, name, message):
    (tmp_path / "tasks_of_another.py").write_text(TASK_FILE)
    with pytest.raises(SpecError, match=message):
        make_task(f"{tmp_path / 'tasks_of_another.py'}:{name}")


def test_make_task_suggests_name_for_typo():
    with pytest.raises(UsageError, match="Did you mean image-classification"):
        make_task("image-clasification")
