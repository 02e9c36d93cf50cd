"""The tensor that is scored among all that a model returns."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ckptavg import evaluate
from ckptavg.errors import EvaluationError
from ckptavg.tasks.language import CausalLM
from ckptavg.tasks.model_outputs import take_output
from ckptavg.tasks.regression import Regression

LOGITS = torch.tensor([[1.0, 2.0]])
FEATURES = torch.ones(1, 16)
Exits = namedtuple("Exits", "first second")
Inception = namedtuple("Inception", "logits aux_logits")


@dataclass
class Head:
    scores: torch.Tensor
    hidden: object = None


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS, None),
        (None, LOGITS),
        (LOGITS,),
        [(LOGITS,)],
        (LOGITS, "auxiliary"),
        (LOGITS, ()),
        (LOGITS, torch.tensor(0.5)),  # a loss
        {"scores": LOGITS},
        Head(LOGITS),
        {"loss": torch.ones(1), "logits": LOGITS, "hidden_states": (FEATURES, FEATURES)},
        {"logits": (LOGITS, None), "features": FEATURES},
        OrderedDict(out=LOGITS, aux=LOGITS + 1),
        SimpleNamespace(logits=LOGITS, features=FEATURES),
        SimpleNamespace(logits=None, out=LOGITS),
        Inception(LOGITS, LOGITS + 1),
    ],
    ids=[
        "tensor", "none_after", "none_before", "one", "nested", "text", "empty", "loss", "dict",
        "dataclass", "transformers", "tuple_in_dict", "torchvision", "object", "out", "inception",
    ],
)  # fmt: skip
def test_take_output_takes_only_candidate_tensor(outputs):
    assert take_output(outputs) is LOGITS


@pytest.mark.parametrize(
    ("outputs", "listed"),
    [
        ((FEATURES, LOGITS), r"2 tensors .*: \[0\] of shape \(1, 16\), \[1\] of shape \(1, 2\)"),
        ([LOGITS, LOGITS], r"\[0\] of shape \(1, 2\), \[1\] of shape \(1, 2\)"),
        ([LOGITS] * 6, r"6 tensors .*\[3\] of shape \(1, 2\) and 2 more"),
        (Exits(LOGITS, LOGITS), r"\[0\] of shape"),
        ({"main": LOGITS, "auxiliary": LOGITS}, r"\['main'\] of shape .*, \['auxiliary'\] of"),
        ({"logits": [LOGITS, LOGITS]}, r"2 tensors .*\[1\] of shape"),
        ({"last": FEATURES, "pooled": (FEATURES,)}, r"\['last'\] .*, \['pooled'\]\[0\]"),
        (Head(LOGITS, [FEATURES]), r"\.scores of shape \(1, 2\), \.hidden\[0\] of shape \(1, 16\)"),
    ],
    ids=["features", "exits", "many", "namedtuple", "dict", "logits", "transformers", "dataclass"],
)  # fmt: skip
def test_take_output_refuses_several_tensors(outputs, listed):
    with pytest.raises(EvaluationError, match=listed) as caught:
        take_output(outputs)
    assert "`forward=fn`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outputs", [None, {"score": 1.0}, (), "cat"], ids=str)
def test_take_output_refuses_outputs_without_tensor(outputs):
    with pytest.raises(EvaluationError, match=f"returned a {type(outputs).__name__}"):
        take_output(outputs)


class TwoOutputs(nn.Module):
    """Features beside logits, as people return them for a loss on both."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.body(x).relu()
        return hidden, self.head(hidden)


def test_evaluate_scores_one_of_two_outputs_by_forward(tmp_path):
    torch.manual_seed(0)
    model, x = TwoOutputs(), torch.randn(20, 3)
    labels = torch.randint(4, (20,))
    torch.save(model.state_dict(), tmp_path / "one.pt")
    with pytest.raises(EvaluationError, match=r"\[0\] of shape \(20, 8\), \[1\] of shape \(20, 4"):
        evaluate([tmp_path / "one.pt"], model, [(x, labels)])

    def forward(model, batch):
        return model(batch[0])[1]

    [found] = evaluate([tmp_path / "one.pt"], model, [(x, labels)], forward=forward)
    expected = nn.functional.cross_entropy(model(x)[1].double(), labels)
    assert found.metrics["nll"] == pytest.approx(expected.item(), rel=1e-6)


def test_causal_lm_ignores_recurrent_state_in_outputs():
    logits, state = torch.randn(2, 5, 7), torch.randn(1, 2, 16)
    targets = torch.zeros(2, 5, dtype=torch.int64)
    task = CausalLM()
    for outputs in ((logits, state), (logits, (state, state)), (state, logits)):
        task.check(outputs, targets)
        assert task.predict(outputs, targets).data_ptr() == logits.data_ptr()
    with pytest.raises(EvaluationError, match=r"2 tensors"):
        task.check((torch.randn(2, 5, 16), logits), targets)


def test_regression_refuses_mean_and_variance():
    with pytest.raises(EvaluationError, match=r"2 tensors .*\[1\] of shape \(3, 1\)"):
        Regression().check((torch.ones(3, 1), torch.ones(3, 1)), torch.ones(3))


def test_causal_lm_refuses_probabilities():
    probabilities = torch.randn(2, 5, 7).softmax(2)
    targets = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(EvaluationError, match="returns probabilities"):
        CausalLM().check(probabilities, targets)
    CausalLM().check(probabilities.log(), targets)
