"""Coefficients that the user gives, one per checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import Scheme
from ckptavg.errors import RunError, UsageError


def from_weights(weights: Sequence[float]) -> Scheme:
    """Make a scheme that has a given weight for each checkpoint.

    Args:
        weights: Finite numbers with a finite sum above 0.

    Raises:
        UsageError: A weight is not a finite number, or the sum is not finite and above 0.
    """
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise UsageError(f"weights are expected to be numbers but got {weights!r}") from error
    text = ",".join(f"{weight:g}" for weight in weights)
    if not weights or not all(map(math.isfinite, weights)):
        raise UsageError(f"weights are expected to be finite but got {text}")
    if not 0 < sum(weights) < math.inf:
        raise UsageError(f"weights are expected to have a finite sum above 0 but got {text}")
    # Where products could overflow, weights are scaled by a power of two, which keeps the ratios.
    exponent = max(0, math.frexp(max(map(abs, weights)))[1] - 100)
    coefficients = [math.ldexp(weight, -exponent) for weight in weights]

    def apply(record: RunRecord) -> list[float]:
        """Return the scaled weights, if their number is that of the checkpoints."""
        if len(record) != len(weights):
            raise RunError(
                f"{len(weights)} weights are given for {len(record)} checkpoints",
                "Give one weight per checkpoint, in the run's order.",
            )
        return list(coefficients)

    return Scheme("weights", f"weights:{text}", apply)
