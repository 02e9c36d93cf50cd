"""The content of the table of scores: its columns, its rows, what is marked."""

import math

import pytest

from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Comparison, Result
from ckptavg.evaluation.score_table import scores_html, scores_text, tabulate_scores
from ckptavg.evaluation.significance import Difference
from ckptavg.tasks import Metric, Task
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.language import CausalLM


def result(name, bn="own", *, p=None, forwards=1, metric="top1", **metrics):
    """A candidate's result; with ``p``, compared with a candidate called last."""
    versus = None
    if p is not None:
        versus = Comparison("last", metric, Difference(1.5, 0.46, 2.554, p, "mcnemar", 100))
    kind = "checkpoint" if forwards == 1 else "ensemble"
    candidate = Candidate(name, kind, (None,) * forwards, (1 / forwards,) * forwards)
    return Result(candidate, {"n": 100, **metrics}, bn, versus)


def scores(top1, top5=99.0, nll=0.5, ece=0.01):
    return {"top1": top1, "top5": top5, "nll": nll, "ece": ece}


def first_title(task):
    return task.metrics[0].title


def titles(table):
    return [column.title for column in table.columns]


def texts(table):
    return [[cell.text for cell in row.cells] for row in table.rows]


def test_score_table_shows_difference_with_interval():
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
        "* best by top-1: a; Δ to last +1.50 [+0.46, +2.55]",
        "Δ: less last on the same samples; p: McNemar's exact test",
    )
    assert table.significance == "bold Δ: p < 0.05"


@pytest.mark.parametrize(
    ("chances", "is_told"),
    [([0.01, 0.4, 0.4], True), ([0.01, 0.4], False), ([0.06, 0.01, 0.01], False)],
    ids=["of three", "of two", "not significant"],
)
def test_score_table_notes_a_best_chosen_from_many(chances, is_told):
    others = [result(f"a{n}", p=p, **scores(60 - n)) for n, p in enumerate(chances)]
    legend = tabulate_scores([result("last", **scores(50)), *others], Classification()).legend
    told = "* is the best of 3 on these samples, which its p leaves out of account"
    assert (told in legend) is is_told
    assert any("the best of" in line for line in legend) is is_told


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
def test_score_table_marks_best_by_first_metric(values, best, higher):
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
    best_names = ", ".join(map(str, expected))
    assert table.legend == ((f"* best by x: {best_names}",) if expected else ())


def test_score_table_marks_significant_differences():
    results = [result(str(p), p=p, **scores(50)) for p in (None, 0.04999, 0.05, 1.7e-10)]
    table = tabulate_scores(results, Classification())
    marked = [[cell.text for cell in row.cells if cell.mark == "significant"] for row in table.rows]
    assert [len(cells) for cells in marked] == [0, 2, 0, 2]
    assert marked[3] == ["+1.50 [+0.46, +2.55]", "1.7e-10"]


def test_score_table_omits_empty_columns():
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
        (Classification(), scores(1), ["passes", "top-5 %", "ECE", "p", "NLL", "Δ top-1 [95 %]"]),
        (CausalLM(), {"nll": 1, "perplexity": 2, "accuracy": 3},
         ["passes", "accuracy %", "perplexity", "p", "Δ NLL [95 %]"]),
    ],
)  # fmt: skip
def test_score_table_drops_columns_before_first_metric(task, metrics, order):
    first = task.metrics[0].key
    results = [result(name, p=0.5, metric=first, **metrics) for name in "ab"]
    columns = tabulate_scores(results, task).columns
    leaving = sorted((column for column in columns if column.leaves), key=lambda c: c.leaves)
    assert [column.title for column in leaving] == [*order, "BatchNorm"]
    staying = [column.title for column in columns if not column.leaves]
    assert staying == ["candidate", first_title(task)]


def test_score_table_gives_disagreement_of_ensemble():
    both = result("both", forwards=2, **scores(50))
    told = Result(both.candidate, both.metrics, both.bn, None, {"disagreement": 0.125})
    table = tabulate_scores([result("a", **scores(49)), told], Classification())
    assert texts(table)[1][-1] == "2"
    assert table.legend[-1] == "both: two of its members differ on 12.50 % of the samples"


def test_score_table_names_best_and_its_reference():
    last = Candidate("epoch_9.pt (last)", "checkpoint", (None,), (1,), last=True)
    found = Difference(-0.25, -0.5, -0.125, 0.001, "bootstrap", 100)
    versus = Comparison(last.name, "nll", found)
    results = [Result(last, {"n": 9, **scores(1)}, "own"),
               Result(result("a").candidate, {"n": 9, **scores(2)}, "own", versus)]  # fmt: skip
    line = tabulate_scores(results, Classification()).legend[0]
    assert line == ("* best by top-1: a; Δ NLL to the last checkpoint -0.2500 [-0.5000, -0.1250]")
    results[0] = Result(last, {"n": 9, **scores(3)}, "own")
    line = tabulate_scores(results, Classification()).legend[0]
    assert line == "* best by top-1: epoch_9.pt (last)"


def test_score_table_names_ties_without_difference():
    results = [result("last", **scores(1)), *(result(n, p=0.1, **scores(2)) for n in "abcde")]
    line = tabulate_scores(results, Classification()).legend[0]
    assert line == "* best by top-1: a, b, c and 2 more"


def test_score_table_explains_partly_recomputed_statistics():
    for word in ("partly", "partly recomputed"):
        results = [result("a", **scores(1)), result("b", word, **scores(1))]
        table = tabulate_scores(results, Classification())
        assert texts(table)[1][1] == "partly"
        assert table.legend == ("partly: some of its BatchNorm statistics were recomputed",)


RESULTS = [
    result("epoch_160.pt (last)", **scores(50)),
    result("average of 12 (uniform)", "stale", p=0.5, **scores(49.5)),
    result("average of 12 (uniform)", "recomputed", p=1.7e-10, **scores(52.5)),
]


@pytest.mark.parametrize("width", [24, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
def test_score_table_keeps_rows_to_a_line_at_any_width(width):
    lines = scores_text(RESULTS, Classification(), width).splitlines()
    assert all(len(line) <= width for line in lines)
    head, rows = lines[1], lines[3:6]
    assert [next(word for word in row.split() if word[2:3] == ".") for row in rows] == [
        "50.00", "49.50", "52.50",
    ]  # fmt: skip
    has_difference = "Δ top-1 [95 %]" in head
    assert has_difference is (width >= 60)
    assert ["+1.50 [+0.46, +2.55]" in row for row in rows] == [False, *2 * [has_difference]]
    assert lines[7].startswith("* best by top-1: ")


def test_score_table_distinguishes_long_names():
    long = "resnet50-cyclic-sgd-lr0.05-epoch=119-step=150000.ckpt (last)"
    results = []
    for key, p in (("state_dict", None), ("ema_state_dict", 0.5)):
        results.append(result(f"{long} [{key}]", p=p, **scores(50)))
        results.append(result(f"average of 12 (uniform) [{key}]", "stale", p=0.5, **scores(49)))
    lines = scores_text(results, Classification(), 80).splitlines()
    assert all(len(line) <= 80 for line in lines)
    first, _, second, _ = lines[3:7]
    assert "(last) [s" in first
    assert "(last) [e" in second
    assert "+1.50 [+0.46, +2.55]" in second


def test_score_table_shows_all_columns_where_they_fit():
    wide = scores_text(RESULTS, Classification(), 120)
    assert wide == scores_text(RESULTS, Classification(), None)
    assert wide.splitlines()[5] == (
        "* average of 12 (uniform)  recomputed    52.50    99.00  0.5000  0.0100  "
        "+1.50 [+0.46, +2.55]  1.7e-10       1"
    )
    narrow = scores_text(RESULTS, Classification(), 80).splitlines()
    assert narrow[5] == (
        "* average of 12 (uniform)  recomputed    52.50  0.5000  +1.50 [+0.46, +2.55]"
    )
    assert narrow[-1] == "not shown at this width: top-5 %, ECE, p, passes"


def test_score_table_html_has_all_rows_and_bold_cells():
    drawn = scores_html(RESULTS, Classification())
    assert drawn.count("<tr>") == 4
    assert "<b>1.7e-10</b>" in drawn
    assert "<b>0.5</b>" not in drawn
    assert "bold Δ: p &lt; 0.05" in drawn


def test_score_table_distinguishes_averages_by_statistics():
    line = tabulate_scores(RESULTS, Classification()).legend[0]
    name = "average of 12 (uniform) with recomputed statistics"
    assert line.startswith(f"* best by top-1: {name}; Δ to last +1.50 ")
