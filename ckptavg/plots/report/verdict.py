"""The verdict on an average, from its paired comparison with the last checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptavg.averaging.plan import Average
from ckptavg.evaluation.results import Result
from ckptavg.evaluation.score_table import SIGNIFICANT
from ckptavg.evaluation.significance import Difference
from ckptavg.formats.running_statistics import RECOMPUTED
from ckptavg.tasks import Metric, Task

Outcome = Literal["better", "worse", "undecided", "unknown", "single"]
_HEADINGS: dict[Outcome, str] = {
    "better": "Better than the last checkpoint",
    "worse": "Worse than the last checkpoint",
    "undecided": "Cannot be told from the last checkpoint",
    "unknown": "No comparison",
    "single": "Nothing to average",
}
_LAST = "the last checkpoint"
_SMALL_P = 0.0001


@dataclass(frozen=True)
class Verdict:
    """Judgement of an average against the last checkpoint, in one sentence.

    Attributes:
        outcome: The verdict in a word.
        text: The sentence, with the difference and its 95 % interval.
        advice: Sentences on what follows from it.
        average: Scores of the average; None where there is nothing to average.
        last: Scores of the last checkpoint.
    """

    outcome: Outcome
    text: str
    advice: tuple[str, ...]
    average: Result | None
    last: Result

    @property
    def heading(self) -> str:
        """The verdict in a few words."""
        return _HEADINGS[self.outcome]

    def as_json(self) -> dict[str, Any]:
        """Return the verdict as plain values for JSON."""
        return {"verdict": self.outcome, "text": self.text, "advice": list(self.advice)}


def judge(results: Sequence[Result], task: Task, average: Average) -> Verdict:
    """Judge an average by its paired comparison with the last checkpoint.

    One comparison is judged, that of the average which was asked for, with recomputed BatchNorm
    statistics where there are any. So its interval needs no correction for a choice among
    candidates. It does better, or worse, if 0 is outside the 95 % interval and p is below 0.05.

    Args:
        results: Scores of the last checkpoint and of the average, among others.
        task: The task that scored.
        average: The planned average to judge.
    """
    last = next(result for result in results if result.candidate.last)
    scored = find_average(results, average)
    if scored is None or len(average.plan.checkpoints) == 1:
        text = "There is one checkpoint, whose average is the checkpoint itself."
        return Verdict("single", text, ("Keep it.",), None, last)
    metric = _compared_metric(scored, task)
    count = len(average.plan.checkpoints)
    subject = f"the average of {count} checkpoints"
    values = _values_text(scored, last, metric)
    samples = f"{last.metrics['n']:.0f} {task.counts}"
    outcome = _outcome(scored, metric)
    if scored.versus is None:
        text = (
            f"On {samples}, {subject} has {values}; these data give no value per sample, so that "
            "it is not known whether the difference is more than noise."
        )
    else:
        difference = _difference_text(scored.versus.difference, metric)
        text = {
            "better": f"On {samples}, {subject} does better than {_LAST}: {values}, {difference}.",
            "worse": f"On {samples}, {subject} does worse than {_LAST}: {values}, {difference}.",
            "undecided": f"On {samples}, {subject} cannot be told from {_LAST}: {values}, "
            f"{difference}.",
            "unknown": f"On {samples}, {subject} has {values}, {difference}; the metric does not "
            "say which of its values are better.",
        }[outcome]
    advice = _advise(outcome, scored)
    refreshed = _find_refreshed(results, last)
    if outcome == "better" and refreshed is not None:
        advice += _credit_statistics(refreshed, metric)
    return Verdict(outcome, text, tuple(advice), scored, last)


def find_average(results: Sequence[Result], average: Average) -> Result | None:
    """Return the scores of a planned average, with recomputed statistics where there are any."""
    scored = [result for result in results if result.candidate.average is average]
    recomputed = [result for result in scored if result.bn in RECOMPUTED]
    for result in (*recomputed, *scored):
        return result
    return None


def _find_refreshed(results: Sequence[Result], last: Result) -> Result | None:
    """Return the scores of the last checkpoint with recomputed statistics."""
    for result in results:
        same = result.candidate.checkpoints == last.candidate.checkpoints
        if same and result.candidate.kind == "checkpoint" and result.bn in RECOMPUTED:
            return result
    return None


def _credit_statistics(refreshed: Result, metric: Metric) -> list[str]:
    """Tell that recomputed statistics alone make the last checkpoint better, if they do."""
    if _outcome(refreshed, metric) != "better":
        return []
    value = value_text(refreshed.metrics.get(metric.key), metric)
    return [
        "Not all of the difference is due to averaging: with its BatchNorm statistics recomputed "
        f"as well, the last checkpoint has {metric.title.removesuffix(' %')} {value}."
    ]


def _outcome(scored: Result, metric: Metric) -> Outcome:
    """Return the verdict in a word."""
    if scored.versus is None or metric.higher is None:
        return "unknown"
    difference = scored.versus.difference
    is_clear = difference.low > 0 or difference.high < 0
    # Interval and test may disagree in a borderline case: both have to tell a difference.
    if not is_clear or difference.p >= SIGNIFICANT:
        return "undecided"
    if (difference.value > 0) == metric.higher:
        return "better"
    return "worse"


def _compared_metric(scored: Result, task: Task) -> Metric:
    """Return the metric of a result's comparison; the first metric without a comparison."""
    if scored.versus is not None:
        for metric in task.metrics:
            if metric.key == scored.versus.metric:
                return metric
    return task.metrics[0]


def _values_text(scored: Result, last: Result, metric: Metric) -> str:
    """Word a metric of both: ``top-1 96.78 % against 95.13 %``."""
    title = metric.title.removesuffix(" %")
    first = value_text(scored.metrics.get(metric.key), metric)
    second = value_text(last.metrics.get(metric.key), metric)
    return f"{title} {first} against {second}"


def value_text(value: float | None, metric: Metric) -> str:
    """Format a value of a metric with its unit."""
    if value is None:
        return "not known"
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{value:{metric.form}}{unit}"


def _difference_text(difference: Difference, metric: Metric) -> str:
    """Word a difference with its interval and p."""
    unit = "percentage points" if metric.unit == "%" else metric.unit
    of_unit = f" {unit}" if unit else ""
    form = f"+{metric.form}"
    return (
        f"a difference of {difference.value:{form}}{of_unit} with a 95 % interval from "
        f"{difference.low:{form}} to {difference.high:{form}} ({p_text(difference.p)})"
    )


def p_text(p: float) -> str:
    """Word a p value; very small ones by their bound."""
    if p < _SMALL_P:
        return f"p < {_SMALL_P}"
    return f"p = {p:.2g}"


def _advise(outcome: Outcome, scored: Result) -> list[str]:
    """Word what follows from the verdict."""
    advice: list[str] = []
    if outcome == "better":
        advice.append("Take the average: in use it costs what one checkpoint costs.")
    elif outcome == "worse":
        advice.append(
            "Keep the last checkpoint. An average of later or fewer checkpoints may do better: "
            "ckptavg search looks for one, and corrects for the choice."
        )
    elif outcome == "undecided":
        advice.append(
            "Nothing here speaks against keeping the last checkpoint. The interval holds all "
            "differences that these data do not rule out; more of them narrow it."
        )
    if scored.bn == "stale":
        advice.append(
            "The BatchNorm statistics of this average are stale: they were averaged, not measured. "
            "Given training data, they are recomputed, which may change the verdict."
        )
    return advice
