"""The loss that tells how wide a minimum is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptavg.landscape.points import PointScore, PointScorer
from ckptavg.tasks import Metric

# Default rise of a loss in nats, and of another loss as a part of the loss itself.
_RISE_IN_NATS, _RISE_AS_PART = 0.1, 0.1


@dataclass(frozen=True)
class RayLoss:
    """Loss of which a rise tells the width of a minimum.

    This is the task's loss without an L2 term. Along a ray that term rises by λ/2·t² around every
    center, whatever the network.

    Attributes:
        metric: The loss as a metric.
        on_training: True for the loss on training data.
    """

    metric: Metric
    on_training: bool

    @classmethod
    def of_scorer(cls, scorer: PointScorer) -> RayLoss | None:
        """Return the loss that a scorer measures; None where the task names none."""
        for metric in scorer.task.metrics:
            if metric.key == scorer.task.loss:
                return cls(metric, scorer.training is not None)
        return None

    def of(self, score: PointScore) -> float:
        """Return the loss at a point."""
        if self.on_training and score.train is not None:
            return score.train[self.metric.key]
        return score.data[self.metric.key]

    def choose_rise(self, center: PointScore, rise: float | None) -> float:
        """Return the rise that defines the width.

        0.1 nats are a factor of 1.1 in the likelihood of a sample. For a loss in another unit, the
        default is a tenth of the loss at the first center.

        Args:
            center: Score of the first center.
            rise: The caller's choice; None for the default.
        """
        if rise is not None:
            return rise
        if self.metric.unit == "nats":
            return _RISE_IN_NATS
        return _RISE_AS_PART * self.of(center)

    @property
    def data(self) -> str:
        """Data that the loss is measured on."""
        if self.on_training:
            return "training data"
        return "evaluation data"

    def describe(self, rise: float) -> str:
        """Word a rise of the loss."""
        amount = f"{rise:.3g} {self.metric.unit}".strip()
        return f"a rise of {amount} in {self.metric.title} on {self.data}"

    def as_json(self) -> dict[str, Any]:
        """Return the loss as plain values for JSON."""
        return {"metric": self.metric.key, "unit": self.metric.unit, "data": self.data}
