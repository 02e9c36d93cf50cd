"""Causal language modelling: the probability of each token given the tokens before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from ckptavg.data.token_windows import IGNORED
from ckptavg.errors import EvaluationError
from ckptavg.tasks.activations import are_distributions
from ckptavg.tasks.base import Metric, Samples, Task
from ckptavg.tasks.intervals import Interval
from ckptavg.tasks.model_outputs import take_output
from ckptavg.tasks.token_scores import TokenMean, TokenScorer, TokenScores, exp_or_inf

_BELONG_TOGETHER = "Check that the model and the tokenizer belong together."


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
        Metric("nll", "NLL", ".4f", False, "nats"),
        Metric("perplexity", "perplexity", ".3f", False),
        Metric("accuracy", "accuracy %", ".2f", True, "%"),
    )
    loss: ClassVar = "nll"

    def __init__(self) -> None:
        self._token_scorer = TokenScorer()
        self._has_checked_logits = False
        # Largest token id of all batches so far that were on the host.
        self._largest = -1

    def split(self, batch: Any) -> tuple[Any, torch.Tensor]:
        """Split a batch into the model's inputs and the targets at the positions of the outputs.

        Raises:
            EvaluationError: The batch has neither form, or labels at the positions of the other.
        """
        aligned = isinstance(batch, Mapping)
        if aligned:
            ids = _tokens_of(batch, "input_ids")
            labels = _tokens_of(batch, "labels")
            inputs: Any = {key: value for key, value in batch.items() if key != "labels"}
        elif isinstance(batch, Sequence) and len(batch) >= 2:
            ids = inputs = _integers(batch[0], "batch[0]")
            labels = _integers(batch[1], "batch[1]")
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
        # Reading values of a tensor on the device would wait for the device.
        if ids.device.type == "cpu":
            _check_places(ids, labels, aligned=aligned)
            self._note_range(ids)
        if not aligned:
            return inputs, labels
        # The last output predicts a token beyond the window, which has no label.
        return inputs, nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def forward(self, model: nn.Module, inputs: Any) -> Any:
        """Run the model on token ids.

        Raises:
            EvaluationError: A token id exceeds the embedding, or the model fails on the window.
        """
        # On a GPU an id beyond the embedding is a device-side assert, after which CUDA is unusable.
        rows = _count_embeddings(model)
        if rows is not None and self._largest >= rows:
            raise EvaluationError(
                f"the data has the token id {self._largest}, but the model has {rows} embeddings",
                _BELONG_TOGETHER,
            )
        try:
            return _run(model, inputs)
        # nanoGPT asserts that a window fits the context; an embedding raises IndexError on a CPU.
        except (AssertionError, IndexError) as error:
            ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
            raise EvaluationError(
                f"the model fails on windows of {ids.shape[1]} tokens with ids up to "
                f"{self._largest}: {error}",
                "Check the length of the windows, which the model's context limits, and that the "
                "tokenizer is the model's own.",
            ) from error

    def check(self, outputs: Any, targets: torch.Tensor) -> None:
        """Make sure that there are logits for each position, and that targets are tokens.

        Raises:
            EvaluationError: Shapes do not fit, a target exceeds the vocabulary, or the model
                returns probabilities.
        """
        logits = _logits(outputs, targets)
        count, length = targets.shape
        # For generation, models compute the logits of the last position alone.
        if length > 1 and logits.shape in ((count, 1, logits.shape[-1]), (count, logits.shape[-1])):
            raise EvaluationError(
                f"the model returns logits of shape {tuple(logits.shape)}, for one position only, "
                f"but windows have {length} tokens",
                "Pass `task=Task`, a subclass of CausalLM (ckptavg.tasks.language) whose "
                "forward(model, inputs) returns the logits of all positions. nanoGPT's model does "
                "so if it gets targets, too: model(ids, ids).",
            )
        if logits.dim() != 3 or logits.shape[:2] != targets.shape:
            raise EvaluationError(
                f"logits of shape (N, T, vocabulary) are expected for targets of shape (N, T), but "
                f"got {tuple(logits.shape)} and {tuple(targets.shape)}",
                "Pass `task=Task`, a task of your own whose forward returns logits of that shape.",
            )
        largest = int(targets.max()) if targets.numel() else -1
        if largest >= logits.shape[2]:
            raise EvaluationError(
                f"the data has the token id {largest}, but the model has {logits.shape[2]} tokens",
                _BELONG_TOGETHER,
            )
        # Only once, since the check waits for the device.
        if not self._has_checked_logits and logits.numel():
            self._has_checked_logits = True
            if are_distributions(logits[0]):
                raise EvaluationError(
                    "the model returns probabilities, as after a softmax, but logits or their "
                    "log-softmax are expected",
                    "Let the model return logits.",
                )

    def predict(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, T, V), after scoring the targets."""
        logits = _logits(outputs, targets).detach()
        # Scored here because the targets are at hand; ``is_finite`` gets the predictions alone.
        self._token_scorer.score(logits, targets)
        return logits

    def is_finite(self, predictions: torch.Tensor) -> torch.Tensor:
        """Return a bool tensor: True if the targets' log-probabilities are finite.

        Logits of other tokens may be −∞, which excludes those tokens.
        """
        scores = self._token_scorer.known_scores(predictions)
        if scores is None:
            return torch.isfinite(predictions).all()
        log_probabilities = scores.chunk(2, 1)[0]
        return torch.isfinite(log_probabilities).all()

    def mean(self) -> TokenMean:
        """Create the mean of the members' token probabilities."""
        return TokenMean(self._token_scorer)

    def scores(self) -> TokenScores:
        """Create the metrics: NLL, perplexity and accuracy."""
        return TokenScores(self._token_scorer)

    def samples(self, predictions: torch.Tensor, targets: torch.Tensor) -> Samples:
        """Return NLL and number of tokens per window.

        A window is one sample of a comparison, since the tokens of a window are not independent.
        """
        scores = self._token_scorer.score(predictions, targets)
        length = targets.shape[1]
        return Samples(-scores[:, :length].sum(1), (targets >= 0).sum(1).to(scores.device))

    def intervals(self, scores: Any, samples: Samples | None) -> dict[str, Interval]:
        """Return the 95 % intervals of NLL and perplexity, with a window as a sample."""
        intervals = super().intervals(scores, samples)
        if "nll" in intervals:
            low, high = intervals["nll"]
            intervals["perplexity"] = (exp_or_inf(low), exp_or_inf(high))
        return intervals

    def _note_range(self, ids: torch.Tensor) -> None:
        """Update the largest token id, for comparison with the model's embedding.

        Raises:
            EvaluationError: An id is negative.
        """
        if not ids.numel():
            return
        low, high = ids.aminmax()
        if low < 0:
            raise EvaluationError(
                f"the data has the token id {int(low)}", "Check the evaluation data and its dtype."
            )
        self._largest = max(self._largest, int(high))


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
    return take_output(outputs, lambda tensor: tensor.shape[:-1] == targets.shape)


def _count_embeddings(model: nn.Module) -> int | None:
    """Return the number of rows of a transformers model's token embedding; None if unknown."""
    get_embeddings: Any = getattr(model, "get_input_embeddings", None)
    if not get_embeddings:
        return None
    try:
        layer = get_embeddings()
    # transformers raises it for models without an embedding of tokens.
    except NotImplementedError:
        return None
    if not isinstance(layer, nn.Embedding):
        return None
    return layer.num_embeddings


def _tokens_of(batch: Mapping[str, Any], key: str) -> torch.Tensor:
    if key not in batch:
        remedy = "Labels are input_ids again, with -100 where nothing is scored."
        if key != "labels":
            remedy = "Let the data give tokens: the output of a tokenizer for texts."
        raise EvaluationError(f"the data gives no {key} but {', '.join(map(str, batch))}", remedy)
    return _integers(batch[key], key)


def _integers(value: Any, name: str) -> torch.Tensor:
    form = "none"
    if hasattr(value, "shape"):
        form = f"{value.dtype} of shape {tuple(value.shape)}"
    if not isinstance(value, torch.Tensor) or value.dim() != 2 or value.is_floating_point():
        raise EvaluationError(
            f"{name} is expected to be a tensor of integers of shape (N, T) but is {form}",
            "The task causal-lm scores tokens.",
        )
    return value


def _check_places(ids: torch.Tensor, labels: torch.Tensor, *, aligned: bool) -> None:
    """Refuse labels at the positions of the other form of batch.

    Args:
        ids: (N, T), the input tokens.
        labels: (N, T).
        aligned: True for a mapping, where each label is at the position of the same token.
    """
    same = _repeat(ids, labels)
    following = _repeat(ids[:, 1:], labels[:, :-1])
    if aligned and following and not same:
        raise EvaluationError(
            "labels in a mapping are expected at the positions of their input_ids, but are one "
            "position before",
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
