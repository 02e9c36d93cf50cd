"""Table of the scores of candidates, as text and HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.display.table_html import table_html
from ckptavg.display.table_layout import BEST, table_text
from ckptavg.display.tables import NOTHING, Cell, Column, Mark, Row, Table
from ckptavg.errors import first_few

if TYPE_CHECKING:
    from ckptavg.evaluation.results import Result
    from ckptavg.evaluation.significance import Difference
    from ckptavg.tasks import Metric, Task

# A difference with a p below this is significant.
SIGNIFICANT = 0.05
# Candidates beside the reference from which on the choice of the best is noted.
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


_Filled = tuple[Column, list[Cell]]


@dataclass(frozen=True)
class _Turns:
    """Order in which columns are left out on a narrow terminal, as a number per column."""

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
    difference from the reference is marked where p is below 0.05. Empty columns are left out: the
    BatchNorm statistics of models without BatchNorm, a metric that no candidate has.

    Args:
        results: At least one result, in the table's order.
        task: The task that scored the candidates.
    """
    metrics = [m for m in task.metrics if m is task.metrics[0] or _has_values(m, results)]
    turns = _turns_to_leave(metrics)
    best = _best(results, metrics[0])
    columns = [
        _name_column(results, best),
        *_statistics_column(results, turns),
        *_metric_columns(results, metrics, turns, best),
        *_comparison_columns(results, task, turns),
        (Column("passes", "number", 1), [Cell(str(result.forwards)) for result in results]),
    ]
    rows = zip(*(cells for _, cells in columns), strict=True)
    is_compared = any(result.versus is not None for result in results)
    return Table(
        f"{results[0].metrics['n']:.0f} {task.counts}",
        tuple(column for column, _ in columns),
        tuple(Row(cells, is_best) for cells, is_best in zip(rows, best, strict=True)),
        (*_legend(results, task, best), *_disagreements(results)),
        f"bold Δ: p < {SIGNIFICANT}" if is_compared else "",
    )


def _has_values(metric: Metric, results: Sequence[Result]) -> bool:
    return any(result.metrics.get(metric.key) is not None for result in results)


def _turns_to_leave(metrics: Sequence[Metric]) -> _Turns:
    """Number the columns in the order of leaving out; the column of passes is number 1."""
    keys = [metric.key for metric in metrics[1:]]
    late = [key for key in _LATE_TO_LEAVE if key in keys]
    early = [key for key in _EARLY_TO_LEAVE if key in keys]
    early += [key for key in reversed(keys) if key not in (*early, *late)]
    p = 2 + len(early)
    turns = {key: turn for turn, key in enumerate(early, 2)}
    turns |= {key: turn for turn, key in enumerate(late, p + 1)}
    last = p + len(late)
    return _Turns(turns, p, difference=last + 1, statistics=last + 2)


def _best(results: Sequence[Result], metric: Metric) -> list[bool]:
    """Mark the best candidates by a metric; none where all are equal or no order is known."""
    values = [result.metrics.get(metric.key, math.nan) for result in results]
    ranked = [value for value in values if not math.isnan(value)]
    if metric.higher is None or not ranked:
        return [False] * len(values)
    top = max(ranked) if metric.higher else min(ranked)
    best = [value == top for value in values]
    return [False] * len(values) if all(best) else best


def _name_column(results: Sequence[Result], best: Sequence[bool]) -> _Filled:
    cells = []
    for result, is_best in zip(results, best, strict=True):
        cells.append(Cell(result.candidate.name, "best" if is_best else None))
    return Column("candidate", "name"), cells


def _statistics_column(results: Sequence[Result], turns: _Turns) -> list[_Filled]:
    """Make the column of BatchNorm statistics; none if no candidate has any."""
    if all(result.bn == "none" for result in results):
        return []
    cells = [Cell(_statistics_text(result.bn)) for result in results]
    return [(Column("BatchNorm", "text", turns.statistics, _SHORT_NAME), cells)]


def _statistics_text(bn: str) -> str:
    """Return the word for a candidate's statistics, short: partly, of partly recomputed."""
    return "partly" if bn.startswith("partly") else bn


def _metric_columns(
    results: Sequence[Result], metrics: Sequence[Metric], turns: _Turns, best: Sequence[bool]
) -> list[_Filled]:
    """Make a column per metric; in the first, the best candidates' cells are marked."""
    columns = []
    for metric in metrics:
        cells = []
        for result, is_best in zip(results, best, strict=True):
            value = result.metrics.get(metric.key)
            mark: Mark | None = "best" if is_best and metric is metrics[0] else None
            cells.append(Cell(NOTHING if value is None else f"{value:{metric.form}}", mark))
        turn = turns.metrics.get(metric.key, 0)
        columns.append((Column(metric.title, "number", turn), cells))
    return columns


def _comparison_columns(results: Sequence[Result], task: Task, turns: _Turns) -> list[_Filled]:
    """Make the columns of difference with interval, and of p; no columns without a comparison.

    The title has no unit of the metric, since % would be read as that of the interval.
    """
    key = next((result.versus.metric for result in results if result.versus is not None), None)
    if key is None:
        return []
    title, form = _title_and_form(key, task)
    differences, chances = [], []
    for result in results:
        if result.versus is None:
            differences.append(Cell(NOTHING))
            chances.append(Cell(NOTHING))
            continue
        estimate = result.versus.difference
        mark: Mark | None = "significant" if estimate.p < SIGNIFICANT else None
        differences.append(Cell(_difference_text(estimate, form), mark))
        chances.append(Cell(f"{estimate.p:.2g}", mark))
    difference = Column(f"Δ {_bare(title)} [95 %]", "number", turns.difference, _SHORT_NAME)
    return [(difference, differences), (Column("p", "number", turns.p), chances)]


def _difference_text(found: Difference, form: str) -> str:
    return f"{found.value:+{form}} [{found.low:+{form}}, {found.high:+{form}}]"


def _bare(title: str) -> str:
    """Return a metric's title without the unit of %."""
    return title.removesuffix(" %")


def _legend(results: Sequence[Result], task: Task, best: Sequence[bool]) -> list[str]:
    """Word the lines below the table: the best candidate and the meaning of columns."""
    lines = []
    if any(best):
        winners = [result for result, is_best in zip(results, best, strict=True) if is_best]
        names = first_few([_name_alone(result, results) for result in winners])
        difference = _winners_difference(winners, results, task)
        lines.append(f"{BEST} best by {_bare(task.metrics[0].title)}: {names}{difference}")
        lines += _choice(winners, results)
    compared = [result.versus for result in results if result.versus is not None]
    if compared:
        test = _TESTS[compared[0].difference.test]
        lines.append(f"Δ: less {compared[0].reference} on the same samples; {test}")
    if any(_statistics_text(result.bn) == "partly" for result in results):
        lines.append(_PARTLY)
    return lines


def _choice(winners: Sequence[Result], results: Sequence[Result]) -> list[str]:
    """Word the caution that p ignores the choice of the best among several candidates."""
    compared = sum(result.versus is not None for result in results)
    versus = winners[0].versus
    if len(winners) > 1 or versus is None or compared < _FEWEST_TO_CHOOSE:
        return []
    # Without a significant difference there is nothing that the choice could have caused.
    if versus.difference.p >= SIGNIFICANT:
        return []
    return [f"{BEST} is the best of {compared} on these samples, which its p leaves out of account"]


def _name_alone(result: Result, results: Sequence[Result]) -> str:
    """Name a candidate, with the state of statistics if another candidate has the same name."""
    name = result.candidate.name
    count = sum(row.candidate.name == name for row in results)
    if count == 1:
        return name
    statistics = "partly recomputed" if _statistics_text(result.bn) == "partly" else result.bn
    return f"{name} with {statistics} statistics"


def _winners_difference(winners: Sequence[Result], results: Sequence[Result], task: Task) -> str:
    """Word the difference of the best candidate from the reference; empty for several winners."""
    versus = winners[0].versus
    if len(winners) > 1 or versus is None:
        return ""
    last = [result.candidate.name for result in results if result.candidate.last]
    reference = "the last checkpoint" if last == [versus.reference] else versus.reference
    title, form = _title_and_form(versus.metric, task)
    label = "Δ" if versus.metric == task.metrics[0].key else f"Δ {_bare(title)}"
    return f"; {label} to {reference} {_difference_text(versus.difference, form)}"


def _title_and_form(key: str, task: Task) -> tuple[str, str]:
    """Return the title and the format specification of a metric."""
    return next(((m.title, m.form) for m in task.metrics if m.key == key), (key, ".4g"))


def _disagreements(results: Sequence[Result]) -> list[str]:
    """Word the disagreement among members, a line per ensemble with known disagreement."""
    lines = []
    for result in results:
        if "disagreement" in result.details:
            share = 100 * result.details["disagreement"]
            name = result.candidate.name
            lines.append(f"{name}: two of its members differ on {share:.2f} % of the samples")
    return lines
