"""The verdict of a report: outcomes by interval and p, in careful words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Comparison, Result
from ckptavg.evaluation.significance import Difference
from ckptavg.plots.report.verdict import judge
from ckptavg.tasks import Metric
from ckptavg.tasks.classification import Classification

COST = Metric("cost", "cost", ".3f", False)
NEUTRAL = Metric("share", "share", ".3f", None)


def planned(count=5):
    return SimpleNamespace(plan=SimpleNamespace(checkpoints=(None,) * count))


def judged(difference, *, bn="recomputed", task=None, key="top1", count=5):
    average = planned(count)
    last = Candidate("last.pt", "checkpoint", (), (1.0,), last=True)
    candidate = Candidate("average", "average", (), (), average=average)
    versus = None
    if difference is not None:
        versus = Comparison("last.pt", key, difference)
    results = [
        Result(last, {key: 90.0, "n": 1000}, "own"),
        Result(candidate, {key: 92.5, "n": 1000}, bn, versus),
    ]
    return judge(results, task or Classification(), average)


@pytest.mark.parametrize(
    ("low", "high", "p", "outcome"),
    [
        (1.0, 4.0, 0.001, "better"),
        (-1.0, 4.0, 0.2, "undecided"),
        (0.01, 4.0, 0.06, "undecided"),
        (-0.01, 4.0, 0.04, "undecided"),
        (0.0, 4.0, 0.04, "undecided"),
        (-4.0, -1.0, 0.001, "worse"),
    ],
)
def test_verdict_needs_interval_and_p(low, high, p, outcome):
    value = (low + high) / 2
    assert judged(Difference(value, low, high, p, "mcnemar", 1000)).outcome == outcome


def test_verdict_is_one_sentence_with_the_interval():
    verdict = judged(Difference(2.5, 1.25, 3.75, 0.0012, "mcnemar", 1000))
    assert verdict.text == (
        "On 1000 samples, the average of 5 checkpoints does better than the last checkpoint: "
        "top-1 92.50 % against 90.00 %, a difference of +2.50 percentage points with a 95 % "
        "interval from +1.25 to +3.75 (p = 0.0012)."
    )
    assert verdict.heading == "Better than the last checkpoint"


def test_verdict_gives_a_bound_for_a_very_small_p():
    assert "(p < 0.0001)" in judged(Difference(2.5, 1.25, 3.75, 1e-10, "mcnemar", 1000)).text


class Costs(Classification):
    metrics = (COST,)


class Shares(Classification):
    metrics = (NEUTRAL,)


def test_verdict_of_a_metric_that_is_better_low():
    difference = Difference(-2.5, -4.0, -1.0, 0.001, "bootstrap", 1000)
    assert judged(difference, task=Costs(), key="cost").outcome == "better"
    assert judged(difference, task=Shares(), key="share").outcome == "unknown"


def test_verdict_without_values_per_sample():
    verdict = judged(None)
    assert verdict.outcome == "unknown"
    assert "not known" in verdict.text


def test_verdict_on_stale_statistics_says_so():
    difference = Difference(2.5, 1.25, 3.75, 0.0012, "mcnemar", 1000)
    assert any("stale" in sentence for sentence in judged(difference, bn="stale").advice)
    assert not any("stale" in sentence for sentence in judged(difference).advice)


def test_verdict_on_one_checkpoint():
    verdict = judged(Difference(0.0, 0.0, 0.0, 1.0, "mcnemar", 1000), count=1)
    assert verdict.outcome == "single"
    assert verdict.average is None
