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
from ckptavg.tasks import Metric, Task
from ckptavg.tasks.classification import Classification

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Result:
    """Scores of one candidate.

    Attributes:
        candidate: The scored candidate.
        metrics: Values by key of the task's metrics, and ``n``, the number of samples. For image
            classification ``top1`` and ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction.
        bn: State of the BatchNorm statistics, see ``running_statistics.State``.
        versus: Comparison with the reference on the same samples; None for the reference, and where
            the task has no per-sample values.
        details: Further entries of the JSON: bins of calibration, disagreement among the members of
            an ensemble, and under ``bn_layers`` the layers that ``bn`` does not hold for.
    """

    candidate: Candidate
    metrics: Mapping[str, float]
    bn: str
    versus: Comparison | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line with the candidate, the state of statistics and the metrics."""
        computed = {key: value for key, value in self.metrics.items() if value is not None}
        metrics = ", ".join(f"{key} {value:.5g}" for key, value in computed.items())
        statistics = "" if self.bn == "none" else f", {self.bn}"
        return f"<Result of {printable(self.candidate.name)}{statistics}: {metrics}>"

    @property
    def forwards(self) -> int:
        """Number of forward passes per sample."""
        return len(self.candidate.checkpoints) if self.candidate.kind == "ensemble" else 1

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values for JSON, without secrets in names and paths."""
        candidate = self.candidate
        return {
            "name": without_secrets(candidate.name),
            "kind": candidate.kind,
            "checkpoints": [without_secrets(str(c.path)) for c in candidate.checkpoints],
            "coefficients": list(candidate.coefficients),
            "metrics": dict(self.metrics),
            "bn": self.bn,
            "forwards": self.forwards,
            **({} if self.versus is None else {"versus": self.versus.as_json()}),
            **self.details,
        }

    @classmethod
    def of_json(cls, candidate: Candidate, value: Mapping[str, Any]) -> Result:
        """Restore the result of a candidate from the output of ``as_json``."""
        field_keys = {"name", "kind", "checkpoints", "coefficients", "metrics", "bn", "forwards"}
        # ``key`` belongs to the file of results, not to the result.
        details = {k: v for k, v in value.items() if k not in field_keys | {"versus", "key"}}
        versus = value.get("versus")
        return cls(
            candidate,
            value["metrics"],
            value["bn"],
            None if versus is None else Comparison.of_json(versus),
            details,
        )


@dataclass(frozen=True)
class Comparison:
    """Paired comparison on the same samples: the candidate minus the reference.

    Attributes:
        reference: Name of the reference candidate.
        metric: Key of the metric.
        difference: Difference in the metric's unit.
    """

    reference: str
    metric: str
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as plain values for JSON."""
        d = self.difference
        return {
            "reference": without_secrets(self.reference),
            "metric": self.metric,
            "difference": d.value,
            "low": d.low,
            "high": d.high,
            "p": d.p,
            "test": d.test,
            "n": d.n,
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Comparison:
        """Restore a comparison from the output of ``as_json``."""
        parts = {name: value[name] for name in ("low", "high", "p", "test", "n")}
        return cls(
            value["reference"], value["metric"], Difference(value=value["difference"], **parts)
        )


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
            return self._named(which, None)
        if isinstance(which, tuple):
            return self._named(*which)
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
        count = "1 candidate" if len(self) == 1 else f"{len(self)} candidates"
        return f"<Results of {count}: {names}>"

    def __str__(self) -> str:
        # Imported on demand: only a printed table needs the layout.
        from ckptavg.display.terminal import printed_table  # noqa: PLC0415
        from ckptavg.evaluation.score_table import (  # noqa: PLC0415
            tabulate_scores,
        )

        return printed_table(tabulate_scores(self, self.task)) if self._results else repr(self)

    def _repr_html_(self) -> str:
        # Imported on demand: only notebooks need HTML.
        from ckptavg.evaluation.score_table import (  # noqa: PLC0415
            scores_html,
        )

        return scores_html(self, self.task) if self._results else escape(repr(self))

    def best(self, metric: str | None = None) -> Result:
        """Return the best result; the first of equally good results.

        Args:
            metric: Key of one of the task's metrics; the first metric where None.

        Raises:
            UsageError: The task has no metric of this key, or the metric has no better direction.
            EvaluationError: No result has a value that is a number.
        """
        chosen = self._metric(metric)
        values = [(result.metrics.get(chosen.key, math.nan), result) for result in self]
        ranked = [(value, result) for value, result in values if not math.isnan(value)]
        if not ranked:
            raise EvaluationError(f"no candidate has a {chosen.key} that is a number")
        pick = max if chosen.higher else min
        return pick(ranked, key=lambda pair: pair[0])[1]

    def to_frame(self) -> pandas.DataFrame:
        """Convert to a pandas DataFrame: rows are candidates, columns metrics and comparison.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return data_frame([_record(result) for result in self])

    def _metric(self, key: str | None) -> Metric:
        metrics = self.task.metrics
        keys = [metric.key for metric in metrics]
        if key is not None and key not in keys:
            raise UsageError(f"metric is expected to be one of {', '.join(keys)} but got {key!r}")
        chosen = metrics[0] if key is None else metrics[keys.index(key)]
        if chosen.higher is None:
            raise UsageError(f"the metric {chosen.key} does not say which of its values are better")
        return chosen

    def _named(self, name: str, bn: str | None) -> Result:
        results = [result for result in self if result.candidate.name == name]
        if bn is not None:
            results = [result for result in results if result.bn == bn]
        elif len(results) > 1:
            results = [result for result in results if result.bn in RECOMPUTED] or results
        if len(results) == 1:
            return results[0]
        if results:
            raise KeyError(f"{len(results)} candidates are called {name!r}: take one by position")
        names = [result.candidate.name for result in self]
        state = "" if bn is None else f" with {bn} statistics"
        raise KeyError(f"no candidate{state} is called {name!r}; there are {first_few(names, 8)}")


def _record(result: Result) -> dict[str, Any]:
    """Convert a result to a row of plain values."""
    row: dict[str, Any] = {
        "name": result.candidate.name,
        "kind": result.candidate.kind,
        "bn": result.bn,
        **result.metrics,
        "forwards": result.forwards,
    }
    versus = {} if result.versus is None else result.versus.as_json()
    return row | {f"versus_{key}": value for key, value in versus.items()}


def without_repeats(results: Iterable[Result]) -> list[Result]:
    """Leave out results whose statistics could not be recomputed, if listed as stored, too.

    Both have the same weights and statistics, and so the same scores.
    """
    results = list(results)
    as_they_are = [r.candidate for r in results if not r.candidate.recompute]
    distinct = []
    for result in results:
        failed = result.candidate.recompute and result.bn not in RECOMPUTED
        if not (failed and replace(result.candidate, recompute=False) in as_they_are):
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
    averages = [r for r in results if r.candidate.kind == "average"]
    last = [r for r in results if r.candidate.last]
    if not averages or not last:
        raise UsageError("an average and a last checkpoint are needed, as candidates_of gives")
    chosen = next((r for r in averages if r.bn in RECOMPUTED), averages[0])
    metric = (task or Classification()).metrics[0]
    score, last_score = chosen.metrics[metric.key], last[0].metrics[metric.key]
    # Negated, so that NaN, which compares False with anything, counts as worse.
    return not (score >= last_score if metric.higher else score <= last_score)
