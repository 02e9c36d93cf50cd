"""Quantities that figures show: a metric as it is, or its complement to 100 %."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.tasks import Metric

L2_LOSS = "l2_loss"
_MOST_DIGITS = 12


@dataclass(frozen=True)
class Quantity:
    """A metric on an axis or a surface.

    Attributes:
        key: Key of the metric.
        label: Name with its unit, for an axis.
        form: Format specification of values.
        unit: Unit, or an empty string.
        training: True for the metric on the training data.
        complement: True to show 100 − the metric: an error in place of an accuracy.
    """

    key: str
    label: str
    form: str
    unit: str = ""
    training: bool = False
    complement: bool = False

    @property
    def title(self) -> str:
        """Name with the unit and the data."""
        if self.training:
            return f"{self.label}, training data"
        return f"{self.label}, evaluation data"

    def value(self, scored: Point | Landmark) -> float:
        """Return the value at a point; NaN where it was not measured."""
        return self._convert(self.metrics(scored).get(self.key, math.nan))

    def metrics(self, scored: Point | Landmark) -> Mapping[str, float]:
        """Return the metrics on the quantity's data."""
        if self.training:
            return scored.train or {}
        return scored.data

    def interval(self, point: Point) -> tuple[float, float]:
        """Return the ends of the 95 % interval on the evaluation data; NaN without one."""
        if self.training or self.key not in point.interval:
            return math.nan, math.nan
        first, second = (self._convert(end) for end in point.interval[self.key])
        return min(first, second), max(first, second)

    def text(self, value: float) -> str:
        """Format a value with its unit."""
        if math.isnan(value):
            return "not scored"
        number = format(value, self.form)
        if not self.unit:
            return number
        return f"{number} {self.unit}"

    def _convert(self, value: float) -> float:
        if self.complement:
            return 100.0 - value
        return value


def error_of(metric: Metric, *, training: bool = False) -> Quantity:
    """Return the error of a metric: 100 − accuracy, or the metric where it is no percentage.

    Args:
        metric: The metric.
        training: True for the error on the training data.
    """
    complement = metric.higher is True and metric.unit == "%"
    name = metric.title.removesuffix("%").strip()
    if complement:
        name += " error"
    label = with_unit(name, metric.unit)
    return Quantity(metric.key, label, metric.form, metric.unit, training, complement)


def with_unit(name: str, unit: str) -> str:
    """Return a name with its unit in brackets, for an axis."""
    if not unit:
        return name
    return f"{name} ({unit})"


def loss_of(landscape: Landscape) -> Quantity:
    """Return the loss: on training data with the L2 term, else without, else on evaluation data.

    Args:
        landscape: Points with metrics.
    """
    scored: list[Point | Landmark] = [*landscape.points]
    scored += [*landscape.checkpoints, *landscape.averages]
    measured: set[str] = set()
    for entry in scored:
        measured |= (entry.train or {}).keys()
    loss = loss_metric(landscape.metrics)
    if L2_LOSS in measured:
        label = with_unit("loss with L2 term", loss.unit)
        return Quantity(L2_LOSS, label, loss.form, loss.unit, training=True)
    return error_of(loss, training=loss.key in measured)


def loss_metric(metrics: Sequence[Metric]) -> Metric:
    """Return the metric that is nearest to a loss: in nats, else the first that is to be small."""
    for metric in metrics:
        if metric.unit == "nats":
            return metric
    for metric in metrics:
        if metric.higher is False:
            return metric
    return metrics[0]


def measured_at(quantity: Quantity, scored: Sequence[Point | Landmark]) -> bool:
    """Return True if a quantity was measured anywhere, if only as a hole."""
    return any(quantity.key in quantity.metrics(entry) for entry in scored)


def distinct_texts(values: Sequence[float], digits: int = 3) -> list[str]:
    """Format numbers with as few significant digits as keep different ones different.

    Args:
        values: Numbers.
        digits: Fewest digits.
    """
    texts: list[str] = []
    for precision in range(digits, _MOST_DIGITS):
        texts = [f"{value:.{precision}g}" for value in values]
        if len({*texts}) == len({*values}):
            break
    return texts
