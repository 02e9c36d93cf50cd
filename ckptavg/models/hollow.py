"""Copies of a model without values, for trials that would change the model."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

_COPIED = (nn.Module, torch.Tensor, types.MethodType)


def real_tensors(model: nn.Module) -> list[torch.Tensor]:
    """List a model's weights and buffers, without the uninitialized tensors of lazy modules."""
    return [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]


def stand_ins(tensors: Iterable[torch.Tensor]) -> dict[int, Any]:
    """Map each tensor's ``id`` to a tensor without values, as a memo for ``copy.deepcopy``."""
    memo: dict[int, Any] = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_weight = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if is_weight else empty
    return memo


def hollow_copy(model: nn.Module) -> nn.Module:
    """Copy a model without values.

    All other objects that the modules refer to, such as a trainer, are shared.
    """
    # An object in the memo is not copied by deepcopy. Containers are searched, not shared.
    memo = stand_ins(real_tensors(model))
    waiting: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    visited: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, _COPIED) or id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, (dict, list, tuple, set)):
            waiting += value.values() if isinstance(value, dict) else value
        else:
            memo[id(value)] = value
    return copy.deepcopy(model, memo)
