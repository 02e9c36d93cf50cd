"""Weights by a recorded metric: the better a checkpoint, the more it counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptavg.averaging.schemes.options import read_number, require
from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import (
    Coefficients,
    Options,
    Remark,
    SchemeKind,
    remark_on_one,
)
from ckptavg.errors import RunError, UsageError, first_few
from ckptavg.runs.best import MODES, derive_mode, unknown_metric


def _softmax(options: Options) -> Coefficients:
    """Make the coefficients cᵢ ∝ exp(±mᵢ / T) of a metric m that training recorded.

    The temperature T has the metric's unit: a checkpoint that is worse by T counts e times less
    (the Boltzmann distribution). Checkpoints whose value is not finite count nothing.
    """
    metric = require("softmax", options, "metric")
    temperature = _parse_temperature(options)

    def apply(record: RunRecord) -> list[float]:
        """Return the exponentials, of which that of the best checkpoint is 1."""
        values = _list_values(metric, record)
        sign = _choose_sign(metric, options.get("mode"))
        finite = [sign * value for value in values if math.isfinite(value)]
        if not finite:
            raise RunError(
                f"the metric {metric!r} is finite in no checkpoint", "Choose another metric."
            )
        coefficients: list[float] = []
        for value in values:
            if math.isfinite(value):
                # Less the best value, so that no exponential overflows.
                coefficients.append(math.exp((sign * value - max(finite)) / temperature))
            else:
                coefficients.append(0.0)
        return coefficients

    return apply


def _parse_temperature(options: Options) -> float:
    text = require("softmax", options, "temperature")
    temperature = read_number(text)
    if not 0 < temperature < math.inf:
        raise UsageError(f"softmax:temperature=T is expected to have T > 0 but got {text!r}")
    return temperature


def _choose_sign(metric: str, given: str | None) -> float:
    """Return 1 for a metric that is better when high, -1 when low.

    Raises:
        UsageError: Neither the given mode nor the metric's name tell which.
    """
    mode = given or derive_mode(metric)
    if mode is None:
        raise UsageError(
            f"the name of the metric {metric!r} does not tell which of its values are better",
            "Add the mode to the scheme: mode=max or mode=min.",
        )
    if mode == "max":
        return 1.0
    return -1.0


def _list_values(metric: str, record: RunRecord) -> list[float]:
    """Return the recorded value of a metric in each checkpoint.

    Raises:
        RunError: A checkpoint does not record the metric.
    """
    if not record.metrics:
        raise RunError("softmax needs the metrics that training recorded, and only steps are given")
    values: list[float] = []
    for position, recorded in enumerate(record.metrics):
        if metric not in recorded:
            raise unknown_metric(metric, record.describe(position), recorded)
        values.append(recorded[metric])
    return values


def _remark_on_softmax(options: Options) -> Remark:
    """Make the remark on values that are not finite, and on a single checkpoint with the weight."""
    metric = options.get("metric", "")
    by_share = remark_on_one("softmax", "a higher temperature gives more to the others")

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where all values are finite and the weight is shared."""
        unusable: list[str] = []
        for position, recorded in enumerate(record.metrics):
            if not math.isfinite(recorded.get(metric, 0.0)):
                unusable.append(record.describe(position))
        remarks: list[str] = []
        if unusable:
            remarks.append(f"{metric} is not finite in {first_few(unusable)}: their weight is 0")
        if share := by_share(record, coefficients):
            remarks.append(share)
        return "; ".join(remarks)

    return remark


SOFTMAX = SchemeKind(
    "softmax", "softmax:metric=M,temperature=T", "exp(M/T), M recorded; mode=max or mode=min",
    _softmax, ("metric", "temperature", "mode"), {"mode": MODES},
    ("metric=val_loss", "temperature=0.1"), _remark_on_softmax, ("boltzmann",),
)  # fmt: skip
