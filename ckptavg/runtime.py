"""Where and how models run: device, precision, memory."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.errors import EvaluationError, UsageError
from ckptavg.processes import local_rank, several

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SHARE = 0.6  # of the memory that is free; activations need the rest
_EXHAUSTED = ("out of memory", "not enough memory", "can't allocate memory")


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

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in the memory format that suits it there."""
        if suits_channels_last(model, self.device):
            return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
        return model.to(self.device)


def suits_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether a model's convolutions run faster on CUDA with the channels as the last axis."""
    return device.type == "cuda" and any(isinstance(m, nn.Conv2d) for m in model.modules())


def find_device(name: str | torch.device) -> torch.device:
    """A device by name; ``auto`` is the best one there is.

    Raises:
        EvaluationError: It is not there.
        UsageError: There is no such kind of device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return _own(torch.device("cuda" if cuda else "mps" if mps else "cpu"))
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
    return _own(device)


def _own(device: torch.device) -> torch.device:
    """The one of a host's devices that this process takes, where several share the host."""
    if device.type == "cuda" and device.index is None and several():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return device


def fit(model: nn.Module, device: torch.device) -> int:
    """How many copies of a model the free memory of a device holds beside the work on them.

    Averages are computed on the host before they move, so its memory counts as well.
    """
    tensors = (*model.parameters(), *model.buffers())
    size = sum(t.numel() * t.element_size() for t in tensors if not is_lazy(t))
    free = _free_on_host()
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    return int(_SHARE * free / max(size, 1))


def _free_on_host() -> int:
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or the host is exhausted."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
