"""BatchNorm layers inside TorchScript, whose calls are seen where they reach torch's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckptavg.batchnorm.hooks import Sink, WatchedLayer
from ckptavg.batchnorm.moments import batch_moments


class ScriptedLayer(WatchedLayer):
    """A layer of torch's that was scripted; one that was traced normalizes as it did then."""

    def suits_kernel(self) -> bool:
        """Never: a compiled call cannot be given other buffers."""
        return False

    def enter(self, sink: Sink) -> None:
        """Put the layer in training mode."""
        self._sink = sink
        self.layer.training = True

    def leave(self) -> None:
        """Nothing: its mode and its buffers come back with those of the model."""

    def hear(self, inputs: torch.Tensor) -> None:
        """Take in what a kernel gets that updates the layer's statistics."""
        self._add(batch_moments(inputs))


class KernelDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The kernels that a model comes to, of which those of scripted layers are heard.

    Args:
        layers: These layers, where their model is.
    """

    def __init__(self, layers: Iterable[ScriptedLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = {
            layer.layer.running_mean.data_ptr(): layer  # type: ignore[operator]
            for layer in layers
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for."""
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        if "running_mean" in names:
            given = dict(zip(names, args, strict=False)) | kwargs
            mean = given["running_mean"]
            trains = given.get("training", given.get("train", "momentum" in given))
            if trains and mean is not None and mean.data_ptr() in self._layers:
                self._layers[mean.data_ptr()].hear(given["input"])
        return func(*args, **kwargs)


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm layer of torch's inside TorchScript."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted and str(getattr(module, "original_name", "")).startswith("BatchNorm")
