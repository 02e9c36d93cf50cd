"""Copies of models and layers for trials that would change the original."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

TensorConversion = Callable[[torch.Tensor], torch.Tensor]
_COPIED = (nn.Module, torch.Tensor, types.MethodType)


def real_tensors(model: nn.Module) -> list[torch.Tensor]:
    """List a model's weights and buffers, without the uninitialized tensors of lazy modules."""
    return [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]


def stand_ins(tensors: Iterable[torch.Tensor]) -> dict[int, Any]:
    """Map each tensor's ``id`` to a tensor without values, as a memo for ``copy.deepcopy``."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=False)
        memo[id(tensor)] = empty
    return memo


def hollow_copy(model: nn.Module) -> nn.Module:
    """Copy a model without values.

    All other objects that the modules refer to, such as a trainer, are shared.
    """
    # An object in the memo is not copied by deepcopy. Containers are searched, not shared.
    memo = stand_ins(real_tensors(model))
    waiting: list[Any] = []
    for module in model.modules():
        waiting += vars(module).values()
    visited: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, _COPIED) or id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        else:
            memo[id(value)] = value
    return copy.deepcopy(model, memo)


def copy_layer(layer: nn.Module, convert: TensorConversion, forward: Any = None) -> nn.Module:
    """Copy a layer with converted tensors, in training mode, without hooks.

    All other attributes are shared with the layer: they may refer to its model or a trainer.

    Args:
        layer: The layer.
        convert: Converts a tensor to a new tensor.
        forward: The forward pass that the layer has in place of its class's.
    """
    # Not by __init__, whose arguments are unknown.
    copied: nn.Module = layer.__new__(type(layer))
    state = vars(copied)
    state.update(vars(nn.Module()) | {"training": True})
    for name, value in vars(layer).items():
        if name in state or name == "forward":
            continue
        state[name] = value
        if isinstance(value, torch.Tensor):
            state[name] = convert(value)
    copied._parameters.update(dict.fromkeys(layer._parameters))
    copied._buffers.update(dict.fromkeys(layer._buffers))
    copied._modules.update(dict.fromkeys(layer._modules))
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            copied._parameters[name] = nn.Parameter(convert(parameter), requires_grad=False)
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            copied._buffers[name] = convert(buffer)
    for name, part in layer._modules.items():
        if part is not None:
            copied._modules[name] = copy_layer(part, convert)
    for part in copied.modules():
        # Parts of the layer, dropout for instance, stay in evaluation mode.
        vars(part)["training"] = part is copied
    # A forward that is bound to the layer must run on the copy.
    if isinstance(forward, types.MethodType) and forward.__self__ is layer:
        forward = types.MethodType(forward.__func__, copied)
    if forward is not None:
        state["forward"] = forward
    return copied
