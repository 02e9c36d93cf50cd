"""Multi-label classification: any number of labels per sample."""

from __future__ import annotations

import base64
import importlib.util
from typing import Any, ClassVar, Literal

import torch
from torch.nn.functional import logsigmoid

from ckptavg.errors import EvaluationError
from ckptavg.models.batches import bytes_of
from ckptavg.tasks import activations
from ckptavg.tasks.base import LogMean, Metric, Samples, Scores, in_float64
from ckptavg.tasks.metrics import Totals
from ckptavg.tasks.model_outputs import take_output

# Scores that may stay on the device before they are moved to the host; 80 MiB with targets.
_MOST_ON_DEVICE = 2**24


class MultiLabel(activations.TaskOnLogits):
    """Multi-label task: logits (N, labels), targets (N, labels) of 0 and 1, of any type.

    Outputs of a model that ends in a sigmoid are used as probabilities.

    Predictions are the logarithms of p and 1 − p (N, labels, 2), so that an ensemble averages
    sigmoid probabilities without rounding to 0 or 1. Mean average precision is not a mean over
    samples, so paired comparisons use the NLL.

    Raises:
        EvaluationError: torchmetrics is not installed.
    """

    metrics: ClassVar = (
        Metric("map", "mAP %", ".2f", True, "%"),
        Metric("f1_micro", "F1 micro %", ".2f", True, "%"),
        Metric("f1_macro", "F1 macro %", ".2f", True, "%"),
        Metric("nll", "NLL", ".4f", False, "nats"),
    )
    loss: ClassVar = "nll"

    def __init__(self) -> None:
        # Looked for without an import, which takes seconds.
        if importlib.util.find_spec("torchmetrics") is None:
            raise EvaluationError(
                "multi-label metrics need torchmetrics, which is not installed",
                "Install it with pip install torchmetrics.",
            )

    def check(self, outputs: Any, targets: Any) -> None:
        """Make sure that shapes are equal and that targets are 0 or 1.

        Raises:
            EvaluationError: Shapes differ, or a target is neither 0 nor 1.
        """
        logits = take_output(outputs)
        if logits.dim() != 2 or logits.shape != targets.shape or not logits.shape[1]:
            remedy = "Check that the model and the data belong together."
            if targets.shape == logits.shape[:1]:
                remedy = "Pass `task='image-classification'` for a model with one class per sample."
            raise EvaluationError(
                f"outputs and targets of shape (N, labels) are expected, but got "
                f"{tuple(logits.shape)} and {tuple(targets.shape)}",
                remedy,
            )
        wrong = (targets != 0) & (targets != 1)
        if bool(wrong.any()):
            raise EvaluationError(
                f"the data has the target {targets[wrong][0].item()}, but 0 or 1 is expected for "
                "each label",
                "Check the evaluation data.",
            )

    def predict(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Return log p and log(1 − p) per label: (N, labels, 2), float64."""
        del targets
        raw = take_output(outputs).detach()
        values = in_float64(raw)
        if self.gives_probabilities(raw):
            present = activations.log_of_probabilities(values, raw.dtype)
            absent = activations.log_of_complements(values, raw.dtype)
        else:
            present, absent = logsigmoid(values), logsigmoid(-values)
        return torch.stack((present, absent), dim=-1)

    def mean(self) -> LogMean:
        """Create the mean of sigmoid outputs."""
        return LogMean()

    def scores(self) -> Scores:
        """Create the metrics: mean average precision, F1 and NLL."""
        self.begin_pass()
        return MultiLabelMetrics()

    def are_probabilities(
        self, outputs: torch.Tensor, activation: activations.Activation | None
    ) -> bool:
        """Tell whether the first outputs of a pass are probabilities, with a note if so."""
        after_sigmoid = activation == "sigmoid" and activations.are_between_0_and_1(outputs)
        if after_sigmoid:
            self.note(activations.GIVES_PROBABILITIES.format("sigmoid"))
        return after_sigmoid

    def samples(self, predictions: torch.Tensor, targets: Any) -> Samples:
        """Return the NLL per sample, mean over labels."""
        return Samples(_nll(predictions, targets).mean(1), metric="nll")


class MultiLabelMetrics:
    """Mean average precision and F1 from torchmetrics, and the NLL.

    Average precision depends on the order of all samples, so all scores are kept: 5 bytes per label
    and sample.
    """

    def __init__(self) -> None:
        self.count = 0
        self._nll = Totals()
        self._scores: list[torch.Tensor] = []  # (N, labels) float32, log-odds
        self._targets: list[torch.Tensor] = []  # (N, labels) uint8
        self._count_on_device = 0

    def update(self, predictions: torch.Tensor, targets: Any) -> None:
        """Add a batch; waits for the device only once in many millions of scores.

        Args:
            predictions: (N, labels, 2), float64, logarithms of p and 1 − p.
            targets: (N, labels), 0 or 1.
        """
        self.count += len(predictions)
        self._nll.add(_nll(predictions, targets).sum())
        # Rounding to float32 removes differences in the last bits of the logarithms, so that equal
        # outputs have equal scores.
        self._scores.append((predictions[..., 0] - predictions[..., 1]).float())
        self._targets.append(targets.to(predictions.device, torch.uint8))
        self._count_on_device += targets.numel()
        if self._count_on_device >= _MOST_ON_DEVICE:
            self._leave_device()

    def compute(self) -> dict[str, float]:
        """Compute the metrics, and ``n``, the number of samples.

        ``map``, ``f1_micro`` and ``f1_macro`` are in %, ``nll`` in nats per label. The F1 scores
        count labels with p above 1/2 as predicted. A label without samples has no average precision
        and is left out of the mean; its F1 is 0.

        Raises:
            EvaluationError: There were no samples.
        """
        if not self.count:
            raise EvaluationError("the evaluation data is empty", "Check the evaluation data.")
        self._leave_device()
        scores, targets = torch.cat(self._scores), torch.cat(self._targets).long()
        count, labels = scores.shape
        # The scores are log-odds, which are above 0 where p is above 1/2.
        chosen = (scores > 0).long()
        return {
            "map": 100 * _mean_average_precision(scores, targets),
            "f1_micro": 100 * _f1(chosen, targets, "micro"),
            "f1_macro": 100 * _f1(chosen, targets, "macro"),
            "nll": float(self._nll.read()) / (count * labels),
            "n": count,
        }

    def state(self) -> dict[str, Any]:
        """Return the accumulated values as plain values for JSON; scores as base85 text."""
        self._leave_device()
        labels = 0
        if self._scores:
            labels = self._scores[0].shape[1]
        return {
            "n": self.count,
            "labels": labels,
            "nll": float(self._nll.read()),
            "scores": _encode(self._scores),
            "targets": _encode(self._targets),
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Add the state of another process."""
        if not state["n"]:
            return
        self.count += state["n"]
        self._nll.add(torch.tensor(state["nll"], dtype=torch.float64))
        self._scores.append(_decode(state["scores"], torch.float32, state["labels"]))
        self._targets.append(_decode(state["targets"], torch.uint8, state["labels"]))

    def _leave_device(self) -> None:
        self._scores = [scores.cpu() for scores in self._scores]
        self._targets = [targets.cpu() for targets in self._targets]
        self._count_on_device = 0


def _nll(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the binary cross-entropy (N, labels) from the logarithms of p and 1 − p."""
    present = targets.to(predictions.device) == 1
    return -torch.where(present, predictions[..., 0], predictions[..., 1])


def _f1(
    predicted: torch.Tensor, targets: torch.Tensor, average: Literal["micro", "macro"]
) -> float:
    """Compute the F1 score of predicted labels (N, labels), as a fraction."""
    # The import takes seconds.
    from torchmetrics.functional.classification import multilabel_f1_score  # noqa: PLC0415

    labels = predicted.shape[1]
    return float(
        multilabel_f1_score(predicted, targets, labels, average=average, validate_args=False)
    )


def _mean_average_precision(scores: torch.Tensor, targets: torch.Tensor) -> float:
    """Compute the mean over labels with samples, as a fraction; 0 if no label has samples."""
    # The import takes seconds.
    from torchmetrics.functional.classification import (  # noqa: PLC0415
        multilabel_average_precision,
    )

    present = targets.any(0)
    labels = int(present.sum())
    if not labels:
        return 0.0
    # torchmetrics treats scores outside 0 to 1 as logits, and a sigmoid would make high scores
    # equal. Only the order counts, and x / (1 + |x|) keeps the order.
    odds = scores[:, present].double()
    ranks = (1 + odds / (1 + odds.abs())) / 2
    return float(
        multilabel_average_precision(ranks, targets[:, present], labels, validate_args=False)
    )


def _encode(parts: list[torch.Tensor]) -> str:
    if not parts:
        return ""
    return base64.b85encode(bytes_of(torch.cat(parts))).decode()


def _decode(text: str, dtype: torch.dtype, labels: int) -> torch.Tensor:
    # torch warns of memory that is not writable, such as that of bytes.
    raw = bytearray(base64.b85decode(text))
    return torch.frombuffer(raw, dtype=dtype).reshape(-1, labels)
