"""Classification of images, or of anything else, with a class per sample."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn.functional import logsigmoid

from ckptavg.errors import EvaluationError
from ckptavg.tasks import activations
from ckptavg.tasks.base import LogMean, Metric, Samples, Scores, in_float64
from ckptavg.tasks.intervals import Interval
from ckptavg.tasks.metrics import ClassificationMetrics, class_indices
from ckptavg.tasks.model_outputs import take_output

_BELONG_TOGETHER = "Check that the model and the data belong together."
_GIVE_CLASSES = "Let the evaluation data give classes."
# Outputs of fewer samples may all be between 0 and 1 by chance.
_ENOUGH_TO_TELL = 16


class Classification(activations.TaskOnLogits):
    """Task with one class per sample; predictions are log-probabilities (N, classes).

    Outputs are logits (N, classes), or one logit (N,) or (N, 1) of a binary classifier, whose
    sigmoid is the probability of class 1. Labels are classes (N,) or (N, 1), or one-hot
    (N, classes), of any type. A model that ends in a softmax, or in a sigmoid if it has one output,
    returns probabilities, which are used as such, with a note.

    An ensemble averages probabilities (FGE). The metrics are this package's own: torchmetrics' take
    seconds to import, and give neither the bins of the calibration error nor sums in float64.
    """

    metrics: ClassVar = (
        Metric("top1", "top-1 %", ".2f", True, "%"),
        Metric("top5", "top-5 %", ".2f", True, "%"),
        Metric("nll", "NLL", ".4f", False, "nats"),
        Metric("ece", "ECE", ".4f", False),
    )
    loss: ClassVar = "nll"

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that shapes fit and that labels are classes.

        Raises:
            EvaluationError: Shapes do not fit, or labels are not classes.
        """
        logits = _rows(take_output(outputs))
        if logits.dim() != 2 or not targets.dim() or len(logits) != len(targets):
            raise EvaluationError(
                f"outputs of shape (N, classes) or (N,) and labels of shape (N,) are expected, but "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}",
                _other_task(logits, targets),
            )
        if not logits.is_floating_point():
            raise EvaluationError(
                f"the model returns {logits.dtype}, classes instead of logits",
                "Let the model return the logits that the classes are the argmax of.",
            )
        if len(targets):
            # A single logit stands for two classes.
            _check_labels(targets, max(logits.shape[1], 2), binary=logits.shape[1] == 1)

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return log-probabilities (N, classes) in float64; (N, 2) from a single logit."""
        del targets
        raw = _rows(take_output(outputs).detach())
        values, are_probabilities = in_float64(raw), self.gives_probabilities(raw)
        if values.shape[1] > 1:
            if are_probabilities:
                return activations.log_of_probabilities(values, raw.dtype)
            return values.log_softmax(1)
        if are_probabilities:
            absent = activations.log_of_complements(values, raw.dtype)
            present = activations.log_of_probabilities(values, raw.dtype)
        else:
            absent, present = logsigmoid(-values), logsigmoid(values)
        return torch.cat((absent, present), 1)

    def mean(self) -> LogMean:
        """Create the mean of softmax outputs (Izmailov et al. 2018, 3.5), or of binary sigmoids."""
        return LogMean()

    def scores(self) -> Scores:
        """Create the metrics: top-1, top-5 (for more than 5 classes), NLL, calibration error."""
        self.begin_pass()
        return ClassificationMetrics()

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples:
        """Return 1 for right or 0 for wrong per sample, and the predicted class."""
        answers = predictions.argmax(1)
        # uint8 and int32 keep the samples of a large data set small.
        right = (answers == class_indices(targets, predictions.shape[1])).to(torch.uint8)
        return Samples(right, answers=answers.to(torch.int32), scale=100.0)

    def samples_of(self, metric: str, predictions: torch.Tensor, targets: Any) -> Samples:
        """Return the per-sample values of top-1, or of the NLL in nats.

        Args:
            metric: ``top1`` or ``nll``.
            predictions: Log-probabilities, (N, classes).
            targets: Labels, as ``scores`` takes them.
        """
        if metric != "nll":
            return super().samples_of(metric, predictions, targets)
        labels = class_indices(targets, predictions.shape[1])
        indices = labels.to(predictions.device, torch.int64)[:, None]
        return Samples(-predictions.gather(1, indices)[:, 0], metric="nll")

    def details(self, scores: Any) -> dict[str, Any]:
        """Return the bins of the calibration error."""
        return {"reliability": scores.reliability()}

    def intervals(self, scores: Any, samples: Samples | None) -> dict[str, Interval]:
        """Return the 95 % intervals of top-1, top-5 and NLL."""
        # A subclass may have scores of its own.
        if not isinstance(scores, ClassificationMetrics):
            return super().intervals(scores, samples)
        return scores.intervals()

    def are_probabilities(
        self, outputs: torch.Tensor, activation: activations.Activation | None
    ) -> bool:
        """Tell whether the first outputs of a pass are probabilities, with a note if so."""
        if outputs.shape[1] > 1:
            if activations.are_distributions(outputs, activation):
                self.note(activations.GIVES_PROBABILITIES.format("softmax"))
                return True
            if activation == "sigmoid":
                self.note(
                    "the model ends in a sigmoid, whose outputs are no distribution over classes: "
                    "NLL and ECE are of their softmax"
                )
            return False
        if not activations.are_between_0_and_1(outputs):
            return False
        if activation == "sigmoid":
            self.note(activations.GIVES_PROBABILITIES.format("sigmoid"))
        # Without a sigmoid that was seen, these may be the logits of a weak classifier.
        elif len(outputs) >= _ENOUGH_TO_TELL:
            self.note(
                "the model's output is between 0 and 1 and is taken for a logit: if that is wrong, "
                "let the model return the logit instead of the probability"
            )
        return activation == "sigmoid"


def _rows(outputs: torch.Tensor) -> torch.Tensor:
    """Reshape outputs to (N, classes): drop trailing axes of length 1, and make (N,) (N, 1)."""
    while outputs.dim() > 2 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    if outputs.dim() == 1:
        return outputs[:, None]
    return outputs


def _check_labels(labels: torch.Tensor, classes: int, *, binary: bool) -> None:
    """Check that labels are classes or one-hot.

    Args:
        labels: (N,), (N, 1) or (N, classes), N at least 1.
        classes: Number of classes of the model.
        binary: True if the model has a single logit.

    Raises:
        EvaluationError: Labels are of another shape, not whole, or out of range.
    """
    if labels.dim() == 2 and labels.shape[1] == classes:
        _check_one_hot(labels)
        return
    if labels.numel() != len(labels):
        raise EvaluationError(
            f"labels of shape (N,), (N, 1) or one-hot (N, {classes}) are expected, but got "
            f"{tuple(labels.shape)}",
            _BELONG_TOGETHER,
        )
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise EvaluationError(
            "the data has labels that are not whole numbers: soft labels, as of mixup, are "
            "not scored",
            _GIVE_CLASSES,
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        wrong = high
        if low < 0:
            wrong = low
        description = f"has {classes} classes"
        if binary:
            description = "tells 0 from 1 by a single output"
        raise EvaluationError(
            f"the data has the label {wrong}, but the model {description}", _BELONG_TOGETHER
        )


def _other_task(logits: torch.Tensor, targets: Any) -> str:
    """Suggest a task that fits the shapes of outputs and labels."""
    if logits.dim() == 3 and logits.shape[:2] == targets.shape:
        return "Pass `task='causal-lm'` if this is a language model."
    return (
        "If samples have anything other than one class, pass another `task` (causal-lm, "
        "multi-label, regression) or a task of your own."
    )


def _check_one_hot(labels: torch.Tensor) -> None:
    """Check that each row of labels is 1 for a single class and 0 elsewhere."""
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise EvaluationError(
            "the data has a number per class that is neither 0 nor 1: soft labels, as of mixup, "
            "are not scored",
            _GIVE_CLASSES,
        )
    counts = labels.sum(1, dtype=torch.int64)
    wrong = counts[counts != 1]
    if len(wrong):
        raise EvaluationError(
            f"the data has a sample with {int(wrong[0])} labels, but one class is expected",
            "Pass `task='multi-label'` for a model with several labels per sample.",
        )
