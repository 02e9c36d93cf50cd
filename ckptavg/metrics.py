"""Classification metrics, accumulated batch by batch in float64."""

from __future__ import annotations

import math

import torch

from ckptavg.errors import EvaluationError

ECE_BINS = 15


class ClassificationMetrics:
    """Top-1 and top-5 accuracy, negative log-likelihood and expected calibration error.

    The calibration error (Guo et al. 2017, eq. 3) is the mean over samples of |accuracy −
    confidence| of the bin that the sample's confidence falls into, with 15 equal bins, each open at
    its lower and closed at its upper end.
    """

    def __init__(self) -> None:
        self.count = 0
        self._top1 = self._top5 = 0
        self._nll = 0.0
        self._bins = torch.zeros(3, ECE_BINS, dtype=torch.float64)  # samples, correct, confidence

    def update(self, log_probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            log_probabilities: (N, C), float64.
            labels: (N,), integers from 0 to C − 1.
        """
        best = log_probabilities.topk(min(5, log_probabilities.shape[1]), dim=1)
        hits = best.indices == labels[:, None]
        correct = hits[:, 0].double()
        confidence = best.values[:, 0].exp()
        self.count += len(labels)
        self._top1 += int(correct.sum())
        self._top5 += int(hits.sum())
        self._nll -= float(log_probabilities.gather(1, labels[:, None]).sum())
        edges = torch.linspace(0, 1, ECE_BINS + 1, dtype=torch.float64, device=confidence.device)
        bins = torch.bucketize(confidence, edges[1:-1])
        found = torch.stack((torch.ones_like(correct), correct, confidence))
        totals = torch.zeros_like(self._bins, device=confidence.device)
        self._bins += totals.index_add_(1, bins, found).to(self._bins.device)

    def compute(self) -> dict[str, float]:
        """``top1`` and ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction, ``n`` samples.

        Raises:
            EvaluationError: There were no samples.
        """
        if not self.count:
            raise EvaluationError("the evaluation data is empty", "Check --data.")
        _, correct, confidence = self._bins
        return {
            "top1": 100 * self._top1 / self.count,
            "top5": 100 * self._top5 / self.count,
            "nll": self._nll / self.count,
            "ece": float((correct - confidence).abs().sum()) / self.count,
            "n": self.count,
        }


def log_softmax(outputs: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Log-probabilities in float64, on the CPU where the device has no float64 (mps)."""
    where = torch.device("cpu") if device.type == "mps" else device
    return outputs.detach().to(where, torch.float64).log_softmax(1)


class LogMean:
    """Mean of probabilities, kept as a logarithm.

    Attributes:
        members: How many have been taken in.
    """

    def __init__(self) -> None:
        self.members = 0
        self._sum: torch.Tensor | None = None

    def add(self, log_probabilities: torch.Tensor) -> None:
        """Take in a member's log-probabilities."""
        self.members += 1
        if self._sum is None:
            self._sum = log_probabilities
        else:
            self._sum = torch.logaddexp(self._sum, log_probabilities)

    def value(self) -> torch.Tensor:
        """Log of the mean of the members' probabilities."""
        if self._sum is None:
            raise EvaluationError("an ensemble has no members")
        return self._sum - math.log(self.members)
