"""What a candidate's evaluation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptavg.candidates import Candidate
from ckptavg.errors import UsageError
from ckptavg.evidence import Difference
from ckptavg.formats.storage import without_secrets
from ckptavg.running_statistics import RECOMPUTED
from ckptavg.tasks import Task
from ckptavg.tasks.classification import Classification


@dataclass(frozen=True)
class Result:
    """A candidate's score.

    Attributes:
        candidate: What was scored.
        metrics: By the keys of the task's metrics, and ``n``, the number of samples. For image
            classification ``top1`` and ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction.
        bn: The state of its BatchNorm statistics, see ``running_statistics.State``.
        versus: How it differs from the reference on the same samples, where the task can tell.
        details: What else JSON says: bins of calibration, disagreement among an ensemble's members,
            and under ``bn_layers`` the layers that ``bn`` does not hold for.
    """

    candidate: Candidate
    metrics: Mapping[str, float]
    bn: str
    versus: Versus | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forwards(self) -> int:
        """Forward passes that one sample costs."""
        return len(self.candidate.checkpoints) if self.candidate.kind == "ensemble" else 1

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
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
        """The result of a candidate, from what ``as_json`` gave."""
        known = {"name", "kind", "checkpoints", "coefficients", "metrics", "bn", "forwards"}
        details = {k: v for k, v in value.items() if k not in known | {"versus", "key"}}
        versus = value.get("versus")
        return cls(
            candidate,
            value["metrics"],
            value["bn"],
            None if versus is None else Versus.of_json(versus),
            details,
        )


@dataclass(frozen=True)
class Versus:
    """A paired comparison: the same samples, the candidate less the reference.

    Attributes:
        reference: Name of the candidate that it was compared with.
        metric: Key of the metric.
        difference: In the metric's unit.
    """

    reference: str
    metric: str
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain values."""
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
    def of_json(cls, value: Mapping[str, Any]) -> Versus:
        """The comparison, from what ``as_json`` gave."""
        parts = {name: value[name] for name in ("low", "high", "p", "test", "n")}
        return cls(
            value["reference"], value["metric"], Difference(value=value["difference"], **parts)
        )


def is_worse(results: Sequence[Result], task: Task | None = None) -> bool:
    """Whether the average does worse than the last checkpoint on the task's first metric.

    The average is the recomputed one where there is one. Expects what ``candidates_of`` made.
    """
    averages = [r for r in results if r.candidate.kind == "average"]
    last = [r for r in results if r.candidate.last]
    if not averages or not last:
        raise UsageError("an average and a last checkpoint are needed, as candidates_of gives")
    chosen = next((r for r in averages if r.bn in RECOMPUTED), averages[0])
    metric = (task or Classification()).metrics[0]
    mine, theirs = chosen.metrics[metric.key], last[0].metrics[metric.key]
    return not (mine >= theirs if metric.higher else mine <= theirs)  # nor is NaN as good
