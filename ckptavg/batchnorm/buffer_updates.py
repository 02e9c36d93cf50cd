"""New values for the buffers of layers, checked first and written all at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from ckptavg.errors import BatchNormError


@dataclass(frozen=True)
class BufferUpdate:
    """A new value for a named buffer, in the buffer's shape and dtype, not yet written."""

    name: str
    buffer: torch.Tensor
    value: torch.Tensor

    @classmethod
    def fit(
        cls,
        name: str,
        buffer: torch.Tensor | None,
        value: torch.Tensor,
        *,
        keep_nonfinite: bool = False,
    ) -> BufferUpdate:
        """Fit a new value to the shape and dtype of a buffer.

        Args:
            name: Name of the buffer in the model.
            buffer: The buffer; None if the layer does not have it.
            value: One real value per element of the buffer; two per element if it is complex.
            keep_nonfinite: True to write NaN for a value that is not finite in the dtype.

        Raises:
            BatchNormError: The value does not fit the buffer, or is too large for its dtype.
        """
        if buffer is None or buffer.numel() * (1 + buffer.is_complex()) != value.numel():
            raise BatchNormError(
                f"{name} does not have one value per channel of its layer's input",
                "Leave the layer out by `update_bn(exclude=PATTERN)`.",
            )
        if buffer.is_complex():
            value = torch.view_as_complex(value.reshape(*buffer.shape, 2))
        narrowed = value.reshape(buffer.shape).to(buffer.dtype)
        finite = torch.isfinite(narrowed)
        if keep_nonfinite and not bool(finite.all()):
            # An infinite variance would make finite outputs, which hide that there are none.
            narrowed = narrowed.masked_fill(~finite, torch.nan)
        elif not bool(finite.all()):
            raise BatchNormError(
                f"{name} is too large for {str(buffer.dtype).removeprefix('torch.')}",
                "Convert the model to a wider type, such as float32.",
            )
        return cls(name, buffer, narrowed)


def write_updates(updates: Sequence[BufferUpdate]) -> None:
    """Write the new statistics into the layers: all, or none if an error occurs.

    Raises:
        BatchNormError: A buffer cannot be written.
    """
    # The old values undo a partial write.
    before = [update.buffer.detach().clone() for update in updates]
    with torch.no_grad():
        for number, update in enumerate(updates):
            try:
                update.buffer.copy_(update.value)
            except Exception as error:
                # Restore the buffer that failed too: torch may raise after it has written values.
                _restore(updates[: number + 1], before)
                raise BatchNormError(
                    f"{update.name} cannot be written: {type(error).__name__}: {error}",
                    "The statistics of all layers are as they were.",
                ) from error


def _restore(updates: Sequence[BufferUpdate], before: Sequence[torch.Tensor]) -> None:
    """Write the former values back into buffers."""
    for update, value in zip(updates, before, strict=False):
        # Inference tensors can be written in inference mode only. A buffer that refused the new
        # value may refuse the old value as well.
        with torch.inference_mode(update.buffer.is_inference()), suppress(RuntimeError):
            update.buffer.copy_(value)
