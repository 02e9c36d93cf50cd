"""Data in, outputs out: loaders, batches, devices, and one way to call a model on a batch."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from ckptavg.errors import EvaluationError, UsageError

log = logging.getLogger("ckptavg")

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]
"""A user's way to run a model on a batch: ``forward(model, batch)``."""

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LABELS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    Attributes:
        device: Where.
        amp: ``off``, or the reduced precision of autocast: ``bf16``, ``fp16``.
        batch_size: Samples a batch, where a Dataset is given and not a loader.
        workers: Processes that load data then.
        seed: Of the order in which training data is read then.
    """

    device: torch.device
    amp: str = "off"
    batch_size: int = 128
    workers: int = 0
    seed: int = 0

    @classmethod
    def on(cls, device: str | torch.device | None, model: nn.Module, **options: Any) -> Runtime:
        """A runtime on a device; on the model's own where None."""
        if device is None:
            first = next(iter((*model.parameters(), *model.buffers())), None)
            return cls(torch.device("cpu") if first is None else first.device, **options)
        return cls(find_device(device), **options)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that the forward pass runs in."""
        if self.amp == "off":
            return contextlib.nullcontext()
        if self.amp not in _AMP:
            raise UsageError(f"amp is expected to be one of off, bf16, fp16 but got {self.amp!r}")
        return torch.autocast(self.device.type, _AMP[self.amp])

    def loader(self, data: Batches | Dataset[Any], *, shuffle: bool) -> Batches:
        """A Dataset as a loader, in seeded random order if ``shuffle``; a loader as it is."""
        if isinstance(data, Dataset):
            shuffle = shuffle and not isinstance(data, IterableDataset)
            return DataLoader(
                data,
                self.batch_size,
                shuffle=shuffle,
                num_workers=self.workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator().manual_seed(self.seed),
            )
        if shuffle and isinstance(data, DataLoader) and _is_sequential(data):
            log.info(
                "the training data loader does not shuffle: if its samples are sorted by class, "
                "batches of one class distort the statistics below the first layer"
            )
        return data


def _is_sequential(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads its samples in their own order; one with its own batches may not."""
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return isinstance(loader.sampler, SequentialSampler)


def find_device(name: str | torch.device) -> torch.device:
    """A device by name; ``auto`` is the best one there is.

    Raises:
        EvaluationError: It is not there.
        UsageError: There is no such kind of device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"device is expected to be one of auto, cpu, cuda[:N], mps but got {name!r}"
        ) from error
    here = {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, True)
    if device.type == "cuda" and cuda and (device.index or 0) >= torch.cuda.device_count():
        here = False
    if not here:
        raise EvaluationError(f"the device {device} is not available", "Use --device auto or cpu.")
    return device


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors moved."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(part, device) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(part, device) for part in value)
    return value


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
    raise EvaluationError(
        "a batch is expected to be (inputs, labels), or a dict with 'labels', "
        f"but is a {type(batch).__name__}"
    )


def inputs_of(batch: Any) -> Any:
    """A batch without its labels, if it has any."""
    try:
        return split_labels(batch)[0]
    except EvaluationError:
        return batch


def size_of(batch: Any) -> int:
    """Samples in a batch, by the first tensor in it."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, (Mapping, list, tuple)):
        return next((n for part in parts if (n := size_of(part))), 0)
    return 0


def length_of(loader: Batches) -> int:
    """Batches in a loader; 0 where it cannot tell."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return 0
