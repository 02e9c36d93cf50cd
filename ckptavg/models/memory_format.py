"""Memory format of image batches and convolutions while models run: channels_last if faster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.errors import CkptavgError, EvaluationError
from ckptavg.models.batches import describe_batch, to_device
from ckptavg.models.runtime import is_out_of_memory

log = logging.getLogger("ckptavg")
T = TypeVar("T")
_REFUSALS = ("view size is not compatible", "Cannot view a tensor with shape")
"""Parts of the errors of torch and its compiler on ``x.view(len(x), -1)`` in channels_last."""


class MemoryFormat:
    """The memory format of the models and batches of a pass.

    With channels_last, most convolutions take 0.4 to 0.75 of the time, on a CPU as well. But on a
    CPU, BatchNorm in training mode then sums each batch in float32, which is too inaccurate for
    running statistics. So on a CPU the format is used only for scoring.

    Some models fail in channels_last: ``x.view(len(x), -1)`` needs the contiguous format. If one
    model of a pass fails in this way, all models go back to the contiguous format.

    Args:
        model: One of the models.
        device: Device of the models.
        scoring: True if the models are only scored, in evaluation mode.

    Attributes:
        device: Device of the models.
        format: Memory format of tensors with four axes.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, scoring: bool) -> None:
        self.device = device
        is_fast = device.type == "cuda" or (
            scoring and device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        )
        self.format = torch.preserve_format
        if is_fast and _convolves(model):
            self.format = torch.channels_last

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, with the convolutions' weights in the memory format."""
        model.to(self.device)
        if self.format is not torch.preserve_format:
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.weight.data = module.weight.data.contiguous(memory_format=self.format)
        return model

    def to_device(self, batch: Any) -> Any:
        """Move a batch to the device and into the memory format."""
        return to_device(batch, self.device, self.format)

    def run(self, attempt: Callable[[Any], T], model: nn.Module, batch: Any) -> T:
        """Run a model on a batch, and retry in the contiguous format if channels_last fails.

        Args:
            attempt: Runs the model on a batch. It may fail half way and be called again.
            model: The model, already placed by ``place``.
            batch: The batch, already moved by ``to_device``.

        Returns:
            The result of ``attempt``.

        Raises:
            EvaluationError: The model fails on the batch.
        """
        try:
            return self._in_either_format(attempt, model, batch)
        # These errors have a message for the user already.
        except CkptavgError:
            raise
        except Exception as error:
            # Callers may try again with fewer models at a time, and need the original error.
            if is_out_of_memory(error):
                raise
            raise EvaluationError(
                f"the model fails on a batch of {describe_batch(batch)}: "
                f"{type(error).__name__}: {error}",
                "Check that the data gives what the model takes, or name a function "
                "fn(model, batch) that calls the model, by `forward=fn`.",
            ) from error

    def _in_either_format(self, attempt: Callable[[Any], T], model: nn.Module, batch: Any) -> T:
        """Run an attempt, and again in the contiguous format if channels_last fails."""
        try:
            return attempt(batch)
        except RuntimeError as error:
            refused = any(words in str(error) for words in _REFUSALS)
            if self.format is torch.preserve_format or not refused:
                raise
        if self.format is not torch.contiguous_format:
            log.debug("the model cannot run in channels_last")
        self.format = torch.contiguous_format
        # In inference mode the new weights would not be ordinary tensors.
        with torch.inference_mode(mode=False):
            self.place(model)
        return attempt(self.to_device(batch))


def _convolves(model: nn.Module) -> bool:
    """Return True if a model has convolutions of images and no uninitialized tensors."""
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return False
    return any(isinstance(module, nn.Conv2d) for module in model.modules())
