"""Image classification, and whatever else gives one class a sample."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ckptavg.errors import EvaluationError
from ckptavg.metrics import ClassificationMetrics
from ckptavg.tasks.task import LogMean, Metric, Samples, Scores, Task, first_tensor, in_float64


class Classification(Task):
    """One class a sample: outputs (N, classes), targets (N,); predictions are log-probabilities.

    An ensemble averages probabilities (FGE). The metrics are this package's own: torchmetrics' take
    seconds to import, and give neither the bins of the calibration error nor sums in float64.
    """

    metrics: ClassVar = (
        Metric("top1", "top-1 %", ".2f", True),
        Metric("top5", "top-5 %", ".2f", True),
        Metric("nll", "NLL", ".4f", False),
        Metric("ece", "ECE", ".4f", False),
    )

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that shapes fit and that labels are classes.

        Raises:
            EvaluationError: They are not.
        """
        logits = first_tensor(outputs)
        if logits.dim() != 2 or targets.dim() != 1 or len(logits) != len(targets):
            raise EvaluationError(
                f"outputs of shape (N, classes) and labels of shape (N,) are expected, but got "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}",
                "Name the kind of model by --task, if it does not classify.",
            )
        if targets.is_floating_point() and not torch.equal(targets, targets.round()):
            raise EvaluationError("the data has labels that are no whole numbers", "Check --data.")
        low, high = (int(targets.min()), int(targets.max())) if len(targets) else (0, 0)
        if low < 0 or high >= logits.shape[1]:
            raise EvaluationError(
                f"the data has the label {low if low < 0 else high}, "
                f"but the model has {logits.shape[1]} classes",
                "Check that the model and the data belong together.",
            )

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Log-probabilities: (N, classes), float64."""
        del targets
        return in_float64(first_tensor(outputs)).log_softmax(1)

    def mean(self) -> LogMean:
        """The mean of softmax outputs (Izmailov et al. 2018, 3.5)."""
        return LogMean()

    def scores(self) -> Scores:
        """Top-1, top-5, NLL and calibration error."""
        return ClassificationMetrics()

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples:
        """Right or wrong, and the class that was chosen."""
        answers = predictions.argmax(1)
        right = (answers == targets).to(torch.uint8)
        return Samples(right, answers=answers.to(torch.int32), scale=100.0)

    def details(self, scores: Any) -> dict[str, Any]:
        """The bins that the calibration error is made of."""
        return {"reliability": scores.reliability()}
