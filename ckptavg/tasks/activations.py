"""Models that end in a softmax or sigmoid of their own: what they return are probabilities."""

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
# What may come after the activation without making its values anything else.
_KEEPING = (
    "squeeze", "squeeze_", "unsqueeze", "view", "reshape", "flatten", "ravel", "contiguous",
    "float", "double", "half", "to", "type", "clone", "detach", "__getitem__", "select",
)  # fmt: skip
GIVES_PROBABILITIES = "the model gives probabilities (a {} is in it): taken as such, not as logits"
_SUM_TOLERANCE = 1e-5  # of float32 probabilities of some thousand classes
_ROUNDINGS = 4  # of a shorter type's precision, by which its probabilities' sum may be off


class ActivationWatch(TorchFunctionMode):
    """Remembers, while a model runs, which tensors are values of a softmax or sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self._origins: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch and note its result if it is an activation's."""
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        origin = _ACTIVATIONS.get(name)
        if name in _KEEPING and args:
            origin = self.origin_of(args[0])
        if isinstance(result, torch.Tensor) and origin:
            self._origins[result] = origin
        return result

    def origin_of(self, value: object) -> Activation | None:
        """Name the activation that has given a tensor; None if none has."""
        known = isinstance(value, torch.Tensor) and value in self._origins
        return self._origins[value] if known else None


class TaskOnLogits(Task):
    """A task whose models return logits, or probabilities if they end in an activation.

    Which of them is found out with the first outputs of each pass.
    """

    _activation: Activation | None = None  # that the model ends in
    _is_watched = False
    _gives_probabilities: bool | None = None
    _noted: frozenset[str] = frozenset()

    def watch(self, run: Callable[[], Any]) -> Any:
        """Run the model; the first time, see whether it ends in an activation."""
        if self._is_watched:
            return run()
        self._is_watched = True
        with ActivationWatch() as watch:
            outputs = run()
        with suppress(EvaluationError):  # raised again where the outputs are checked
            self._activation = watch.origin_of(take_output(outputs))
        return outputs

    def begin_pass(self) -> None:
        """Forget what other models gave."""
        self._activation = self._gives_probabilities = None
        self._is_watched = False

    def gives_probabilities(self, outputs: torch.Tensor) -> bool:
        """Tell whether outputs are probabilities, by the first ones of the pass."""
        if self._gives_probabilities is None and len(outputs):
            self._gives_probabilities = self.are_probabilities(outputs, self._activation)
        return bool(self._gives_probabilities)

    def are_probabilities(self, outputs: torch.Tensor, activation: Activation | None) -> bool:
        """Look at a pass's first outputs, and say it if they are probabilities.

        Args:
            outputs: As the model gave them, at least one sample's.
            activation: What they were seen to come from, where that could be seen.
        """
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self._noted:
            self._noted |= {text}
            log.info(text)


def are_distributions(outputs: torch.Tensor, activation: Activation | None = None) -> bool:
    """Tell whether rows are probability distributions: nothing negative, and sums of 1.

    Logits may have a sum of 1, too, where they are few and made by hand: where no softmax was seen,
    rows must differ from each other and from those of a unit matrix.

    Args:
        outputs: (N, classes), in the type that the model gave them in.
        activation: What they were seen to come from, where that could be seen.
    """
    values = outputs.double() if outputs.device.type != "mps" else outputs.float()
    tolerance = max(_SUM_TOLERANCE, _ROUNDINGS * torch.finfo(outputs.dtype).eps)
    if not bool((values >= 0).all() & ((values.sum(1) - 1).abs() <= tolerance).all()):
        return False
    return activation == "softmax" or bool(
        (values != values[:1]).any() & ((values > 0) & (values < 1)).any()
    )


def lie_between_0_and_1(outputs: torch.Tensor) -> bool:
    """Tell whether each value can be a probability."""
    return bool(((outputs >= 0) & (outputs <= 1)).all())


def log_of_probabilities(probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logarithms of probabilities; of those that were rounded to 0, of the least that are not.

    Args:
        probabilities: Of any shape, float64.
        dtype: The type that they were computed in.
    """
    return probabilities.clamp(min=torch.finfo(dtype).tiny).log()


def log_of_complements(probabilities: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logarithms of 1 − p; of those p that were rounded to 1, of the next one below."""
    return torch.log1p(-probabilities.clamp(max=1 - torch.finfo(dtype).eps / 2))
