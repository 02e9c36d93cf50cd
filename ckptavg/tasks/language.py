"""Causal language modelling: the probability of each token given the tokens before."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ckptavg.data.token_windows import IGNORED
from ckptavg.errors import EvaluationError
from ckptavg.tasks.activations import are_distributions
from ckptavg.tasks.base import Metric, Samples, Task, in_float64
from ckptavg.tasks.metrics import Totals
from ckptavg.tasks.model_outputs import take_output

log = logging.getLogger("ckptavg")

# Logits per chunk. The softmax of a chunk is the memory needed beside the logits themselves.
_CHUNK = 1 << 24
_scored: MutableMapping[torch.Tensor, torch.Tensor] = WeakTensorKeyDictionary()
"""Scores of logits that still exist, so that several metrics share one computation."""


class CausalLM(Task):
    """Causal language modelling task: NLL per token in nats, perplexity and accuracy.

    A batch has one of two forms, which differ in the position of a label:

    - a mapping with ``input_ids`` and ``labels``, both (N, T), as in transformers: the output at
      position t predicts ``labels[:, t + 1]``, and the first label is not predicted;
    - a tuple (x, y), both (N, T), as in plain loops: the output at t predicts ``y[:, t]``.

    A negative label is not scored: −100, or −1 as in nanoGPT. The model gets ``input_ids`` and the
    other entries of the mapping that ``forward`` has parameters for, or x alone. The model returns
    logits (N, T, V), as a tensor, as ``.logits``, or beside tensors of other shapes.

    Targets are (N, T): the token that the output at t predicts, −100 for none. Predictions are the
    logits, (N, T, V), or their scores, (N, 2·T): first the log-probabilities of the targets, then 1
    where the most probable token is the target, 0 where not, and NaN where unknown. Softmax and
    logarithm are in float32 (float64 for a float64 model), and sums in float64. An ensemble
    averages the probabilities of all tokens.
    """

    counts: ClassVar = "tokens"
    # Logits of a window are large: 1024 tokens times the vocabulary.
    batch_size: ClassVar = 8
    metrics: ClassVar = (
        Metric("nll", "NLL", ".4f", False),
        Metric("perplexity", "perplexity", ".3f", False),
        Metric("accuracy", "accuracy %", ".2f", True),
    )

    def __init__(self) -> None:
        self._looked_at = False
        # Largest token id of all batches so far that were on the host.
        self._largest = -1

    def split(self, batch: Any) -> tuple[Any, torch.Tensor]:
        """Split a batch into the model's inputs and the targets at the positions of the outputs.

        Raises:
            EvaluationError: The batch has neither form, or labels at the positions of the other.
        """
        if isinstance(batch, Mapping):
            ids, labels = (_tokens_of(batch, key) for key in ("input_ids", "labels"))
            inputs: Any = {key: value for key, value in batch.items() if key != "labels"}
        elif isinstance(batch, Sequence) and len(batch) >= 2:
            inputs, labels = (_integers(batch[i], f"batch[{i}]") for i in (0, 1))
            ids = inputs
        else:
            raise EvaluationError(
                "a batch is expected to be a mapping with input_ids and labels, or a tuple (x, y), "
                f"but is a {type(batch).__name__}"
            )
        if ids.shape != labels.shape:
            raise EvaluationError(
                f"inputs and labels are expected to have one shape (N, T) but have "
                f"{tuple(ids.shape)} and {tuple(labels.shape)}"
            )
        aligned = isinstance(batch, Mapping)
        # Reading values of a tensor on the device would wait for the device.
        if ids.device.type == "cpu":
            _check_places(ids, labels, aligned=aligned)
            self._note_range(ids)
        if not aligned:
            return inputs, labels
        return inputs, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model on token ids.

        Raises:
            EvaluationError: A token id exceeds the embedding, or the model fails on the window.
        """
        # On a GPU an id beyond the embedding is a device-side assert, after which CUDA is unusable.
        rows = _embedded(model)
        if rows is not None and self._largest >= rows:
            raise EvaluationError(
                f"the data has the token id {self._largest}, but the model embeds {rows}",
                "Check that the model and the tokenizer belong together.",
            )
        try:
            return _run(model, inputs)
        except (AssertionError, IndexError) as error:
            length = (inputs["input_ids"] if isinstance(inputs, Mapping) else inputs).shape[1]
            raise EvaluationError(
                f"the model fails on windows of {length} tokens with ids up to {self._largest}: "
                f"{error}",
                "Check its context (--data-arg length=N) and that the tokenizer is its own.",
            ) from error

    def check(self, outputs: Any, targets: torch.Tensor) -> None:
        """Make sure that there are logits for each position, and that targets are tokens.

        Raises:
            EvaluationError: Shapes do not fit, a target exceeds the vocabulary, or the model
                returns probabilities.
        """
        logits = _logits(outputs, targets)
        count, length = targets.shape
        if length > 1 and logits.shape in ((count, 1, logits.shape[-1]), (count, logits.shape[-1])):
            raise EvaluationError(
                f"the model returns logits of shape {tuple(logits.shape)}, for one position only, "
                f"where windows have {length} tokens",
                "Name a task of your own by --task path/file.py:Task: a subclass of CausalLM "
                "(ckptavg.tasks.language) whose forward(model, inputs) returns all of them; "
                "nanoGPT's model does so where it gets targets too: model(ids, ids).",
            )
        if logits.dim() != 3 or logits.shape[:2] != targets.shape:
            raise EvaluationError(
                f"logits of shape (N, T, vocabulary) are expected for targets of shape (N, T), but "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}",
                "Write a task of your own whose forward returns them so (--task).",
            )
        largest = int(targets.max()) if targets.numel() else -1
        if largest >= logits.shape[2]:
            raise EvaluationError(
                f"the data has the token id {largest}, but the model has {logits.shape[2]} tokens",
                "Check that the model and the tokenizer belong together.",
            )
        if not self._looked_at and logits.numel():
            self._looked_at = True
            if are_distributions(logits[0]):
                raise EvaluationError(
                    "the model returns probabilities (a softmax is in it), where logits or their "
                    "log-softmax are expected",
                    "Let it return these.",
                )

    def predict(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, T, V) and score them ahead."""
        logits = _logits(outputs, targets).detach()
        # Scored here because the targets are at hand; ``sound`` gets the predictions alone.
        _scored[logits] = score_tokens(logits, targets)
        return logits

    def sound(self, predictions: torch.Tensor) -> torch.Tensor:
        """Return a bool tensor: True if the targets' log-probabilities are finite.

        Logits of other tokens may be −∞, which excludes those tokens.
        """
        scores = _scored.get(predictions, predictions)
        logs = scores.chunk(2, 1)[0] if scores.dim() == 2 else scores
        return torch.isfinite(logs).all()

    def mean(self) -> TokenMean:
        """Create the mean of the members' token probabilities."""
        return TokenMean()

    def scores(self) -> TokenScores:
        """Create the metrics: NLL, perplexity and accuracy."""
        return TokenScores()

    def samples(self, predictions: torch.Tensor, targets: torch.Tensor) -> Samples:
        """Return NLL and number of tokens per window.

        A window is one sample of a comparison, since the tokens of a window are not independent.
        """
        scores = _score(predictions, targets)
        length = targets.shape[1]
        return Samples(-scores[:, :length].sum(1), (targets >= 0).sum(1).to(scores.device))

    def _note_range(self, ids: torch.Tensor) -> None:
        """Update the largest token id, for comparison with the model's embedding.

        Raises:
            EvaluationError: An id is negative.
        """
        low, high = (int(end) for end in ids.aminmax()) if ids.numel() else (0, -1)
        if low < 0:
            raise EvaluationError(f"the data has the token id {low}", "Check --data and its dtype.")
        self._largest = max(self._largest, high)


class TokenScores:
    """NLL per token, perplexity and accuracy, from sums in float64."""

    def __init__(self) -> None:
        self._totals = Totals(3)  # NLL, right, tokens

    def update(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add a batch, without waiting for the device."""
        scores = _score(predictions, targets)
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
            raise EvaluationError("the evaluation data has no tokens to score", "Check --data.")
        metrics = {"nll": nll / tokens, "perplexity": _exp(nll / tokens)}
        if math.isnan(right):
            log.info("the accuracy of an ensemble whose members came in several passes is unknown")
        else:
            metrics["accuracy"] = 100 * right / tokens
        return {**metrics, "n": int(tokens)}

    def state(self) -> list[float | None]:
        """Return the sums of NLL, right tokens (None if unknown) and tokens."""
        # JSON has no NaN.
        return [None if math.isnan(value) else value for value in self._totals.read().tolist()]

    def merge(self, state: Sequence[float | None]) -> None:
        """Add the sums of another process."""
        more = [math.nan if value is None else value for value in state]
        self._totals.add(torch.tensor(more, dtype=torch.float64))


class TokenMean:
    """Mean of the members' probabilities of every token, kept as logarithms of sums.

    While members are added, the sums are (N, T, V) in float32 (float64 for a float64 model).
    ``park`` keeps the targets' probabilities only, so the most probable token is unknown from then
    on.

    Attributes:
        members: Number of members added so far.
    """

    def __init__(self) -> None:
        self.members = 0
        self._sum: torch.Tensor | None = None
        self._parked: torch.Tensor | None = None  # (N, T) of the targets, float64
        self._targets = torch.empty(0)

    @torch.inference_mode()
    def add(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Add the predictions of a member."""
        self.members += 1
        self._targets = targets
        if self._parked is not None:
            logs = _score(predictions, targets)[:, : targets.shape[1]].cpu()
            self._parked = torch.logaddexp(self._parked, logs)
            return
        dtype = _softmax_dtype(predictions)
        first = self._sum is None
        if self._sum is None:
            self._sum = torch.empty(predictions.shape, dtype=dtype, device=predictions.device)
        for rows, total in zip(_chunks(predictions), _chunks(self._sum), strict=True):
            logs = rows.log_softmax(1, dtype=dtype)
            total.copy_(logs if first else torch.logaddexp(total, logs))

    @torch.inference_mode()
    def park(self) -> None:
        """Keep only the targets' log-probabilities, on the host."""
        if self._sum is not None:
            logs = score_tokens(self._sum, self._targets)[:, : self._targets.shape[1]]
            self._parked = logs.cpu() + math.log(self.members)
            self._sum = None
        self._targets = self._targets.cpu()

    @torch.inference_mode()
    def value(self) -> torch.Tensor:
        """Return the scores of the mean, (N, 2·T), float64; the second half is NaN once parked.

        Raises:
            EvaluationError: No member was added.
        """
        if self._parked is not None:
            scored = self._targets.cpu() >= 0
            logs = torch.where(scored, self._parked - math.log(self.members), 0.0)
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


def _score(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the scores of predictions, (N, 2·T), float64; computed once and cached."""
    # Two dimensions: predictions that are scores already, such as those of ``TokenMean``.
    if predictions.dim() == 2:
        return predictions
    scores = _scored.get(predictions)
    if scores is None:
        scores = _scored[predictions] = score_tokens(predictions, targets)
    return scores


def _chunks(logits: torch.Tensor) -> Iterator[torch.Tensor]:
    """Iterate over logits (N, T, V) in order, in chunks (rows, V)."""
    return iter(torch.split(logits.flatten(0, 1), max(1, _CHUNK // logits.shape[2])))


def _softmax_dtype(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _run(model: nn.Module, inputs: Any) -> Any:
    """Call a model by keyword if ``forward`` has ``input_ids``, else on the ids alone."""
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in names:
        return model(inputs["input_ids"])
    keywords = {key: value for key, value in inputs.items() if key in names}
    if "use_cache" in names:
        # The cache of keys and values serves generation and takes memory here.
        keywords.setdefault("use_cache", False)
    return model(**keywords)


def _logits(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
    """Pick the logits (N, T, V) from a model's outputs, which may hold recurrent states, too."""
    return take_output(outputs, lambda one: one.dim() == 3 and one.shape[:2] == targets.shape)


def _embedded(model: nn.Module) -> int | None:
    """Return the number of rows of a transformers model's token embedding; None if unknown."""
    find: Any = getattr(model, "get_input_embeddings", None)
    try:
        layer = find() if find else None
    except NotImplementedError:
        return None
    return layer.num_embeddings if isinstance(layer, nn.Embedding) else None


def _tokens_of(batch: Mapping[str, Any], key: str) -> torch.Tensor:
    if key not in batch:
        remedy = "Labels are input_ids again, with -100 where nothing is scored."
        if key != "labels":
            remedy = "Let it give tokens: what a tokenizer makes of texts."
        raise EvaluationError(f"the data gives no {key} but {', '.join(map(str, batch))}", remedy)
    return _integers(batch[key], key)


def _integers(value: Any, name: str) -> torch.Tensor:
    form = f"{value.dtype} of shape {tuple(value.shape)}" if hasattr(value, "shape") else "none"
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.is_floating_point():
        raise EvaluationError(
            f"{name} is expected to be a tensor of integers of shape (N, T) but is {form}",
            "The task causal-lm scores tokens.",
        )
    return value


def _check_places(ids: torch.Tensor, labels: torch.Tensor, *, aligned: bool) -> None:
    """Refuse labels whose positions are those of the other form of batch.

    Args:
        ids: (N, T), the input tokens.
        labels: (N, T).
        aligned: True for a mapping, where labels stand at the positions of the same tokens.
    """
    same = _repeat(ids, labels)
    following = _repeat(ids[:, 1:], labels[:, :-1])
    if aligned and following and not same:
        raise EvaluationError(
            "labels in a mapping are expected where their input_ids are, but are one before",
            "Give a tuple (x, y), where y[t] follows x[t].",
        )
    if not aligned and same and not following:
        raise EvaluationError(
            "y in a tuple (x, y) is expected to be the next tokens, but repeats x",
            "Give a mapping with input_ids and labels, where both are the same tokens.",
        )


def _repeat(ids: torch.Tensor, labels: torch.Tensor) -> bool:
    """Return True if every scored label equals the id at the same position."""
    return bool(((ids == labels) | (labels < 0)).all())


def _exp(value: float) -> float:
    # math.exp raises an OverflowError from about 709.8 on.
    return math.exp(value) if value < 700 else math.inf
