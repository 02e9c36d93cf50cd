"""The content of the table of scores: its columns, its rows, what is marked."""

import math

import pytest

from ckptavg.candidates import Candidate
from ckptavg.evidence import Difference
from ckptavg.results import Result, Versus
from ckptavg.score_table import tabulate_scores
from ckptavg.tasks import Metric, Task
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.language import CausalLM


def result(name, bn="own", *, p=None, forwards=1, metric="top1", **metrics):
    """A candidate's result; with ``p``, compared with a candidate called last."""
    versus = None
    if p is not None:
        versus = Versus("last", metric, Difference(1.5, 0.46, 2.554, p, "mcnemar", 100))
    kind = "checkpoint" if forwards == 1 else "ensemble"
    candidate = Candidate(name, kind, (None,) * forwards, (1 / forwards,) * forwards)
    return Result(candidate, {"n": 100, **metrics}, bn, versus)


def scores(top1, top5=99.0, nll=0.5, ece=0.01):
    return {"top1": top1, "top5": top5, "nll": nll, "ece": ece}


def titles(table):
    return [column.title for column in table.columns]


def texts(table):
    return [[cell.text for cell in row.cells] for row in table.rows]


def test_a_difference_and_its_interval_share_a_cell():
    table = tabulate_scores(
        [result("last", **scores(50)), result("a", "recomputed", p=0.012, **scores(51.5))],
        Classification(),
    )
    assert table.title == "100 samples"
    assert titles(table) == ["candidate", "BatchNorm", "top-1 %", "top-5 %", "NLL", "ECE",
                             "Δ top-1 [95 %]", "p", "passes"]  # fmt: skip
    assert texts(table) == [
        ["last", "own", "50.00", "99.00", "0.5000", "0.0100", "–", "–", "1"],
        ["a", "recomputed", "51.50", "99.00", "0.5000", "0.0100", "+1.50 [+0.46, +2.55]", "0.012",
         "1"],
    ]  # fmt: skip
    assert table.legend == (
        "*: the best top-1",
        "Δ: less last on the same samples; p: McNemar's exact test",
    )
    assert table.significance == "bold Δ: p < 0.05"


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([1, 3, 2], [1]),
        ([3, 1, 3], [0, 2]),
        ([2, 2], []),
        ([2], []),
        ([math.nan, 1], [1]),
        ([math.nan, math.nan], []),
        ([None, 5, 4], [1]),
    ],
)
@pytest.mark.parametrize("higher", [True, False, None])
def test_the_best_by_the_first_metric_are_marked(values, best, higher):
    class Own(Task):
        metrics = (Metric("x", "x", ".1f", higher), Metric("y", "y", ".1f", True))

    sign = {True: 1, False: -1, None: 1}[higher]
    results = []
    for i, value in enumerate(values):
        results.append(result(str(i), y=i, **({} if value is None else {"x": sign * value})))
    table = tabulate_scores(results, Own())
    expected = [] if higher is None else best
    assert [i for i, row in enumerate(table.rows) if row.best] == expected
    marked = [(i, j) for i, row in enumerate(table.rows)
              for j, cell in enumerate(row.cells) if cell.mark == "best"]  # fmt: skip
    assert marked == [(i, titles(table).index(name)) for i in expected
                      for name in ("candidate", "x")]  # fmt: skip
    assert ("*: the best x" in table.legend) is bool(expected)


def test_only_what_chance_rarely_does_is_marked_as_significant():
    results = [result(str(p), p=p, **scores(50)) for p in (None, 0.04999, 0.05, 1.7e-10)]
    table = tabulate_scores(results, Classification())
    marked = [[cell.text for cell in row.cells if cell.mark == "significant"] for row in table.rows]
    assert [len(cells) for cells in marked] == [0, 2, 0, 2]
    assert marked[3] == ["+1.50 [+0.46, +2.55]", "1.7e-10"]


def test_columns_that_say_nothing_are_left_out():
    results = [result(name, "none", nll=0.5, top1=value) for name, value in [("a", 1), ("b", 2)]]
    assert titles(tabulate_scores(results, Classification())) == [
        "candidate", "top-1 %", "NLL", "passes",
    ]  # fmt: skip
    mixed = [results[0], result("c", "stale", **scores(3.0))]
    assert texts(tabulate_scores(mixed, Classification()))[0] == [
        "a", "none", "1.00", "–", "0.5000", "–", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "metrics", "order"),
    [
        (Classification(), scores(1), ["passes", "top-5 %", "ECE", "p", "NLL"]),
        (CausalLM(), {"nll": 1, "perplexity": 2, "accuracy": 3},
         ["passes", "accuracy %", "perplexity", "p"]),
    ],
)  # fmt: skip
def test_columns_leave_in_turn_and_the_first_metric_stays(task, metrics, order):
    first = task.metrics[0].key
    results = [result(name, p=0.5, metric=first, **metrics) for name in "ab"]
    columns = tabulate_scores(results, task).columns
    leaving = sorted((column for column in columns if column.leaves), key=lambda c: c.leaves)
    assert [column.title for column in leaving] == order
    assert [column.title for column in columns if not column.leaves][-1].startswith("Δ ")


def test_an_ensemble_says_how_often_its_members_differ():
    both = result("both", forwards=2, **scores(50))
    told = Result(both.candidate, both.metrics, both.bn, None, {"disagreement": 0.125})
    table = tabulate_scores([result("a", **scores(49)), told], Classification())
    assert texts(table)[1][-1] == "2"
    assert table.legend[-1] == "both: two of its members differ on 12.50 % of the samples"
