"""Snapshot and restoration of a model's state beside its weights, around a pass over data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.models.batches import tensors_of

_INTERNAL = frozenset(vars(nn.Module()))
"""Attributes of every module: mode, weights, buffers, parts and hooks."""


class ModelState:
    """Snapshot of the modes, buffers and attributes of a model's modules.

    A recurrent network may keep its state from batch to batch, a quantizer the ranges that it has
    observed, a codebook its counts. Modes are set as plain attributes. Other effects of a module's
    ``train()`` or ``eval()``, such as merging weights, neither happen nor are undone. Weights are
    not copied. A weight whose data was replaced gets the old data back, but values that were
    written into the old data stay.

    Args:
        model: The model. Tensors that a lazy module does not have yet are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = [_ModuleState(module) for module in model.modules()]

    def restore(self) -> None:
        """Restore modes, buffers and attributes; the buffers are the same tensors as before."""
        for part in self._parts:
            part.restore()


class _ModuleState:
    """Snapshot of the mode, buffers and attributes of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._training = module, module.training
        self._buffers: dict[str, torch.Tensor] = {}
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if not is_lazy(buffer):
                self._buffers[name] = buffer
        self._attributes: dict[str, Any] = {}
        self._contents: dict[str, Any] = {}
        if _has_plain_attributes(module):
            for name, value in vars(module).items():
                if name not in _INTERNAL:
                    self._attributes[name] = value
                    self._contents[name] = _contents_of(value)
        self._weights: list[tuple[torch.Tensor, torch.Tensor]] = []
        for weight in module.parameters(recurse=False):
            if not is_lazy(weight):
                self._weights.append((weight, weight.data))
        self._values: list[_Value] = []
        for tensor in (*self._buffers.values(), *tensors_of(self._attributes)):
            if not isinstance(tensor, nn.Parameter):
                self._values.append(_Value(tensor))

    def restore(self) -> None:
        """Restore the module's mode, buffers, attributes and replaced weights."""
        if isinstance(self._module, torch.jit.ScriptModule):
            self._module.training = self._training
        else:
            vars(self._module)["training"] = self._training
            self._module._buffers.update(self._buffers)
        self._restore_attributes()
        for weight, data in self._weights:
            # A teacher may follow its student in the forward pass, by new weights. Equal values at
            # another address are a moved weight, which may stay.
            if weight.data_ptr() != data.data_ptr() and not torch.equal(weight, data):
                weight.data = data
        for value in self._values:
            value.restore()

    def _restore_attributes(self) -> None:
        """Restore the attributes that held tensors before or hold tensors now.

        Other attributes, such as counters, stay as they are.
        """
        if not _has_plain_attributes(self._module):
            return
        present: MutableMapping[str, Any] = vars(self._module)
        for name in present.keys() - _INTERNAL:
            if name in self._attributes:
                _refill(self._attributes[name], self._contents[name])
                if present[name] is not self._attributes[name] and _holds_tensors(
                    (present[name], self._attributes[name])
                ):
                    present[name] = self._attributes[name]
            elif _holds_tensors(present[name]):
                del present[name]


class _Value:
    """Snapshot of the values of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._copy = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Restore the tensor's shape and values."""
        # Values are compared, not version counters: torch's kernels write into running statistics
        # without a new version of the tensor.
        if not torch.equal(self._tensor, self._copy):
            with torch.no_grad():
                # An observer may have resized its range to fit its input.
                self._tensor.resize_(self._copy.shape).copy_(self._copy)


def stop_observers(model: nn.Module) -> None:
    """Stop the quantizers of quantization-aware training from changing their ranges.

    Evaluation mode does not stop the observers, so scores and statistics would depend on the order
    of the data. An observer that has seen no values yet goes on.
    """
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        switch = buffers.get("observer_enabled")
        lowest = getattr(getattr(module, "activation_post_process", None), "min_val", None)
        if switch is None or not isinstance(lowest, torch.Tensor) or not lowest.numel():
            continue
        if bool(torch.isfinite(lowest).all()):
            with torch.no_grad():
                switch.zero_()


def _has_plain_attributes(module: nn.Module) -> bool:
    """Return True if the pass does not replace a module's attributes.

    A lazy module replaces its attributes in the first forward pass. The attributes of a scripted
    module are not plain Python attributes.
    """
    if isinstance(module, (torch.jit.ScriptModule, nn.modules.lazy.LazyModuleMixin)):
        return False
    return not any(map(is_lazy, module.parameters(recurse=False)))


def _holds_tensors(value: Any) -> bool:
    """Return True if a value is or contains a tensor."""
    return any(True for _ in tensors_of(value))


def _contents_of(value: Any) -> Any:
    """Copy a list or a dict one level deep; return None for any other value."""
    if type(value) in (list, dict):
        return type(value)(value)
    return None


def _refill(container: Any, contents: Iterable[Any] | Mapping[Any, Any] | None) -> None:
    """Refill a list or a dict with the former contents if tensors are or were in it."""
    if contents is None or not _holds_tensors((container, contents)):
        return
    container.clear()
    if isinstance(contents, Mapping):
        container.update(contents)
    else:
        container.extend(contents)
