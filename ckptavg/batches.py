"""What a loader gives: batches, their parts, and one way to call a model on them."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ckptavg.errors import EvaluationError, first_few

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]
"""A user's way to run a model on a batch: ``forward(model, batch)``."""

_LABELS = ("labels", "label", "target", "targets", "y")


def to_device(
    value: Any, device: torch.device, form: torch.memory_format = torch.preserve_format
) -> Any:
    """A batch with its tensors moved; to CUDA from pinned memory, so that nothing waits.

    What is float64 stays where it is if the device is Apple's mps, which has none.

    Args:
        value: A batch.
        device: Where to.
        form: Memory format of the tensors with four axes.
    """
    if isinstance(value, torch.Tensor):
        if device.type == "mps" and value.dtype == torch.float64:
            return value
        if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        form = form if value.dim() == 4 else torch.preserve_format
        # the other way, what is read before the copy is over would be anything
        return value.to(device, non_blocking=device.type == "cuda", memory_format=form)
    if isinstance(value, Mapping):
        return {key: to_device(part, device, form) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device, form) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(part, device, form) for part in value)
    return value


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a batch."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's values in memory, row by row."""
    values = tensor.detach().cpu().contiguous()
    return ctypes.string_at(values.data_ptr(), values.nbytes) if values.nbytes else b""


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a tensor, a tuple (its first is the input), a dict (as keywords).

    Labels in a dict are left out where the model does not take them.

    Raises:
        EvaluationError: The batch is something else.
    """
    if isinstance(batch, (list, tuple)) and batch:
        return call_on_inputs(model, batch[0])
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters.values()
        names = {parameter.name for parameter in taken}
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken):
            batch = {k: v for k, v in batch.items() if k in names or k not in _LABELS}
    return call_on_inputs(model, batch)


def call_on_inputs(model: nn.Module, inputs: Any) -> Any:
    """Run a model on inputs without labels: a tensor, or a dict of keywords.

    Raises:
        EvaluationError: They are something else, several tensors for instance.
    """
    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (list, tuple)) and len(inputs) == 1:
        return call_on_inputs(model, inputs[0])
    raise EvaluationError(
        "what the model gets is expected to be a tensor or a dict of keywords "
        f"but is a {type(inputs).__name__}",
        "Pass forward=function(model, batch).",
    )


def described(value: Any) -> str:
    """Types and shapes of the tensors in a batch: ``float32 of 8 × 3 × 224 × 224``."""
    found = [
        f"{str(t.dtype).removeprefix('torch.')} of {' × '.join(map(str, t.shape)) or 'one value'}"
        for t in tensors_of(value)
    ]
    return first_few(found) if found else f"a {type(value).__name__}"


def split_labels(batch: Any) -> tuple[Any, torch.Tensor]:
    """A batch as inputs and labels: (inputs, labels), or a dict with a known label key.

    Raises:
        EvaluationError: There are no labels.
    """
    if isinstance(batch, Mapping):
        key = next((k for k in _LABELS if isinstance(batch.get(k), torch.Tensor)), None)
        if key is not None:
            return {k: v for k, v in batch.items() if k != key}, batch[key]
    elif isinstance(batch, Sequence) and len(batch) >= 2 and isinstance(batch[1], torch.Tensor):
        return batch[0], batch[1]
    held = f" with {first_few([repr(k) for k in batch])}" if isinstance(batch, Mapping) else ""
    raise EvaluationError(
        f"a batch is expected to be (inputs, labels), or a dict with one of {', '.join(_LABELS)}, "
        f"but is a {type(batch).__name__}{held}",
        "Let the data give one of these, or name a task of your own whose split() knows it.",
    )


def size_of(batch: Any) -> int:
    """Samples in a batch, by the first tensor in it."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, (Mapping, list, tuple)):
        return next((n for part in parts if (n := size_of(part))), 0)
    return 0
