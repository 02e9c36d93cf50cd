"""Where images' channels lie in memory while models run: beside each other where that is faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.errors import CkptavgError, EvaluationError
from ckptavg.models.batches import described, to_device
from ckptavg.models.device import is_out_of_memory

log = logging.getLogger("ckptavg")
T = TypeVar("T")
_REFUSALS = ("view size is not compatible", "Cannot view a tensor with shape")
"""What torch and its compiler say to ``x.view(len(x), -1)`` of such activations."""


class Channels:
    """The memory format of the models and batches of a pass.

    With the channels as the last axis in memory most convolutions take 0.4 to 0.75 of the time, on
    a CPU as well. But there BatchNorm sums its batches up in float32 then, which its statistics do
    not bear. Some models do not bear it either: ``x.view(len(x), -1)`` wants the usual format,
    which all go back to when one turns out to.

    Args:
        model: One of the models.
        device: Where they run.
        scoring: Whether they are only scored, in evaluation mode.

    Attributes:
        form: Of tensors with four axes.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, scoring: bool) -> None:
        self.device = device
        fast = device.type == "cuda" or (
            scoring and device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        )
        self.form = torch.channels_last if fast and _convolves(model) else torch.preserve_format

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, its convolutions' weights in the format."""
        model.to(self.device)
        if self.form is not torch.preserve_format:
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.weight.data = module.weight.data.contiguous(memory_format=self.form)
        return model

    def arrange(self, batch: Any) -> Any:
        """A batch on the device, in the format."""
        return to_device(batch, self.device, self.form)

    def run(self, attempt: Callable[[Any], T], model: nn.Module, batch: Any) -> T:
        """Take a model through a batch, and anew in the usual format if it does not bear another.

        Args:
            attempt: Does it; may fail half way and be called again.
            model: As ``place`` left it.
            batch: As ``arrange`` gave it.

        Raises:
            EvaluationError: The model fails on the batch.
        """
        try:
            return self._in_either_format(attempt, model, batch)
        except CkptavgError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"the model fails on a batch of {described(batch)}: "
                f"{type(error).__name__}: {error}",
                "Check that the data gives what the model takes; forward=fn in Python, --forward "
                "path/file.py:fn on the command line, says how fn(model, batch) calls it.",
            ) from error

    def _in_either_format(self, attempt: Callable[[Any], T], model: nn.Module, batch: Any) -> T:
        try:
            return attempt(batch)
        except RuntimeError as error:
            refused = any(words in str(error) for words in _REFUSALS)
            if self.form is torch.preserve_format or not refused:
                raise
        if self.form is not torch.contiguous_format:
            log.debug("the model does not bear its channels as the last axis in memory")
        self.form = torch.contiguous_format
        with torch.inference_mode(mode=False):  # weights are to stay ordinary tensors
            self.place(model)
        return attempt(self.arrange(batch))


def _convolves(model: nn.Module) -> bool:
    """Whether a model has convolutions of images, all of whose weights are there yet."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return False
    return any(isinstance(module, nn.Conv2d) for module in model.modules())
