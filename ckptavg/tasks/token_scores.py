"""Scores of tokens: log-probabilities of targets, their metrics, and means over members."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ckptavg.errors import EvaluationError
from ckptavg.tasks.base import in_float64
from ckptavg.tasks.metrics import Totals

log = logging.getLogger("ckptavg")

# Logits per chunk. Beside the logits, memory is needed for the softmax of one chunk only.
_CHUNK = 1 << 24
# Exponents from which on a perplexity is infinite; math.exp raises from about 709.8 on.
_EXP_OVERFLOW = 700.0


class TokenScorer:
    """Scores of logits, computed once for all metrics while the logits exist.

    The scores of a task, its metrics and its means share one scorer.
    """

    def __init__(self) -> None:
        # Weak keys: scores are dropped together with the logits, which take much memory.
        self._scores: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: object) -> TokenScorer:
        # A copied mean scores the same logits as the original.
        return self

    def score(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the scores of predictions, (N, 2·T), float64, as ``score_tokens`` does.

        Args:
            predictions: Logits (N, T, V); or scores (N, 2·T), which are returned as they are.
            targets: (N, T), integers; negative targets are not scored.
        """
        scores = self.known_scores(predictions)
        if scores is None:
            scores = self._scores[predictions] = score_tokens(predictions, targets)
        return scores

    def known_scores(self, predictions: torch.Tensor) -> torch.Tensor | None:
        """Return the scores of predictions without computing; None for logits not scored yet."""
        # Two dimensions: predictions that are scores already, such as those of ``TokenMean``.
        if predictions.dim() == 2:
            return predictions
        return self._scores.get(predictions)


class TokenScores:
    """NLL per token, perplexity and accuracy, from sums in float64.

    Args:
        scorer: Scores predictions.
    """

    def __init__(self, scorer: TokenScorer) -> None:
        self._scorer = scorer
        self._totals = Totals(3)  # NLL, right, tokens

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch, without waiting for the device."""
        scores = self._scorer.score(predictions, targets)
        length = targets.shape[1]
        nll, right = -scores[:, :length].sum(), scores[:, length:].sum()
        tokens = (targets >= 0).sum().to(scores)
        self._totals.add(torch.stack((nll, right, tokens)))

    def compute(self) -> dict[str, float]:
        """Compute ``nll`` in nats, ``perplexity``, ``accuracy`` in % if known, and ``n`` tokens.

        Raises:
            EvaluationError: There were no tokens.
        """
        nll, right, tokens = self._totals.read().tolist()
        if not tokens:
            raise EvaluationError(
                "the evaluation data has no tokens to score", "Check the evaluation data."
            )
        metrics = {"nll": nll / tokens, "perplexity": exp_or_inf(nll / tokens)}
        if math.isnan(right):
            log.info("the accuracy of an ensemble whose members came in several passes is unknown")
        else:
            metrics["accuracy"] = 100 * right / tokens
        return {**metrics, "n": int(tokens)}

    def state(self) -> list[float | None]:
        """Return the sums of NLL, right tokens (None if unknown) and tokens."""
        nll, right, tokens = self._totals.read().tolist()
        # JSON has no NaN. Only the number of right tokens may be unknown.
        if math.isnan(right):
            return [nll, None, tokens]
        return [nll, right, tokens]

    def merge(self, state: Sequence[float | None]) -> None:
        """Add the sums of another process."""
        nll, right, tokens = state
        if right is None:
            right = math.nan
        self._totals.add(torch.tensor([nll, right, tokens], dtype=torch.float64))


class TokenMean:
    """Mean of the members' probabilities of every token, kept as logarithms of sums.

    While members are added, the sums are (N, T, V) in float32 (float64 for a float64 model).
    ``offload`` keeps the targets' probabilities only; the most probable token is unknown from then
    on.

    Args:
        scorer: Scores predictions.

    Attributes:
        members: Number of members added so far.
    """

    def __init__(self, scorer: TokenScorer) -> None:
        self.members = 0
        self._scorer = scorer
        self._sum: torch.Tensor | None = None
        # (N, T), float64: the targets only, once offloaded.
        self._target_logs: torch.Tensor | None = None
        self._targets = torch.empty(0)

    @torch.inference_mode()
    def add(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the predictions of a member."""
        self.members += 1
        self._targets = targets
        if self._target_logs is not None:
            logs = self._scorer.score(predictions, targets)[:, : targets.shape[1]].cpu()
            self._target_logs = torch.logaddexp(self._target_logs, logs)
            return
        dtype = _softmax_dtype(predictions)
        is_first = self._sum is None
        if self._sum is None:
            self._sum = torch.empty(predictions.shape, dtype=dtype, device=predictions.device)
        for rows, total in zip(_chunks(predictions), _chunks(self._sum), strict=True):
            logs = rows.log_softmax(1, dtype=dtype)
            if not is_first:
                logs = torch.logaddexp(total, logs)
            total.copy_(logs)

    @torch.inference_mode()
    def offload(self) -> None:
        """Keep only the targets' log-probabilities, on the host."""
        if self._sum is not None:
            logs = score_tokens(self._sum, self._targets)[:, : self._targets.shape[1]]
            self._target_logs = logs.cpu() + math.log(self.members)
            self._sum = None
        self._targets = self._targets.cpu()

    @torch.inference_mode()
    def value(self) -> torch.Tensor:
        """Return the scores of the mean, (N, 2·T), float64; the second half is NaN once offloaded.

        Raises:
            EvaluationError: No member was added.
        """
        if self._target_logs is not None:
            scored = self._targets.cpu() >= 0
            logs = torch.where(scored, self._target_logs - math.log(self.members), 0.0)
            return torch.cat((logs, torch.where(scored, math.nan, 0.0).to(logs)), 1)
        if self._sum is None:
            raise EvaluationError("an ensemble has no members")
        # The softmax of the log-sums divides by the number of members.
        return score_tokens(self._sum, self._targets)


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Score logits: the targets' log-probabilities, and 1 where the argmax is the target.

    Args:
        logits: (N, T, V), any floating-point dtype.
        targets: (N, T), integers; negative targets are not scored.

    Returns:
        (N, 2·T), float64: first the log-probabilities, 0 where nothing is scored, then 1 or 0.
    """
    targets = targets.to(logits.device, torch.int64)
    goals, parts, start = targets.clamp(min=0).flatten(), [], 0
    for rows in _chunks(logits):
        goal = goals[start : start + len(rows), None]
        start += len(rows)
        logs = rows.log_softmax(1, dtype=_softmax_dtype(rows)).gather(1, goal)
        parts.append(torch.cat((logs, rows.argmax(1, keepdim=True) == goal), 1))
    scores = in_float64(torch.cat(parts)).reshape(*targets.shape, 2)
    scored = (targets >= 0).to(scores.device)
    return torch.where(scored[:, None], scores.movedim(2, 1), 0.0).flatten(1)


def _chunks(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Iterate over logits (N, T, V) in order, in chunks (rows, V)."""
    return iter(torch.split(logits.flatten(0, 1), max(1, _CHUNK // logits.shape[2])))


def _softmax_dtype(logits: torch.Tensor) -> torch.dtype:
    if logits.dtype == torch.float64:
        return torch.float64
    return torch.float32


def exp_or_inf(value: float) -> float:
    """Return the exponential, which is infinite beyond the largest float."""
    if value >= _EXP_OVERFLOW:
        return math.inf
    return math.exp(value)
