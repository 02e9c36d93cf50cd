"""Base class of tasks: calling a model, scoring outputs, combining the members of an ensemble.

A custom task is a subclass that overrides the methods that differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ckptavg.errors import EvaluationError
from ckptavg.models.calling import call, call_on_inputs
from ckptavg.models.inputs import inputs_of, split_batch, split_labels
from ckptavg.tasks.intervals import Interval, samples_interval


@dataclass(frozen=True)
class Metric:
    """A figure that a task computes.

    Attributes:
        key: Name in JSON.
        title: Name in the table.
        form: Format specification of the values in the table.
        higher: True if more is better, False if less is; None where neither can be said.
        unit: Unit on the axes of figures: ``%``, ``nats``; empty for a number without one.
    """

    key: str
    title: str
    form: str
    higher: bool | None
    unit: str = ""


@dataclass(frozen=True)
class Samples:
    """Per-sample values for paired comparisons of candidates.

    Attributes:
        values: (N,), the contribution of each sample to a metric: 1 or 0 for right or wrong, the
            squared error, the NLL of the tokens.
        weights: (N,), numbers whose sum divides the sum of the values: tokens; 1 each where None.
        answers: (N,) integers, the predicted class, for disagreement; None where there is none.
        metric: Key of the metric; None for the first metric of the task.
        scale: Factor from the mean of the values to the metric's unit: 100 for percentages.
    """

    values: torch.Tensor
    weights: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    metric: str | None = None
    scale: float = 1.0


class Scores(Protocol):
    """Metrics of one candidate, accumulated batch by batch."""

    def update(self, predictions: torch.Tensor, targets: Any) -> None:
        """Add a batch, without waiting for the device."""

    def compute(self) -> dict[str, float]:
        """Compute the metrics by key, and ``n``, the number of samples.

        Raises:
            EvaluationError: There were no samples.
        """

    def state(self) -> Any:
        """Return the accumulated sums as plain values for JSON."""

    def merge(self, state: Any) -> None:
        """Add the state of another process."""


class Mean(Protocol):
    """Running mean of the members' predictions of an ensemble on one batch.

    Attributes:
        members: Number of members added so far.
    """

    members: int

    def add(self, predictions: torch.Tensor, targets: Any) -> None:
        """Add the predictions of a member."""

    def offload(self) -> None:
        """Shrink and move to the host until further members come in a later pass."""

    def value(self) -> torch.Tensor:
        """Return the ensemble's predictions."""


class ArithmeticMean:
    """Arithmetic mean of the members' predictions."""

    def __init__(self) -> None:
        self.members = 0
        self._sum: torch.Tensor | None = None

    def add(self, predictions: torch.Tensor, targets: Any) -> None:
        """Add the predictions of a member."""
        del targets
        self.members += 1
        if self._sum is None:
            self._sum = predictions
        else:
            self._sum = self._join(self._sum.to(predictions.device), predictions)

    def offload(self) -> None:
        """Move to the host until further members come in a later pass."""
        if self._sum is not None:
            self._sum = self._sum.cpu()

    def value(self) -> torch.Tensor:
        """Return the ensemble's predictions.

        Raises:
            EvaluationError: No member was added.
        """
        if self._sum is None:
            raise EvaluationError("an ensemble has no members")
        return self._divide(self._sum)

    def _join(self, total: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        return total + predictions

    def _divide(self, total: torch.Tensor) -> torch.Tensor:
        return total / self.members


class LogMean(ArithmeticMean):
    """Mean of the members' probabilities, from and to logarithms."""

    def _join(self, total: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(total, predictions)

    def _divide(self, total: torch.Tensor) -> torch.Tensor:
        return total - math.log(self.members)


class Task:
    """Base class of all tasks: the scoring of candidates for one kind of model.

    A subclass sets ``metrics`` and defines ``predict`` and ``scores``. The other methods have
    defaults.

    Attributes:
        metrics: The metrics in the table's order. The first one decides which candidate is best.
        counts: The unit of ``n``, such as samples or tokens.
        loss: Key of the metric that training minimizes, apart from weight decay; None where there
            is none among the metrics.
        batch_size: Default number of samples per batch.
    """

    metrics: ClassVar[Sequence[Metric]] = ()
    counts: ClassVar[str] = "samples"
    loss: ClassVar[str | None] = None
    batch_size: ClassVar[int] = 128

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Split a batch into inputs and targets, for a model with one input.

        An override decides for all models of the task. Without one, ``part`` goes by the signature
        of the model.

        Raises:
            EvaluationError: The batch has no targets.
        """
        return split_labels(batch)

    def part(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """Split a batch into a model's inputs and the targets.

        Raises:
            EvaluationError: The batch has no targets.
        """
        if self._overrides("split"):
            return self.split(batch)
        return split_batch(model, batch)

    def inputs(self, batch: Any) -> Any:
        """Return the model's inputs from a batch, which may lack targets if used for training."""
        try:
            return self.split(batch)[0]
        except EvaluationError:
            if isinstance(batch, (list, tuple)) and batch:
                return batch[0]
            return batch

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model on inputs."""
        return call_on_inputs(model, inputs)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch as the loader yields it; the batch may lack targets."""
        # An override of a method takes precedence over the signature of the model.
        if self._overrides("split") or self._overrides("inputs"):
            return self.forward(model, self.inputs(batch))
        if self._overrides("forward"):
            return self.forward(model, inputs_of(model, batch))
        return call(model, batch)

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the model by calling ``run()`` and return the outputs.

        A subclass may observe the run, to learn more than the outputs alone show.
        """
        return run()

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that outputs and targets fit together, without waiting for the device.

        Args:
            outputs: Return value of the model.
            targets: Targets from ``split``, on the host if the loader yields host tensors.

        Raises:
            EvaluationError: Outputs and targets do not fit together.
        """

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Turn outputs into predictions, which are scored and which an ensemble averages.

        Args:
            outputs: Return value of the model.
            targets: Targets on the device.

        Returns:
            The predictions; the first axis is samples.
        """
        raise NotImplementedError

    def is_finite(self, predictions: torch.Tensor) -> torch.Tensor:
        """Return a bool tensor of shape (): True if all predictions are finite.

        The tensor stays on the device of the predictions, so the caller need not wait.
        """
        return torch.isfinite(predictions).all()

    def mean(self) -> Mean:
        """Create the running mean of an ensemble; arithmetic unless overridden."""
        return ArithmeticMean()

    def averaged_outputs(self, predictions: torch.Tensor) -> torch.Tensor | None:
        """Return the outputs that an ensemble takes the arithmetic mean of.

        Args:
            predictions: As from ``predict``.

        Returns:
            Probabilities, or the predictions of a task that averages these; the first axis is
            samples. None if the ensemble keeps no such outputs.
        """
        mean = self.mean()
        if isinstance(mean, LogMean):
            return predictions.exp()
        if isinstance(mean, ArithmeticMean):
            return predictions
        return None

    def scores(self) -> Scores:
        """Create empty metrics for a candidate."""
        raise NotImplementedError

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples | None:
        """Return per-sample values for paired comparisons; None if the task has none."""
        del predictions, targets
        return None

    def samples_of(self, metric: str, predictions: torch.Tensor, targets: Any) -> Samples:
        """Return the per-sample values of a metric.

        Args:
            metric: Key of the metric.
            predictions: Return value of ``predict``.
            targets: Targets on the device of the predictions.

        Raises:
            EvaluationError: The task has no per-sample values of this metric.
        """
        samples = self.samples(predictions, targets)
        key = None
        if samples is not None:
            key = samples.metric or self.metrics[0].key
        if samples is None or key != metric:
            raise EvaluationError(
                f"{type(self).__name__} has no values per sample of {metric}",
                f"Choose by {key}." if key else "Define `samples` of the task.",
            )
        return samples

    def details(self, scores: Any) -> dict[str, Any]:
        """Return further plain values for the JSON of a candidate's scores."""
        del scores
        return {}

    def intervals(self, scores: Any, samples: Samples | None) -> dict[str, Interval]:
        """Return 95 % intervals of metrics, by key; metrics without a known interval are missing.

        Args:
            scores: The metrics over all data.
            samples: Values of all samples; None if the task has none.
        """
        del scores
        if samples is None:
            return {}
        interval = samples_interval(samples)
        if interval is None:
            return {}
        return {samples.metric or self.metrics[0].key: interval}

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Task, name)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """Convert values to float64; on the CPU if the device lacks float64 (Apple's mps)."""
    device = values.device
    if device.type == "mps":
        device = torch.device("cpu")
    return values.detach().to(device, torch.float64)
