"""Table of the scores of candidates, as text and HTML."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.display.table_html import table_html
from ckptavg.display.table_layout import BEST, table_text
from ckptavg.display.tables import NOTHING, Cell, Column, Mark, Row, Table
from ckptavg.errors import first_few

if TYPE_CHECKING:
    from ckptavg.evaluation.results import Comparison, Result
    from ckptavg.evaluation.significance import Difference
    from ckptavg.tasks import Metric, Task

# A difference with a p below this is significant.
SIGNIFICANT = 0.05
# The choice of the best is noted from this number of candidates beside the baseline on.
_FEWEST_TO_CHOOSE = 3
_TESTS = {
    "mcnemar": "p: McNemar's exact test",
    "bootstrap": "95 %: paired bootstrap, p: randomization test",
}
# On a narrow terminal these metrics are left out first. The likelihood is left out late, since it
# differs even where accuracies are equal.
_EARLY_TO_LEAVE = ("top5", "ece")
_LATE_TO_LEAVE = ("nll",)
# Names are cut to this before the comparison or the statistics are left out. The statistics are
# needed to distinguish two averages with the same name.
_SHORT_NAME = 10
_PARTLY = "partly: some of its BatchNorm statistics were recomputed"


@dataclass(frozen=True)
class _FilledColumn:
    """A column with a cell per result."""

    column: Column
    cells: list[Cell]


@dataclass(frozen=True)
class _Priorities:
    """Order in which columns are left out on a narrow terminal, as a number per column.

    Attributes:
        metrics: Numbers of the metrics' columns by key; 0 for a column that stays.
        p: Number of the column of p.
        difference: Number of the column of the difference.
        statistics: Number of the column of BatchNorm statistics.
    """

    metrics: Mapping[str, int]
    p: int
    difference: int
    statistics: int


def scores_text(results: Sequence[Result], task: Task, width: int | None = None) -> str:
    """Draw the scores of candidates as plain text.

    Args:
        results: At least one result, in the table's order.
        task: The task that scored the candidates.
        width: Width in columns of a terminal; None for the whole table at any width.
    """
    return table_text(tabulate_scores(results, task), width)


def scores_html(results: Sequence[Result], task: Task) -> str:
    """Draw the scores of candidates as HTML.

    Args:
        results: At least one result, in the table's order.
        task: The task that scored the candidates.
    """
    return table_html(tabulate_scores(results, task))


def tabulate_scores(results: Sequence[Result], task: Task) -> Table:
    """Make the table of candidates' scores.

    The best candidates by the task's first metric are marked, unless all are equally good. A
    difference from the baseline is marked where p is below 0.05. Empty columns are left out: the
    BatchNorm statistics of models without BatchNorm, a metric that no candidate has.

    Args:
        results: At least one result, in the table's order.
        task: The task that scored the candidates.
    """
    metrics = [task.metrics[0]]
    for metric in task.metrics[1:]:
        if _has_values(metric, results):
            metrics.append(metric)
    priorities = _priorities(metrics)
    best = _best(results, metrics[0])
    columns = [
        _name_column(results, best),
        *_statistics_column(results, priorities),
        *_metric_columns(results, metrics, priorities, best),
        *_comparison_columns(results, task, priorities),
        _passes_column(results),
    ]
    rows = []
    for i, is_best in enumerate(best):
        rows.append(Row(tuple(filled.cells[i] for filled in columns), is_best))
    mark_legend = ""
    if _comparisons(results):
        mark_legend = f"bold Δ: p < {SIGNIFICANT}"
    return Table(
        f"{results[0].metrics['n']:.0f} {task.counts}",
        tuple(filled.column for filled in columns),
        tuple(rows),
        (*_legend(results, task, best), *_disagreements(results)),
        mark_legend,
    )


def _has_values(metric: Metric, results: Sequence[Result]) -> bool:
    return any(result.metrics.get(metric.key) is not None for result in results)


def _priorities(metrics: Sequence[Metric]) -> _Priorities:
    """Number the columns in the order of leaving out; the column of passes is number 1."""
    keys = [metric.key for metric in metrics[1:]]
    late = [key for key in _LATE_TO_LEAVE if key in keys]
    early = [key for key in _EARLY_TO_LEAVE if key in keys]
    for key in reversed(keys):
        if key not in (*early, *late):
            early.append(key)
    p = 2 + len(early)
    last = p + len(late)
    numbers: dict[str, int] = {}
    for number, key in enumerate(early, 2):
        numbers[key] = number
    for number, key in enumerate(late, p + 1):
        numbers[key] = number
    return _Priorities(numbers, p, difference=last + 1, statistics=last + 2)


def _best(results: Sequence[Result], metric: Metric) -> list[bool]:
    """Mark the best candidates by a metric; none where all are equal or no order is known."""
    values: list[float] = []
    numbers: list[float] = []
    for result in results:
        value = result.metrics.get(metric.key, math.nan)
        values.append(value)
        if not math.isnan(value):
            numbers.append(value)
    if metric.higher is None or not numbers:
        return [False] * len(values)
    top = min(numbers)
    if metric.higher:
        top = max(numbers)
    best = [value == top for value in values]
    if all(best):
        return [False] * len(values)
    return best


def _name_column(results: Sequence[Result], best: Sequence[bool]) -> _FilledColumn:
    cells = []
    for result, is_best in zip(results, best, strict=True):
        cells.append(Cell(result.candidate.name, _mark("best", is_best)))
    return _FilledColumn(Column("candidate", "name"), cells)


def _mark(mark: Mark, is_marked: bool) -> Mark | None:
    if is_marked:
        return mark
    return None


def _passes_column(results: Sequence[Result]) -> _FilledColumn:
    cells = [Cell(str(result.forwards)) for result in results]
    return _FilledColumn(Column("passes", "number", 1), cells)


def _statistics_column(results: Sequence[Result], priorities: _Priorities) -> list[_FilledColumn]:
    """Make the column of BatchNorm statistics; none if no candidate has any."""
    if all(result.bn == "none" for result in results):
        return []
    cells = [Cell(_statistics_text(result.bn)) for result in results]
    column = Column("BatchNorm", "text", priorities.statistics, _SHORT_NAME)
    return [_FilledColumn(column, cells)]


def _statistics_text(bn: str) -> str:
    """Return the word for a candidate's statistics, short: partly, of partly recomputed."""
    if bn.startswith("partly"):
        return "partly"
    return bn


def _metric_columns(
    results: Sequence[Result],
    metrics: Sequence[Metric],
    priorities: _Priorities,
    best: Sequence[bool],
) -> list[_FilledColumn]:
    """Make a column per metric; in the first, the best candidates' cells are marked."""
    columns = []
    for metric in metrics:
        cells = []
        for result, is_best in zip(results, best, strict=True):
            value = result.metrics.get(metric.key)
            text = NOTHING
            if value is not None:
                text = f"{value:{metric.form}}"
            cells.append(Cell(text, _mark("best", is_best and metric is metrics[0])))
        priority = priorities.metrics.get(metric.key, 0)
        columns.append(_FilledColumn(Column(metric.title, "number", priority), cells))
    return columns


def _comparison_columns(
    results: Sequence[Result], task: Task, priorities: _Priorities
) -> list[_FilledColumn]:
    """Make the columns of difference with interval, and of p; no columns without a comparison.

    The title has no unit of the metric, since % would be read as that of the interval.
    """
    comparisons = _comparisons(results)
    if not comparisons:
        return []
    title, form = _title_and_form(comparisons[0].metric, task)
    differences, chances = [], []
    for result in results:
        if result.versus is None:
            differences.append(Cell(NOTHING))
            chances.append(Cell(NOTHING))
            continue
        estimate = result.versus.difference
        mark = _mark("significant", estimate.p < SIGNIFICANT)
        differences.append(Cell(_difference_text(estimate, form), mark))
        chances.append(Cell(f"{estimate.p:.2g}", mark))
    difference = Column(f"Δ {_bare(title)} [95 %]", "number", priorities.difference, _SHORT_NAME)
    p = Column("p", "number", priorities.p)
    return [_FilledColumn(difference, differences), _FilledColumn(p, chances)]


def _comparisons(results: Sequence[Result]) -> list[Comparison]:
    """List the comparisons of the candidates that have one."""
    return [result.versus for result in results if result.versus is not None]


def _difference_text(difference: Difference, form: str) -> str:
    interval = f"[{difference.low:+{form}}, {difference.high:+{form}}]"
    return f"{difference.value:+{form}} {interval}"


def _bare(title: str) -> str:
    """Return a metric's title without the unit of %."""
    return title.removesuffix(" %")


def _legend(results: Sequence[Result], task: Task, best: Sequence[bool]) -> list[str]:
    """Word the lines below the table: the best candidate and the meaning of columns."""
    lines = []
    if any(best):
        winners = list(itertools.compress(results, best))
        names = first_few([_distinct_name(result, results) for result in winners])
        difference = _winners_difference(winners, results, task)
        lines.append(f"{BEST} best by {_bare(task.metrics[0].title)}: {names}{difference}")
        lines += _choice(winners, results)
    comparisons = _comparisons(results)
    if comparisons:
        test = _TESTS[comparisons[0].difference.test]
        lines.append(f"Δ: less {comparisons[0].reference} on the same samples; {test}")
    if any(_statistics_text(result.bn) == "partly" for result in results):
        lines.append(_PARTLY)
    return lines


def _choice(winners: Sequence[Result], results: Sequence[Result]) -> list[str]:
    """Word the caution that p ignores the choice of the best among several candidates."""
    compared = len(_comparisons(results))
    versus = winners[0].versus
    if len(winners) > 1 or versus is None or compared < _FEWEST_TO_CHOOSE:
        return []
    # Without a significant difference there is nothing that the choice could have caused.
    if versus.difference.p >= SIGNIFICANT:
        return []
    return [f"{BEST} is the best of {compared} on these samples, which its p leaves out of account"]


def _distinct_name(result: Result, results: Sequence[Result]) -> str:
    """Name a candidate, with the state of statistics if another candidate has the same name."""
    name = result.candidate.name
    count = sum(row.candidate.name == name for row in results)
    if count == 1:
        return name
    statistics = result.bn
    if _statistics_text(statistics) == "partly":
        statistics = "partly recomputed"
    return f"{name} with {statistics} statistics"


def _winners_difference(winners: Sequence[Result], results: Sequence[Result], task: Task) -> str:
    """Word the difference of the best candidate from the baseline; empty for several winners."""
    versus = winners[0].versus
    if len(winners) > 1 or versus is None:
        return ""
    last = [result.candidate.name for result in results if result.candidate.last]
    baseline = versus.reference
    if last == [baseline]:
        baseline = "the last checkpoint"
    title, form = _title_and_form(versus.metric, task)
    label = "Δ"
    if versus.metric != task.metrics[0].key:
        label += f" {_bare(title)}"
    return f"; {label} to {baseline} {_difference_text(versus.difference, form)}"


def _title_and_form(key: str, task: Task) -> tuple[str, str]:
    """Return the title and the format specification of a metric."""
    for metric in task.metrics:
        if metric.key == key:
            return metric.title, metric.form
    return key, ".4g"


def _disagreements(results: Sequence[Result]) -> list[str]:
    """Word the disagreement among members, a line per ensemble with known disagreement."""
    lines = []
    for result in results:
        if "disagreement" in result.details:
            share = 100 * result.details["disagreement"]
            name = result.candidate.name
            lines.append(f"{name}: two of its members differ on {share:.2f} % of the samples")
    return lines
