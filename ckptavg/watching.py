"""A BatchNorm layer while data goes through its model: who reads its inputs, and how."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from ckptavg.moments import Moments, agree, batch_moments, instance_moments, suits_kernel

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Sink(Protocol):
    """What a layer's moments go to."""

    def land(self, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a kernel is to leave mean and variance of so many values a channel."""

    def add(self, name: str, moments: Moments) -> None:
        """Take in what a layer's input was reduced to."""


class WatchedLayer:
    """A layer during a pass, with the hooks that take in what goes through it.

    Its own buffers are held back meanwhile, so that nothing can happen to them.

    Args:
        name: Of the layer.
        layer: It.

    Attributes:
        slot: Its number among the layers whose kernels can be relied on; None for another.
        trusted: Whether its kernel is relied on; else its inputs are reduced in float64.
    """

    def __init__(self, name: str, layer: _NormBase) -> None:
        self.name, self.layer = name, layer
        self.slot: int | None = None
        self.trusted = False
        self._sink: Sink
        self._own = {
            key: value
            for key in _STATISTICS
            if (value := layer._buffers.get(key)) is not None and not is_lazy(value)
        }
        self._aside = {key: value.clone() for key, value in self._own.items()}
        self._kind, self._momentum = type(layer), layer.momentum
        self._proof: tuple[Moments, torch.Tensor, torch.Tensor] | None = None
        self._tried = False
        self._hooks: list[RemovableHandle] = []

    def suits_kernel(self) -> bool:
        """Whether its kernel works in float32 and leaves statistics to be read."""
        mean = self._own.get("running_mean")
        is_batchnorm = isinstance(self.layer, _BatchNorm) and "running_var" in self._own
        return is_batchnorm and mean is not None and mean.dtype == torch.float32

    def enter(self, sink: Sink) -> None:
        """Let the layer's kernel leave each batch's own statistics, and hear of its calls."""
        self._sink, layer = sink, self.layer
        layer.training = True  # not .train(): what a subclass holds, dropout say, stays off
        layer.momentum = 1.0
        layer._buffers.update(self._aside)
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = _apart(type(layer))
        self.trusted = self._tried = self.slot is not None and _forward_is_torchs(layer)
        self._hooks = [layer.register_forward_pre_hook(self._before_call, with_kwargs=True)]
        if self.slot is not None and not self.trusted:
            self._hooks.append(layer.register_forward_hook(self._after_call))

    def leave(self) -> None:
        """Undo what ``enter`` did."""
        for hook in self._hooks:
            hook.remove()
        self.layer._buffers.update(self._own)
        self.layer.momentum = self._momentum
        if isinstance(self.layer, _Apart):
            self.layer.__class__ = self._kind  # type: ignore[assignment]

    def write(self, moments: Moments, batches: int) -> None:
        """Give the layer its new statistics."""
        layer = self.layer
        if layer.running_mean is not None and layer.running_var is not None:
            layer.running_mean.copy_(moments.mean)
            layer.running_var.copy_(moments.variance)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)

    def _before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs["input"]
        self.layer.training = True
        if given.dim() < 2 or not given.numel():
            self.layer._buffers.update(self._aside)
            return
        count = given.numel() // given.shape[1]
        suits = count > 1 and suits_kernel(given)
        if suits and self.trusted and self.slot is not None:
            self._bind(*self._sink.land(self.slot, count))
        else:
            self._reduce(given, count, suits=suits)

    def _reduce(self, given: torch.Tensor, count: int, *, suits: bool) -> None:
        """Take in an input by itself; note what a kernel that is yet to be tried should find."""
        self.layer._buffers.update(self._aside)
        if isinstance(self.layer, _InstanceNorm):
            if given.dim() == self.layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
                given = given.unsqueeze(0)
            self._sink.add(self.name, instance_moments(given))
            return
        moments = batch_moments(given)
        self._sink.add(self.name, moments)
        if count == 1:
            _normalize_single(self.layer, given)
        elif suits and self.slot is not None and not self._tried:
            mean, variance = (torch.zeros_like(self._aside[key]) for key in _STATISTICS[:2])
            self._bind(mean, variance)
            self._proof = moments, mean, variance

    def _bind(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        buffers = self.layer._buffers
        buffers["running_mean"], buffers["running_var"] = mean, variance

    def _after_call(self, *_: Any) -> None:
        """Rely on the kernel from now on if it found what is right.

        A subclass may do what it likes in its forward pass: leave the momentum out, say.
        """
        if self._proof is not None:
            self.trusted = agree(*self._proof, self.layer.eps)
            self._proof, self._tried = None, True


def _forward_is_torchs(layer: nn.Module) -> bool:
    """Whether a layer's forward pass is that of torch's own BatchNorm."""
    return "forward" not in vars(layer) and type(layer).forward is _BatchNorm.forward


class _Apart(nn.SyncBatchNorm):
    """A SyncBatchNorm layer that keeps to its process.

    Others may have fewer batches, and would be waited for in vain.
    """

    forward = _BatchNorm.forward


def _apart(kind: type[nn.SyncBatchNorm]) -> type[nn.SyncBatchNorm]:
    """A kind of SyncBatchNorm layer with ``_Apart`` in the place of torch's own."""
    return _Apart if kind is nn.SyncBatchNorm else type(kind.__name__, (kind, _Apart), {})


def _normalize_single(layer: nn.Module, values: torch.Tensor) -> None:
    """Let a layer take a batch of one value a channel, which torch refuses in training mode.

    Its mean is the value and its variance 0, so it is normalized with just these, in evaluation
    mode, until its next call.
    """
    if isinstance(layer, _NormBase) and layer.running_mean is not None:
        layer.running_mean.copy_(values.detach().reshape(-1))
        layer.running_var.zero_()  # type: ignore[union-attr]
        layer.training = False
