"""What is said of a candidate's evaluation."""

import json

import pytest
import torch
from helpers import opened
from hypothesis import given
from hypothesis import strategies as st

from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Comparison, Result, is_worse
from ckptavg.evaluation.significance import Difference
from ckptavg.tasks import Metric, Task

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
DIFFERENCES = st.builds(
    Difference, FLOATS, FLOATS, FLOATS, st.floats(0, 1), st.sampled_from(["mcnemar", "bootstrap"]),
    st.integers(1, 10**9),
)  # fmt: skip
DETAILS = st.dictionaries(
    st.sampled_from(["reliability", "disagreement", "not_unanimous"]),
    FLOATS | st.lists(st.dictionaries(st.text(), FLOATS | st.none()), max_size=3),
)


@given(
    st.dictionaries(st.text(), FLOATS, min_size=1),
    st.sampled_from(["own", "stale", "recomputed", "none"]),
    st.none() | st.builds(Comparison, st.text(), st.text(), DIFFERENCES),
    DETAILS,
)
def test_result_returns_from_json_unchanged(metrics, bn, versus, details):
    candidate = Candidate("x", "checkpoint", (), ())
    result = Result(candidate, metrics, bn, versus, details)
    text = json.dumps(result.as_json() | {"key": "0123"})
    assert Result.of_json(candidate, json.loads(text)) == result


@pytest.mark.parametrize(
    ("bn", "expected"),
    [
        ("recomputed", "<Result of last 2, recomputed: top1 49.3, nll 1.3858, n 1000>"),
        ("none", "<Result of last 2: top1 49.3, nll 1.3858, n 1000>"),
    ],
)
def test_result_repr_is_one_line(bn, expected):
    metrics = {"top1": 49.3, "nll": 1.3857993, "ece": None, "n": 1000}
    details = {"reliability": [{"low": 0.0, "high": 0.5}]}
    assert repr(Result(Candidate("last 2", "average", (), ()), metrics, bn, None, details)) == (
        expected
    )


def test_result_json_has_documented_entries(tmp_path):
    checkpoints = opened(tmp_path, [{"w": torch.ones(1)}] * 2)
    candidate = Candidate.of_ensemble(checkpoints, "both")
    found = Result(candidate, {"top1": 50.0, "n": 4}, "own").as_json()
    assert found == {
        "name": "both",
        "kind": "ensemble",
        "checkpoints": [str(c.path) for c in checkpoints],
        "coefficients": [0.5, 0.5],
        "metrics": {"top1": 50.0, "n": 4},
        "bn": "own",
        "forwards": 2,
    }


def test_result_json_holds_the_comparison():
    versus = Comparison("last", "top1", Difference(0.2, -0.1, 0.5, 0.3, "mcnemar", 1000))
    found = Result(Candidate("x", "checkpoint", (), ()), {}, "own", versus).as_json()
    assert found["versus"] == {
        "reference": "last", "metric": "top1", "difference": 0.2, "low": -0.1, "high": 0.5,
        "p": 0.3, "test": "mcnemar", "n": 1000,
    }  # fmt: skip


class Loss(Task):
    metrics = (Metric("loss", "loss", ".3f", False),)


class Gain(Task):
    metrics = (Metric("gain", "gain", ".3f", True),)


@pytest.mark.parametrize(
    ("task", "mine", "expected"),
    [(Loss(), 2.1, True), (Loss(), 2.0, False), (Loss(), 1.9, False),
     (Gain(), 2.1, False), (Gain(), 2.0, False), (Gain(), 1.9, True)],
)  # fmt: skip
def test_is_worse_follows_first_metric_of_task(task, mine, expected):
    key = task.metrics[0].key
    last = Result(Candidate("last", "checkpoint", (), (), last=True), {key: 2.0}, "own")
    average = Result(Candidate("average", "average", (), ()), {key: mine}, "stale")
    assert is_worse([last, average], task) is expected
