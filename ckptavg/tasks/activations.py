"""Detection of models that end in a softmax or sigmoid and return probabilities."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ckptavg.errors import EvaluationError
from ckptavg.tasks.base import Task
from ckptavg.tasks.model_outputs import take_output

log = logging.getLogger("ckptavg")

Activation = Literal["sigmoid", "softmax"]
_ACTIVATIONS: Mapping[str, Activation] = {
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
    "special_expit": "sigmoid",
    "softmax": "softmax",
    "special_softmax": "softmax",
}
# Functions that may follow the activation, since they keep its values.
_KEEPING = (
    "squeeze", "squeeze_", "unsqueeze", "view", "reshape", "flatten", "ravel", "contiguous",
    "float", "double", "half", "to", "type", "clone", "detach", "__getitem__", "select",
)  # fmt: skip
GIVES_PROBABILITIES = "the model gives probabilities (a {} is in it): taken as such, not as logits"
# Rounding error of the sum of some thousand float32 probabilities.
_SUM_TOLERANCE = 1e-5
# Same for shorter types such as bfloat16, in units of the type's precision.
_ROUNDINGS = 4


class ActivationWatch(TorchFunctionMode):
    """Record of the tensors that come from a softmax or sigmoid while a model runs."""

    def __init__(self) -> None:
        super().__init__()
        # By identity, since tensors compare by element; weak, to keep no activation in memory.
        self._origins: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a torch function and record a result that comes from an activation."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        origin = _ACTIVATIONS.get(name)
        if name in _KEEPING and args:
            origin = self.origin_of(args[0])
        if isinstance(result, torch.Tensor) and origin:
            self._origins[result] = origin
        return result

    def origin_of(self, value: object) -> Activation | None:
        """Return the activation that a tensor comes from; None if there is none."""
        if not isinstance(value, torch.Tensor) or value not in self._origins:
            return None
        origin: Activation = self._origins[value]
        return origin


class TaskOnLogits(Task):
    """Base of tasks whose models return logits, or probabilities after a final activation.

    The first outputs of each pass decide between logits and probabilities.
    """

    # The activation at the end of the model.
    _activation: Activation | None = None
    _is_watched = False
    _gives_probabilities: bool | None = None
    _noted: frozenset[str] = frozenset()

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the model; on the first batch of a pass, detect a final activation."""
        # Watching every torch function costs time, so only the first batch is watched.
        if self._is_watched:
            return run()
        self._is_watched = True
        with ActivationWatch() as watch:
            outputs = run()
        # Unusable outputs raise the same error in ``check``.
        with suppress(EvaluationError):
            self._activation = watch.origin_of(take_output(outputs))
        return outputs

    def begin_pass(self) -> None:
        """Reset the detection for the models of a new pass."""
        self._activation = self._gives_probabilities = None
        self._is_watched = False

    def gives_probabilities(self, outputs: torch.Tensor) -> bool:
        """Tell whether a pass's outputs are probabilities; the first outputs decide."""
        if self._gives_probabilities is None and len(outputs):
            self._gives_probabilities = self.are_probabilities(outputs, self._activation)
        return bool(self._gives_probabilities)

    def are_probabilities(self, outputs: torch.Tensor, activation: Activation | None) -> bool:
        """Tell whether the first outputs of a pass are probabilities, with a note if so.

        Args:
            outputs: Outputs of the model for at least one sample.
            activation: The activation that the outputs come from; None if none was seen.
        """
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Log a note, once per text."""
        if text not in self._noted:
            self._noted |= {text}
            log.info(text)


def are_distributions(outputs: torch.Tensor, activation: Activation | None = None) -> bool:
    """Tell whether rows are probability distributions: nothing negative, and sums of 1.

    Logits may have a sum of 1, too, if there are few classes and the logits are made by hand. So
    without a softmax that was seen, rows must differ from each other and from a unit matrix.

    Args:
        outputs: (N, classes), in the dtype of the model's output.
        activation: The activation that the outputs come from; None if none was seen.
    """
    # Apple's mps has no float64.
    dtype = torch.float64
    if outputs.device.type == "mps":
        dtype = torch.float32
    values = outputs.to(dtype)
    tolerance = max(_SUM_TOLERANCE, _ROUNDINGS * torch.finfo(outputs.dtype).eps)
    if not bool((values >= 0).all() & ((values.sum(1) - 1).abs() <= tolerance).all()):
        return False
    return activation == "softmax" or bool(
        (values != values[:1]).any() & ((values > 0) & (values < 1)).any()
    )


def are_between_0_and_1(outputs: torch.Tensor) -> bool:
    """Return True if every value is between 0 and 1."""
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def log_of_probabilities(probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return log p; a p that was rounded to 0 counts as the smallest normal number.

    Args:
        probabilities: Any shape, float64.
        dtype: The dtype that the probabilities were computed in.
    """
    return probabilities.clamp(min=torch.finfo(dtype).tiny).log()


def log_of_complements(probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return log(1 − p); a p that was rounded to 1 counts as the next smaller number."""
    return torch.log1p(-probabilities.clamp(max=1 - torch.finfo(dtype).eps / 2))
