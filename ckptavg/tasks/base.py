"""What evaluation needs to know of a kind of model: how to call it, what to count, how to combine.

A task of one's own is a subclass that overrides what differs; ``--task path/file.py:MyTask``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ckptavg.errors import EvaluationError
from ckptavg.models.calling import call, call_on_inputs, inputs_of, split_batch, split_labels


@dataclass(frozen=True)
class Metric:
    """A figure that a task computes.

    Attributes:
        key: Its name in JSON.
        title: Its name in the table.
        form: Format specification of its values in the table.
        higher: Whether more is better; None where that cannot be said.
    """

    key: str
    title: str
    form: str
    higher: bool | None


@dataclass(frozen=True)
class Samples:
    """What paired comparisons need to know of some samples.

    Attributes:
        values: (N,), each sample's part in a metric: 1 or 0 for right or wrong, its squared error,
            the NLL of its tokens.
        weights: (N,), what the values' sum is divided by: tokens; 1 each where None.
        answers: (N,) integers, the class that was chosen, for disagreement; None where none is.
        metric: The metric's key, if it is not the task's first.
        scale: From the mean of the values to the metric's unit: 100 for percentages.
    """

    values: torch.Tensor
    weights: torch.Tensor | None = None
    answers: torch.Tensor | None = None
    metric: str | None = None
    scale: float = 1.0


class Scores(Protocol):
    """The metrics of one candidate, batch by batch."""

    def update(self, predictions: torch.Tensor, targets: Any) -> None:
        """Take in a batch, without waiting for the device."""

    def compute(self) -> dict[str, float]:
        """The metrics by key, and ``n``, the number of samples.

        Raises:
            EvaluationError: There were no samples.
        """

    def state(self) -> Any:
        """What has been taken in, as plain values for JSON."""

    def merge(self, state: Any) -> None:
        """Take in what another process has."""


class Mean(Protocol):
    """The outputs of an ensemble on one batch, from those of its members.

    Attributes:
        members: How many have been taken in.
    """

    members: int

    def add(self, predictions: torch.Tensor, targets: Any) -> None:
        """Take in a member's predictions."""

    def park(self) -> None:
        """Become small and leave the device: further members come in a later pass."""

    def value(self) -> torch.Tensor:
        """The ensemble's predictions."""


class ArithmeticMean:
    """The mean of the members' predictions."""

    def __init__(self) -> None:
        self.members = 0
        self._sum: torch.Tensor | None = None

    def add(self, predictions: torch.Tensor, targets: Any) -> None:
        """Take in a member's predictions."""
        del targets
        self.members += 1
        if self._sum is None:
            self._sum = predictions
        else:
            self._sum = self._join(self._sum.to(predictions.device), predictions)

    def park(self) -> None:
        """Leave the device: further members come in a later pass."""
        if self._sum is not None:
            self._sum = self._sum.cpu()

    def value(self) -> torch.Tensor:
        """The ensemble's predictions."""
        if self._sum is None:
            raise EvaluationError("an ensemble has no members")
        return self._divided(self._sum)

    def _join(self, found: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return found + more

    def _divided(self, found: torch.Tensor) -> torch.Tensor:
        return found / self.members


class LogMean(ArithmeticMean):
    """The mean of the members' probabilities, from and to logarithms."""

    def _join(self, found: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(found, more)

    def _divided(self, found: torch.Tensor) -> torch.Tensor:
        return found - math.log(self.members)


class Task:
    """How candidates of a kind are scored. The base of all tasks.

    A subclass names its ``metrics`` and defines ``predict`` and ``scores``; the rest has defaults.

    Attributes:
        metrics: What it computes, in the table's order. The first decides ``--fail-if-worse``.
        counts: What ``n`` counts.
        batch_size: Samples a batch, where none is named.
    """

    metrics: ClassVar[Sequence[Metric]] = ()
    counts: ClassVar[str] = "samples"
    batch_size: ClassVar[int] = 128

    def split(self, batch: Any) -> tuple[Any, Any]:
        """A batch as the model's inputs and the targets, for a model of one input.

        A task that overrides it says so for its models; else their signature does: ``part``.

        Raises:
            EvaluationError: It has no targets.
        """
        return split_labels(batch)

    def part(self, model: nn.Module, batch: Any) -> tuple[Any, Any]:
        """A batch as a model's inputs and the targets.

        Raises:
            EvaluationError: It has no targets.
        """
        if self._overrides("split"):
            return self.split(batch)
        return split_batch(model, batch)

    def inputs(self, batch: Any) -> Any:
        """The model's inputs of a batch: of a tuple the first; training batches need no targets."""
        try:
            return self.split(batch)[0]
        except EvaluationError:
            return batch[0] if isinstance(batch, (list, tuple)) and batch else batch

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model on inputs."""
        return call_on_inputs(model, inputs)

    def run(self, model: nn.Module, batch: Any) -> Any:
        """Run the model on a batch as the data gives it, which needs no targets."""
        if self._overrides("split") or self._overrides("inputs"):
            return self.forward(model, self.inputs(batch))
        if self._overrides("forward"):
            return self.forward(model, inputs_of(model, batch))
        return call(model, batch)

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the model on a batch by ``run()``, in whatever way it is called; return the outputs.

        A task may look on, to learn more of the outputs than they tell by themselves.
        """
        return run()

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that outputs and targets belong together, without waiting for the device.

        Args:
            outputs: What the model returned.
            targets: As ``split`` gave them, on the host where the loader gave them so.

        Raises:
            EvaluationError: They do not.
        """

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """What is scored, and what an ensemble averages; the first axis is samples.

        Args:
            outputs: What the model returned.
            targets: On the device.
        """
        raise NotImplementedError

    def sound(self, predictions: torch.Tensor) -> torch.Tensor:
        """Whether predictions are finite, as a tensor of no dimensions on their device."""
        return torch.isfinite(predictions).all()

    def mean(self) -> Mean:
        """How an ensemble's members combine: the mean of their predictions unless overridden."""
        return ArithmeticMean()

    def scores(self) -> Scores:
        """Fresh metrics for a candidate."""
        raise NotImplementedError

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples | None:
        """What paired comparisons of candidates need; None if the task has none to offer."""
        del predictions, targets
        return None

    def details(self, scores: Any) -> dict[str, Any]:
        """What else JSON says of a candidate's scores, as plain values."""
        del scores
        return {}

    def _overrides(self, name: str) -> bool:
        return getattr(type(self), name) is not getattr(Task, name)


def in_float64(values: torch.Tensor) -> torch.Tensor:
    """Values in float64, on the CPU where the device has none (Apple's mps)."""
    where = torch.device("cpu") if values.device.type == "mps" else values.device
    return values.detach().to(where, torch.float64)
