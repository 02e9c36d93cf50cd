"""Results of an evaluation: metrics per candidate, comparisons, and the best result."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, overload

from ckptavg.display.data_frames import data_frame
from ckptavg.errors import EvaluationError, UsageError, first_few
from ckptavg.errors.printable import printable, without_secrets
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.significance import Difference
from ckptavg.formats.running_statistics import RECOMPUTED
from ckptavg.tasks import Metric, Samples, Task
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.intervals import Interval

if TYPE_CHECKING:
    import pandas


# Keys of a result's JSON that are not among the details. ``key`` is in the file of results only.
_FIELDS = frozenset(
    {"name", "kind", "checkpoints", "coefficients", "metrics", "bn", "forwards", "versus", "key"}
)


@dataclass(frozen=True)
class Result:
    """Scores of one candidate.

    Attributes:
        candidate: The scored candidate.
        metrics: Values by key of the task's metrics, and ``n``, the number of samples. For image
            classification ``top1`` and ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction.
        bn: State of the BatchNorm statistics: a ``running_statistics.State``, or the text that a
            checkpoint records.
        versus: Comparison with the baseline on the same samples; None for the baseline, and where
            the task has no per-sample values.
        details: Further entries of the JSON: bins of calibration, disagreement among the members of
            an ensemble, the options of SWAG's samples under ``swag``, and under ``bn_layers`` the
            layers that ``bn`` does not hold for.
        interval: 95 % interval of metrics by key, for the error from scoring these samples and no
            others; empty for results from a file.
        squared_norm: ‖w‖² over all parameters; of points of a landscape only.
        samples: Per-sample values of a metric; of points of a landscape only.
    """

    candidate: Candidate
    metrics: Mapping[str, float]
    bn: str
    versus: Comparison | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    interval: Mapping[str, Interval] = field(default_factory=dict, compare=False, repr=False)
    squared_norm: float | None = None
    samples: Samples | None = field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        """Return one line with the candidate, the state of statistics and the metrics."""
        title = printable(self.candidate.name)
        if self.bn != "none":
            title += f", {self.bn}"
        figures = []
        for key, value in self.metrics.items():
            if value is not None:
                figures.append(f"{key} {value:.5g}")
        return f"<Result of {title}: {', '.join(figures)}>"

    @property
    def forwards(self) -> int:
        """Number of forward passes per sample."""
        return self.candidate.members

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values for JSON, without secrets in names and paths."""
        candidate = self.candidate
        plain = {
            "name": without_secrets(candidate.name),
            "kind": candidate.kind,
            "checkpoints": [without_secrets(str(c.path)) for c in candidate.checkpoints],
            "coefficients": list(candidate.coefficients),
            "metrics": dict(self.metrics),
            "bn": self.bn,
            "forwards": self.forwards,
        }
        if self.versus is not None:
            plain["versus"] = self.versus.as_json()
        return plain | dict(self.details)

    @classmethod
    def of_json(cls, candidate: Candidate, value: Mapping[str, Any]) -> Result:
        """Restore the result of a candidate from the output of ``as_json``."""
        details = {key: entry for key, entry in value.items() if key not in _FIELDS}
        comparison = None
        if value.get("versus") is not None:
            comparison = Comparison.of_json(value["versus"])
        return cls(candidate, value["metrics"], value["bn"], comparison, details)


@dataclass(frozen=True)
class Comparison:
    """Paired comparison on the same samples: the candidate minus the baseline.

    Attributes:
        reference: Name of the baseline.
        metric: Key of the metric.
        difference: Difference in the metric's unit.
    """

    reference: str
    metric: str
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON."""
        difference = self.difference
        return {
            "reference": without_secrets(self.reference),
            "metric": self.metric,
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
            "test": difference.test,
            "n": difference.n,
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Comparison:
        """Restore a comparison from the output of ``as_json``."""
        difference = Difference(
            value["difference"], value["low"], value["high"], value["p"], value["test"], value["n"]
        )
        return cls(value["reference"], value["metric"], difference)


class Results(Sequence[Result]):
    """Scores of candidates on the same data, in the table's order.

    ``print(results)`` shows the table, and so does a notebook. ``results[position]`` is a result,
    a slice is another ``Results``, and ``results[name]`` is the result of the candidate with that
    name. If an average is listed with stale and with recomputed statistics, ``results[name]`` is
    the recomputed one and ``results[name, "stale"]`` the stale one.

    Attributes:
        task: The task that scored the candidates.
        notes: Remarks on how the scores came about.
    """

    def __init__(self, results: Iterable[Result], task: Task, notes: Iterable[str] = ()) -> None:
        self._results = tuple(results)
        self.task = task
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self._results)

    @overload
    def __getitem__(self, which: int | str | tuple[str, str]) -> Result: ...

    @overload
    def __getitem__(self, which: slice) -> Results: ...

    def __getitem__(self, which: int | slice | str | tuple[str, str]) -> Result | Results:
        if isinstance(which, slice):
            return Results(self._results[which], self.task, self.notes)
        if isinstance(which, str):
            return self._find(which, None)
        if isinstance(which, tuple):
            return self._find(*which)
        return self._results[which]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, (str, bytes)):
            return list(self) == list(other)
        return NotImplemented

    # Equality compares contents, so results are unhashable, as lists are.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Return one line for tracebacks."""
        names = first_few([printable(result.candidate.name) for result in self])
        plural = "" if len(self) == 1 else "s"
        return f"<Results of {len(self)} candidate{plural}: {names}>"

    def __str__(self) -> str:
        if not self._results:
            return repr(self)
        # Imported on demand: only a printed table needs the layout.
        from ckptavg.display.terminal import printed_table  # noqa: PLC0415
        from ckptavg.evaluation.score_table import (  # noqa: PLC0415
            tabulate_scores,
        )

        return printed_table(tabulate_scores(self, self.task))

    def _repr_html_(self) -> str:
        if not self._results:
            return escape(repr(self))
        # Imported on demand: only notebooks need HTML.
        from ckptavg.evaluation.score_table import (  # noqa: PLC0415
            scores_html,
        )

        return scores_html(self, self.task)

    def best(self, metric: str | None = None) -> Result:
        """Return the best result; the first of equally good results.

        Args:
            metric: Key of one of the task's metrics; the first metric where None.

        Raises:
            UsageError: The task has no metric of this key, or the metric has no better direction.
            EvaluationError: No result has a value that is a number.
        """
        chosen = self._metric(metric)
        best, best_value = None, math.nan
        for result in self:
            value = result.metrics.get(chosen.key, math.nan)
            if math.isnan(value):
                continue
            is_better = value > best_value if chosen.higher else value < best_value
            if best is None or is_better:
                best, best_value = result, value
        if best is None:
            raise EvaluationError(f"no candidate has a {chosen.key} that is a number")
        return best

    def to_frame(self) -> pandas.DataFrame:
        """Convert to a pandas DataFrame: rows are candidates, columns metrics and comparison.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return data_frame([_record(result) for result in self])

    def _metric(self, key: str | None) -> Metric:
        metrics = {metric.key: metric for metric in self.task.metrics}
        chosen = self.task.metrics[0]
        if key is not None:
            if key not in metrics:
                expected = ", ".join(metrics)
                raise UsageError(f"metric is expected to be one of {expected} but got {key!r}")
            chosen = metrics[key]
        if chosen.higher is None:
            raise UsageError(f"the metric {chosen.key} does not say which of its values are better")
        return chosen

    def _find(self, name: str, bn: str | None) -> Result:
        results = [result for result in self if result.candidate.name == name]
        if bn is not None:
            results = [result for result in results if result.bn == bn]
        elif len(results) > 1:
            results = [result for result in results if result.bn in RECOMPUTED] or results
        if len(results) == 1:
            return results[0]
        if results:
            raise KeyError(f"{len(results)} candidates are called {name!r}: take one by position")
        names = first_few([result.candidate.name for result in self], 8)
        subject = "no candidate"
        if bn is not None:
            subject += f" with {bn} statistics"
        raise KeyError(f"{subject} is called {name!r}; there are {names}")


def _record(result: Result) -> dict[str, Any]:
    """Convert a result to a row of plain values."""
    row: dict[str, Any] = {
        "name": result.candidate.name,
        "kind": result.candidate.kind,
        "bn": result.bn,
        **result.metrics,
        "forwards": result.forwards,
    }
    if result.versus is not None:
        for key, value in result.versus.as_json().items():
            row[f"versus_{key}"] = value
    return row


def without_repeats(results: Iterable[Result]) -> list[Result]:
    """Leave out results whose statistics could not be recomputed, if listed as stored, too.

    Both have the same weights and statistics, and so the same scores.
    """
    results = list(results)
    as_stored = [result.candidate for result in results if not result.candidate.recompute]
    distinct = []
    for result in results:
        failed = result.candidate.recompute and result.bn not in RECOMPUTED
        if not (failed and replace(result.candidate, recompute=False) in as_stored):
            distinct.append(result)
    return distinct


def is_worse(results: Sequence[Result], task: Task | None = None) -> bool:
    """Return True if the average is worse than the last checkpoint on the task's first metric.

    An average with recomputed statistics takes precedence.

    Args:
        results: Results of the candidates from ``candidates_of``.
        task: The task that scored the candidates; image classification where None.

    Raises:
        UsageError: There is no average, or no last checkpoint.
    """
    averages = [result for result in results if result.candidate.kind == "average"]
    last = [result for result in results if result.candidate.last]
    if not averages or not last:
        raise UsageError("an average and a last checkpoint are needed, as candidates_of gives")
    recomputed = [result for result in averages if result.bn in RECOMPUTED]
    average = (recomputed or averages)[0]
    metric = (task or Classification()).metrics[0]
    score, last_score = average.metrics[metric.key], last[0].metrics[metric.key]
    # Negated, so that NaN, which compares False with anything, counts as worse.
    if metric.higher:
        return not score >= last_score
    return not score <= last_score
