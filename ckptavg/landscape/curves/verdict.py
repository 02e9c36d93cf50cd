"""Plain sentences about a curve: is the average better, and does the gap to training data grow?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptavg.evaluation.results import Result
from ckptavg.landscape.points import PointScore
from ckptavg.tasks import Metric, Task

# A difference with a p below this is significant.
_SIGNIFICANT = 0.05
# Parts that a run is divided into, the first and the last of which are compared.
_PARTS = 3


@dataclass(frozen=True)
class PairComparison:
    """Two candidates on the same samples.

    Attributes:
        subject: Name of the first in sentences, such as "the average of all 5".
        reference: Name of the second.
        result: Result of the first, with the second as the baseline.
        baseline: Result of the second.
        task: The task that scored.
    """

    subject: str
    reference: str
    result: Result
    baseline: Result
    task: Task

    @property
    def count(self) -> int:
        """Number of checkpoints that the first candidate is made of."""
        return len(self.result.candidate.checkpoints)

    @property
    def metric(self) -> Metric:
        """Metric of the comparison; the first metric where there is none."""
        versus = self.result.versus
        if versus is not None:
            for metric in self.task.metrics:
                if metric.key == versus.metric:
                    return metric
        return self.task.metrics[0]

    @property
    def is_worse(self) -> bool:
        """True if the first candidate is worse than the second, beyond chance."""
        versus, higher = self.result.versus, self.metric.higher
        if versus is None or higher is None or versus.difference.p >= _SIGNIFICANT:
            return False
        return (versus.difference.value < 0) == higher

    def as_json(self, subject: str, reference: str) -> dict[str, Any]:
        """Return the comparison as plain values for JSON.

        Args:
            subject: Key of the first candidate's value.
            reference: Key of the second candidate's value.
        """
        metric = self.metric
        plain: dict[str, Any] = {
            "metric": metric.key,
            subject: self.result.metrics[metric.key],
            reference: self.baseline.metrics[metric.key],
            "bn": self.result.bn,
        }
        if self.result.versus is not None:
            # The names of candidates say less than the names of these keys.
            versus = self.result.versus.as_json()
            plain |= {key: versus[key] for key in ("difference", "low", "high", "p", "test", "n")}
        return plain

    def describe(self) -> str:
        """Word the comparison in a sentence."""
        metric = self.metric
        named = ((self.subject, self.result), (self.reference, self.baseline))
        for name, result in named:
            if not math.isfinite(result.metrics[metric.key]):
                return f"{name} gives outputs that are not finite"
        subject, reference = (_with_statistics(name, result) for name, result in named)
        ends = self._describe_values(metric)
        versus = self.result.versus
        if versus is None:
            return f"{subject} and {reference}: {ends}{self._describe_loss()}"
        difference = versus.difference
        form = f"+{metric.form}"
        interval = f"[{difference.low:{form}}, {difference.high:{form}}]"
        numbers = f"{ends}, a difference of {difference.value:{form}} {interval}"
        numbers += self._describe_loss()
        if difference.p >= _SIGNIFICANT:
            return f"{subject} and {reference} do not differ beyond chance: {numbers}"
        word = "other than"
        if metric.higher is not None:
            word = "worse than" if self.is_worse else "better than"
        return f"{subject} is {word} {reference}: {numbers}"

    def _describe_values(self, metric: Metric) -> str:
        """Word the values of a metric."""
        values = [_number(metric, result.metrics[metric.key]) for result in self._results]
        return f"{bare_title(metric)} {' against '.join(values)}"

    def _describe_loss(self) -> str:
        """Word the values of the loss, beside those of another metric; empty without any."""
        for metric in self.task.metrics:
            is_other = metric.key == self.task.loss != self.metric.key
            if is_other and all(metric.key in result.metrics for result in self._results):
                return f"; {self._describe_values(metric)}"
        return ""

    @property
    def _results(self) -> tuple[Result, Result]:
        return self.result, self.baseline


def compare_ends(count: int, average: Result, last: Result, task: Task) -> PairComparison:
    """Compare the average of all checkpoints of a run with the last checkpoint.

    Args:
        count: Number of averaged checkpoints.
        average: Result of the average, with the last checkpoint as the baseline.
        last: Result of the last checkpoint.
        task: The task that scored.
    """
    return PairComparison(f"the average of all {count}", "the last checkpoint", average, last, task)


def advise_later_start(comparison: PairComparison, checkpoints: Sequence[PointScore]) -> list[str]:
    """Word the advice to begin the average later, if it is worse in a run that improves.

    Args:
        comparison: The average against the last checkpoint.
        checkpoints: Scores of the averaged checkpoints in order.

    Returns:
        A sentence, or nothing.
    """
    metric = comparison.metric
    size = len(checkpoints) // _PARTS
    if not comparison.is_worse or not size:
        return []
    change = _mean_data(checkpoints[-size:], metric) - _mean_data(checkpoints[:size], metric)
    if (change > 0) != metric.higher:
        return []
    return [
        "the checkpoints still get better, and the early ones hold the average back: select fewer, "
        "later ones"
    ]


def _with_statistics(name: str, result: Result) -> str:
    """Name a candidate, with the state of its statistics if they are stale."""
    if result.bn != "stale":
        return name
    return f"{name} with stale BatchNorm statistics"


@dataclass(frozen=True)
class Gap:
    """Gap of a metric between training and evaluation data, early and late in a run.

    A positive gap is a score that is better on training data.

    Attributes:
        run: Name of the run.
        metric: The metric: the loss, if the task names one.
        early: Mean gap of the first third of the checkpoints.
        late: Mean gap of the last third.
        worsening: Change of the metric on evaluation data between the two, positive for worse.
        margin: Half the width of the metric's 95 % interval: less is no change; 0 where unknown.
        average: Gap of the average of all checkpoints.
    """

    run: str
    metric: Metric
    early: float
    late: float
    worsening: float
    margin: float
    average: float

    def as_json(self) -> dict[str, Any]:
        """Return the gap as plain values for JSON."""
        return {
            "run": self.run,
            "metric": self.metric.key,
            "early": self.early,
            "late": self.late,
            "worsening": self.worsening,
            "margin": self.margin,
            "average": self.average,
        }

    def describe(self) -> str:
        """Word the change of the gap in a sentence."""
        early, late = _number(self.metric, self.early), _number(self.metric, self.late)
        subject = f"the gap in {bare_title(self.metric)} between training and evaluation data"
        average = f"that of the average is {_number(self.metric, self.average)}"
        change = self.late - self.early
        if abs(change) <= self.margin:
            return f"{subject} stays about the same ({early}, then {late}); {average}"
        if change < 0:
            return f"{subject} shrinks from {early} to {late}; {average}"
        consequence = "while evaluation stays about the same"
        if self.worsening > self.margin and change > self.worsening:
            consequence = "and evaluation gets worse as training gets better: a sign of overfitting"
        elif self.worsening > self.margin:
            consequence = "and both get worse"
        elif self.worsening < -self.margin:
            consequence = "while evaluation gets better, too: no harm so far"
        return f"{subject} grows from {early} to {late}, {consequence}; {average}"


def measure_gap(
    run: str, checkpoints: Sequence[PointScore], average: PointScore, task: Task
) -> Gap | None:
    """Measure the gap between training and evaluation data over a run.

    Args:
        run: Name of the run.
        checkpoints: Scores of the checkpoints in order.
        average: Scores of the average of all.
        task: The task that scored.

    Returns:
        The gap; None without training data, with fewer than three checkpoints, with outputs that
        are not finite, or without a metric that says which values are better.
    """
    metric = _gap_metric(task)
    if metric is None or len(checkpoints) < _PARTS or average.train is None:
        return None
    size = len(checkpoints) // _PARTS
    early, late = checkpoints[:size], checkpoints[-size:]
    if any(score.is_hole for score in (*early, *late, average)):
        return None
    sign = 1.0 if metric.higher else -1.0
    worsening = sign * (_mean_data(early, metric) - _mean_data(late, metric))
    low, high = checkpoints[-1].interval.get(metric.key, (0.0, 0.0))
    return Gap(
        run,
        metric,
        early=_mean_gap(early, metric),
        late=_mean_gap(late, metric),
        worsening=worsening,
        margin=(high - low) / 2,
        average=_mean_gap([average], metric),
    )


def _gap_metric(task: Task) -> Metric | None:
    """Return the loss, else the first metric, if that says which values are better."""
    chosen = task.metrics[0]
    for metric in task.metrics:
        if metric.key == task.loss:
            chosen = metric
    if chosen.higher is None:
        return None
    return chosen


def _mean_data(scores: Sequence[PointScore], metric: Metric) -> float:
    return sum(score.data[metric.key] for score in scores) / len(scores)


def _mean_gap(scores: Sequence[PointScore], metric: Metric) -> float:
    """Return the mean advantage on training data."""
    total = 0.0
    for score in scores:
        train: Mapping[str, float] = score.train or {}
        total += train[metric.key] - score.data[metric.key]
    mean = total / len(scores)
    return mean if metric.higher else -mean


def bare_title(metric: Metric) -> str:
    """Return a metric's title without the unit of %."""
    return metric.title.removesuffix(" %")


def _number(metric: Metric, value: float) -> str:
    text = format(value, metric.form)
    if not float(text):
        text = text.removeprefix("-")
    if not metric.unit:
        return text
    return f"{text} {metric.unit}"
