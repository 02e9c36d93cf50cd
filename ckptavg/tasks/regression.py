"""Regression: a number per sample, or several."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from ckptavg.errors import EvaluationError
from ckptavg.tasks.base import Metric, Samples, Scores, Task, in_float64
from ckptavg.tasks.intervals import Interval
from ckptavg.tasks.model_outputs import take_output

# Relative spread of constant targets that rounding alone can cause.
_CONSTANT = 1e-14


class Regression(Task):
    """Regression task: outputs (N,), (N, 1) or (N, D), targets with as many values per sample.

    Targets are integers or floats. An ensemble averages outputs. Paired comparisons use the mean
    squared error; the first metric is the root of the mean squared error.
    """

    metrics: ClassVar = (
        Metric("rmse", "RMSE", ".5g", False),
        Metric("mae", "MAE", ".5g", False),
        Metric("r2", "R²", ".5f", True),
        Metric("mse", "MSE", ".5g", False),
    )
    loss: ClassVar = "mse"

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that shapes fit and that targets are finite.

        Raises:
            EvaluationError: Shapes do not fit, or a target is not finite.
        """
        values = take_output(outputs)
        if not _fit(values.shape, targets.shape):
            raise EvaluationError(
                "outputs and targets with the same number of values per sample are expected, but "
                f"got shapes {tuple(values.shape)} and {tuple(targets.shape)}",
                "Check that the model and the data belong together.",
            )
        if not bool(torch.isfinite(targets).all()):
            raise EvaluationError(
                "the data has targets that are not finite", "Check the evaluation data."
            )

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return the outputs as (N, D), float64."""
        del targets
        return _rows(in_float64(take_output(outputs)))

    def scores(self) -> Scores:
        """Create the metrics: RMSE, MAE, R² and MSE."""
        return RegressionMetrics()

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples:
        """Return the squared error per sample, mean over the D outputs."""
        errors = predictions - _rows(in_float64(targets))
        return Samples(errors.square().mean(1), metric="mse")

    def intervals(self, scores: Any, samples: Samples | None) -> dict[str, Interval]:
        """Return the 95 % intervals of the mean squared error and its root."""
        intervals = super().intervals(scores, samples)
        if "mse" in intervals:
            low, high = intervals["mse"]
            intervals["rmse"] = (math.sqrt(max(low, 0.0)), math.sqrt(high))
        return intervals


class RegressionMetrics:
    """Errors over all values, and the coefficient of determination R², mean over the D outputs.

    The sums are this package's own. In torchmetrics 1.9 the sums of squared and absolute errors
    stay float32. Its R² subtracts two nearly equal sums if targets are far from 0, and treats
    targets of a small unit as constant.
    """

    def __init__(self) -> None:
        self.count = 0
        # (4, D), the rows as in ``_sum_batch``.
        self._sums: torch.Tensor | None = None

    def update(self, predictions: torch.Tensor, targets: Any) -> None:
        """Add a batch, without waiting for the device.

        Args:
            predictions: (N, D), float64.
            targets: As many values per sample, any dtype.
        """
        if len(predictions):
            more = _sum_batch(predictions, _rows(in_float64(targets)))
            self._add(len(predictions), more)

    def compute(self) -> dict[str, float]:
        """Compute ``rmse``, ``mae``, ``mse`` over all values, ``r2`` and ``n`` samples.

        R² of targets that do not vary is 1 where all errors are 0, and otherwise 0, as in
        scikit-learn.

        Raises:
            EvaluationError: There were no samples.
        """
        if self._sums is None:
            raise EvaluationError("the evaluation data is empty", "Check the evaluation data.")
        squared, absolute, mean, spread = self._sums.cpu()
        mse = float(squared.mean()) / self.count
        constant = spread <= self.count * (_CONSTANT * mean).square()
        r2 = torch.where(constant, (squared == 0).double(), 1 - squared / spread)
        return {
            "rmse": math.sqrt(mse),
            "mae": float(absolute.mean()) / self.count,
            "r2": float(r2.mean()),
            "mse": mse,
            "n": self.count,
        }

    def state(self) -> dict[str, Any]:
        """Return the accumulated sums as plain values for JSON."""
        sums = []
        if self._sums is not None:
            sums = self._sums.tolist()
        return {"n": self.count, "sums": sums}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the state of another process."""
        if state["n"]:
            self._add(state["n"], torch.tensor(state["sums"], dtype=torch.float64))

    def _add(self, count: int, more: torch.Tensor) -> None:
        """Add errors, and join means and spreads (Chan et al. 1983, eq. 2.1).

        Args:
            count: Samples in ``more``.
            more: (4, D), as from ``_sum_batch``.

        Raises:
            EvaluationError: The number of outputs D has changed.
        """
        if self._sums is None:
            self.count, self._sums = count, more
            return
        if self._sums.shape != more.shape:
            raise EvaluationError(
                f"the model gave {self._sums.shape[1]} values per sample and then {more.shape[1]}"
            )
        total = self.count + count
        squared, absolute, mean, spread = self._sums.to(more.device)
        more_squared, more_absolute, more_mean, more_spread = more
        step = more_mean - mean
        between = step.square() * (self.count * count / total)
        joined_mean = mean + step * (count / total)
        joined_spread = spread + more_spread + between
        self._sums = torch.stack(
            (squared + more_squared, absolute + more_absolute, joined_mean, joined_spread)
        )
        self.count = total


def _sum_batch(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum a batch per output: (4, D).

    The rows are the squared errors, the absolute errors, the mean of the targets and the squared
    deviations of the targets from the mean.
    """
    errors = predictions - targets
    mean = targets.mean(0)
    spread = (targets - mean).square().sum(0)
    return torch.stack((errors.square().sum(0), errors.abs().sum(0), mean, spread))


def _fit(outputs: torch.Size, targets: torch.Size) -> bool:
    """Return True if shapes are equal except for axes of length 1, or if either is flat."""
    if not outputs or not targets or outputs[0] != targets[0]:
        return False
    output_sizes = _long_axes(outputs)
    target_sizes = _long_axes(targets)
    if 0 in output_sizes:
        return False
    flat = len(output_sizes) < 2 or len(target_sizes) < 2
    same_count = math.prod(output_sizes) == math.prod(target_sizes)
    return output_sizes == target_sizes or (flat and same_count)


def _long_axes(shape: torch.Size) -> list[int]:
    """List the lengths of a sample's axes, except for axes of length 1."""
    return [length for length in shape[1:] if length != 1]


def _rows(values: torch.Tensor) -> torch.Tensor:
    """Reshape values to (N, D)."""
    if values.dim() == 1:
        return values[:, None]
    return values.flatten(1)
