"""Layers of a model that keep running statistics."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ckptavg.formats.statistics_names import layer_statistics
from ckptavg.models.hollow import hollow_copy

_VARIANCE = re.compile(r"(?:[a-z]*_)*(?:var|variance|sigma2)(?:_[a-z]+)?")


def tracked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers that keep running statistics, by name.

    These are torch's own layers, their subclasses, and any other module with buffers for running
    statistics, under names such as ``running_mean`` and ``moving_variance``.
    """
    return {name: module for name, module in model.named_modules() if statistics_of(module)}


def statistics_of(module: nn.Module) -> tuple[str, ...]:
    """List the names of a module's running-statistics buffers, the mean first."""
    if isinstance(module, _NormBase):
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats:
            return ("running_mean", "running_var")
        return ()
    buffers: list[str] = []
    for name, value in module.named_buffers(recurse=False):
        if not is_lazy(value) and (value.is_floating_point() or value.is_complex()):
            buffers.append(name)
    return tuple(name for name in _named_statistics(module, buffers) if name in buffers)


def unreachable_layers(model: nn.Module) -> list[str]:
    """List the names of layers whose running statistics are not buffers."""
    unreachable: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) or statistics_of(module):
            continue
        if _named_statistics(module):
            unreachable.append(name)
    return unreachable


def _named_statistics(module: nn.Module, buffers: Sequence[str] = ()) -> tuple[str, ...]:
    """List a module's running statistics by the names of weights and buffers."""
    weights = [name for name, _ in module.named_parameters(recurse=False)]
    return layer_statistics([*buffers, *weights]).get("", ())


def never_trained_layers(model: nn.Module) -> set[str]:
    """List the names of layers that a model's own ``train()`` leaves in evaluation mode.

    A ``train()`` of this kind keeps the statistics of a pretrained part. Examples are ``norm_eval``
    of mmdetection's backbones, and ``super().train(mode)`` followed by ``self.stem.eval()``. The
    method is tried on a copy, since it may do more, such as splitting merged weights.
    """
    if all(map(_trains_by_default, model.modules())):
        return set()
    modes = {module: module.training for module in model.modules()}
    try:
        trained = hollow_copy(model)
        # The result is not used: a user's train() may return None.
        trained.train()
        return {name for name, layer in tracked_layers(trained).items() if not layer.training}
    # A user's module may raise any error on a copy without values.
    except Exception:
        return set()
    finally:
        for module, mode in modes.items():
            # The copy shares objects with the model, through which train() may have changed a mode.
            if module.training != mode:
                module.training = mode


def _trains_by_default(module: nn.Module) -> bool:
    """Return True if a module's ``train()`` is torch's own."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    return "train" not in vars(module) and type(module).train is nn.Module.train


def is_pair(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Return True if statistics are a mean and a variance per channel, which merge exactly."""
    if len(names) != 2 or not _VARIANCE.fullmatch(names[1]):
        return False
    mean, variance = module._buffers.get(names[0]), module._buffers.get(names[1])
    if mean is None or variance is None or mean.is_complex() or variance.is_complex():
        return False
    return mean.shape == variance.shape


def keeps_nothing(module: nn.Module) -> bool:
    """Return True if a module is a BatchNorm layer without running statistics."""
    return isinstance(module, _BatchNorm) and not module.track_running_stats


def is_hookable(module: nn.Module) -> bool:
    """Return True if a layer's calls can be followed from Python.

    A module that is not torch's own is not followed if it contains another layer with running
    statistics.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, _NormBase):
        return True
    # A module that is not torch's own may wait for other processes, which have other batches.
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if has_group and torch.distributed.get_world_size() > 1:
        return False
    return tracked_layers(module).keys() <= {""}
