"""Classification metrics, accumulated batch by batch in float64."""

from __future__ import annotations

from typing import Any

import torch

from ckptavg.errors import EvaluationError
from ckptavg.tasks.intervals import Interval, mean_interval, wilson_interval

ECE_BINS = 15
# Number of classes that top-5 accuracy looks at.
_TOP = 5


class Totals:
    """Running sums in float64 that stay on the device until they are read.

    Args:
        shape: Shape of the summands.
    """

    def __init__(self, *shape: int) -> None:
        self._shape = shape
        self._sum: torch.Tensor | None = None

    def add(self, more: torch.Tensor) -> None:
        """Add a float64 tensor, without waiting for the device."""
        if self._sum is not None:
            more = self._sum.to(more.device) + more
        self._sum = more

    def read(self) -> torch.Tensor:
        """Return the sums on the CPU; zeros if nothing was added."""
        if self._sum is None:
            return torch.zeros(self._shape, dtype=torch.float64)
        return self._sum.cpu()


class ClassificationMetrics:
    """Top-1 and top-5 accuracy, negative log-likelihood and expected calibration error.

    The calibration error (Guo et al. 2017, eq. 3) is the mean over samples of |accuracy −
    confidence| of the bin that the sample's confidence falls into, with 15 equal bins, each open at
    its lower and closed at its upper end.

    Of classes with equal outputs, which half precision often gives, the first comes first, as with
    ``argmax``; ``topk`` would take any.
    """

    def __init__(self) -> None:
        self.count = 0
        self._classes = 0
        # Top-1 and top-5 hits, negative log-likelihood and its square.
        self._totals = Totals(4)
        # Samples, correct samples and confidence per bin.
        self._bins = Totals(3, ECE_BINS)

    def update(self, log_probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch, without waiting for the device.

        Args:
            log_probabilities: (N, C), float64.
            labels: (N,) or (N, 1), integers from 0 to C − 1, or one-hot (N, C).
        """
        self._classes = log_probabilities.shape[1]
        labels = class_indices(labels, self._classes)
        indices = labels.to(log_probabilities.device, torch.int64)[:, None]
        label_logs = log_probabilities.gather(1, indices)
        rank = _rank(log_probabilities, label_logs, indices)
        hit = (rank == 0).double()
        self.count += len(labels)
        top5 = (rank < _TOP).double().sum()
        squares = label_logs.square().sum()
        self._totals.add(torch.stack((hit.sum(), top5, -label_logs.sum(), squares)))
        self._bins.add(_sum_bins(log_probabilities.amax(1).exp(), hit))

    def compute(self) -> dict[str, float]:
        """Compute ``top1``, ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction, ``n`` samples.

        With up to 5 classes every class is among the first five, so there is no ``top5``.

        Raises:
            EvaluationError: There were no samples.
        """
        self._require_samples()
        top1, top5, nll, _ = self._totals.read().tolist()
        _, correct, confidence = self._bins.read()
        metrics = {"top1": 100 * top1 / self.count}
        if self._classes > _TOP:
            metrics["top5"] = 100 * top5 / self.count
        metrics["nll"] = nll / self.count
        metrics["ece"] = float((correct - confidence).abs().sum()) / self.count
        metrics["n"] = self.count
        return metrics

    def intervals(self) -> dict[str, Interval]:
        """Return the 95 % intervals of ``top1`` and ``top5`` in %, and of ``nll`` in nats.

        Raises:
            EvaluationError: There were no samples.
        """
        self._require_samples()
        top1, top5, nll, squares = self._totals.read().tolist()
        hits = {"top1": top1}
        if self._classes > _TOP:
            hits["top5"] = top5
        intervals: dict[str, Interval] = {}
        for key, right in hits.items():
            low, high = wilson_interval(right, self.count)
            intervals[key] = (100 * low, 100 * high)
        nll_interval = mean_interval(nll, squares, self.count)
        if nll_interval is not None:
            intervals["nll"] = nll_interval
        return intervals

    def reliability(self) -> list[dict[str, float | None]]:
        """Return the bins of the calibration error for a reliability diagram.

        See Guo et al. 2017, fig. 1. A bin covers the confidences from ``low`` to ``high`` and holds
        ``n`` samples. The mean ``confidence`` and the ``accuracy`` are fractions, None in a bin
        without samples.

        Raises:
            EvaluationError: There were no samples.
        """
        self._require_samples()
        bins = []
        for i, (n, correct, confidence) in enumerate(self._bins.read().T.tolist()):
            means: dict[str, float | None] = {"confidence": None, "accuracy": None}
            if n:
                means = {"confidence": confidence / n, "accuracy": correct / n}
            bins.append({"low": i / ECE_BINS, "high": (i + 1) / ECE_BINS, "n": int(n), **means})
        return bins

    def state(self) -> dict[str, Any]:
        """Return the accumulated sums as plain values for JSON."""
        totals, bins = self._totals.read().tolist(), self._bins.read().tolist()
        return {"n": self.count, "classes": self._classes, "totals": totals, "bins": bins}

    def merge(self, state: dict[str, Any]) -> None:
        """Add the state of another process."""
        self.count += state["n"]
        # A process that had no batch does not know the number of classes.
        self._classes = max(self._classes, state["classes"])
        self._totals.add(torch.tensor(state["totals"], dtype=torch.float64))
        self._bins.add(torch.tensor(state["bins"], dtype=torch.float64))

    def _require_samples(self) -> None:
        if not self.count:
            raise EvaluationError("the evaluation data is empty", "Check the evaluation data.")


def class_indices(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Convert labels to class indices (N,), without waiting for the device.

    Args:
        labels: (N,) or (N, 1), or one-hot (N, classes).
        classes: Number of classes, at least 2.
    """
    if labels.dim() == 2 and labels.shape[1] == classes:
        return labels.to(torch.int64).argmax(1)
    return labels.reshape(len(labels))


def _rank(values: torch.Tensor, label_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count the classes that rank before each sample's label: (N,).

    Args:
        values: (N, C).
        label_values: (N, 1), the value of each sample's label.
        labels: (N, 1), integers.
    """
    # Of classes with equal values the lower index ranks first, as with argmax.
    first = torch.arange(values.shape[1], device=values.device) < labels
    return ((values > label_values) | ((values == label_values) & first)).sum(1)


def _sum_bins(confidence: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Sum samples, correct samples and confidence per bin of confidence: (3, bins).

    Args:
        confidence: (N,), float64, probability of the predicted class.
        correct: (N,), float64, 1 or 0.
    """
    # bucketize closes a bin at the upper end, as the definition of the error does.
    edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])
    summands = torch.stack((torch.ones_like(correct), correct, confidence))
    return summands.new_zeros(3, ECE_BINS).index_add_(1, bins, summands)
