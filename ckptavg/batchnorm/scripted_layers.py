"""BatchNorm layers inside TorchScript, followed through calls of torch's kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ckptavg.batchnorm.hooks import LayerHooks, MomentsSink
from ckptavg.batchnorm.moments import batch_moments


class ScriptedLayerHooks(LayerHooks):
    """Hooks of a scripted BatchNorm layer of torch.

    A traced layer keeps normalizing in the mode in which it was traced.
    """

    def suits_kernel(self) -> bool:
        """Return False: a compiled call cannot be given other buffers."""
        return False

    def attach(self, sink: MomentsSink) -> None:
        """Put the layer in training mode."""
        self._sink = sink
        self.layer.training = True

    def detach(self) -> None:
        """Do nothing: ``ModelState`` restores the layer's mode and buffers with the model's."""

    def observe(self, inputs: torch.Tensor) -> None:
        """Collect the moments of an input of a kernel that updates the layer's statistics."""
        self._add(batch_moments(inputs))


class KernelDispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that passes the kernel inputs of scripted layers on to the layers.

    Args:
        layers: The scripted layers. They must be on the model's device already, since their
            tensors are recognized by address.
    """

    def __init__(self, layers: Iterable[ScriptedLayerHooks]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = {
            layer.layer.running_mean.data_ptr(): layer  # type: ignore[operator]
            for layer in layers
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a kernel, after passing the input on to the scripted layer."""
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        if "running_mean" in names:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            mean = arguments["running_mean"]
            # The kernels name the training flag differently; some only have a momentum.
            trains = arguments.get("training", arguments.get("train", "momentum" in arguments))
            if trains and mean is not None and mean.data_ptr() in self._layers:
                self._layers[mean.data_ptr()].observe(arguments["input"])
        return func(*args, **kwargs)


def is_scripted(module: nn.Module) -> bool:
    """Return True if a module is a BatchNorm layer of torch inside TorchScript."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted and str(getattr(module, "original_name", "")).startswith("BatchNorm")
