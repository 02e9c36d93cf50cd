"""Wrappers around BatchNorm layers that reduce the layers' inputs during a pass over data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from ckptavg.batchnorm.layer_updates import KernelCalls, LayerUpdate, Rule, only_tensor
from ckptavg.batchnorm.moments import Moments, batch_moments, instance_moments, suits_kernel
from ckptavg.batchnorm.norm_layers import statistics_of
from ckptavg.errors import BatchNormError
from ckptavg.models.batches import tensors_of

log = logging.getLogger("ckptavg")
KeepReason = Literal["frozen", "unknown"]
"""Why a layer keeps its statistics: it never updates them in training, or its rule is unknown."""

Names = tuple[str, ...]


class MomentsSink(Protocol):
    """Collector of the moments of layers."""

    def buffers_for(self, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reserve buffers for a kernel's mean and variance.

        Args:
            slot: Number of the layer among the layers with a usable kernel.
            count: Values per channel that the kernel reduces.

        Returns:
            The buffers of the mean and the variance, each (channels,) float32.
        """

    def add(self, layer: str, statistics: Names, moments: Moments) -> None:
        """Add moments for some statistics of a layer.

        Args:
            layer: Name of the layer.
            statistics: Names of the buffers that the moments are for.
            moments: Moments of one call's input.
        """


class LayerHooks:
    """Hooks that intercept the calls of a layer with running statistics during a pass.

    The layer is in training mode only during its own forward pass. Temporary buffers then replace
    the layer's own, so that other readers of the layer's buffers find the old values.

    Args:
        name: Name of the layer in the model.
        layer: The layer to intercept.

    Attributes:
        slot: Number among the layers with a usable kernel; None for a layer without one.
        uses_kernel: True if the kernel's statistics are used; False if the layer's inputs are
            reduced in float64.
        keep_reason: Reason why the statistics stay, where there is a known reason.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.statistics = statistics_of(layer)
        self.slot: int | None = None
        self.uses_kernel = False
        self.keep_reason: KeepReason | None = None
        self._sink: MomentsSink
        self._kind = type(layer)
        self._instance_forward = vars(layer).get("forward")
        self._counter: torch.Tensor | None = None

    def suits_kernel(self) -> bool:
        """Return True if the layer's kernel writes statistics in float32."""
        mean = self.layer._buffers.get("running_mean")
        is_there = mean is not None and not is_lazy(mean) and mean.dtype == torch.float32
        return isinstance(self.layer, _BatchNorm) and is_there

    def attach(self, sink: MomentsSink) -> None:
        """Intercept the layer's calls.

        The instance's ``forward`` is replaced, so that calls from hooks and from other layers'
        forward passes are seen too.
        """
        self._sink, layer = sink, self.layer
        # torch's SyncBatchNorm would wait for other processes in its forward pass.
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = _local_class(type(layer))
        self._forward = layer.forward

        # A batch is passed to a model by the signature of its forward, so the signature must stay.
        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(*args, **kwargs)

        vars(layer)["forward"] = forward
        self.uses_kernel = self.slot is not None

    def detach(self) -> None:
        """Stop intercepting the layer's calls."""
        vars(self.layer).pop("forward", None)
        if self._instance_forward is not None:
            vars(self.layer)["forward"] = self._instance_forward
        if isinstance(self.layer, _LocalSyncBatchNorm):
            self.layer.__class__ = self._kind  # type: ignore[assignment]

    def new_values(self, moments: Mapping[Names, Moments], batches: int) -> dict[str, torch.Tensor]:
        """Compute the new values of the layer's buffers, by buffer name.

        Args:
            moments: Moments by the names of the statistics; empty if no data went through.
            batches: Number of batches that went through the model.
        """
        values: dict[str, torch.Tensor] = {}
        for names, merged in moments.items():
            values[names[0]] = merged.mean
            if len(names) == 2:
                values[names[1]] = merged.variance
        if values and isinstance(self.layer, (_NormBase, torch.jit.ScriptModule)):
            values["num_batches_tracked"] = torch.tensor(batches)
        buffers = dict(self.layer.named_buffers(recurse=False))
        return {name: value for name, value in values.items() if name in buffers}

    def end_training(self) -> None:
        """Run a layer's own switch from training to evaluation mode on the new statistics.

        A layer that normalizes parts of a batch separately may combine their statistics then.
        """
        if not self.layer.training and type(self.layer).train is not nn.Module.train:
            # eval() may do nothing in a layer that is in evaluation mode already.
            vars(self.layer)["training"] = True
            self.layer.eval()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward pass and collect the moments of the input."""
        inputs, *_ = args or (kwargs["input"],)
        return self._collect(inputs, args, kwargs)

    def _collect(self, inputs: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward pass and collect moments of the input.

        The moments come from the kernel where its statistics are accurate enough, otherwise from a
        float64 reduction.
        """
        # An empty batch has no moments. torch itself reports a wrong number of axes.
        if inputs.dim() < 2 or not inputs.numel():
            return self._run(args, kwargs, self._scratch())
        if isinstance(self.layer, _InstanceNorm):
            self._add(instance_moments(_with_batch_axis(self.layer, inputs)))
            return self._run(args, kwargs, self._scratch())
        count = inputs.numel() // inputs.shape[1]
        if self.uses_kernel and self.slot is not None and count > 1 and suits_kernel(inputs):
            return self._run(args, kwargs, self._sink.buffers_for(self.slot, count))
        self._add(batch_moments(inputs))
        if count == 1:
            return self._run_on_single(inputs, args, kwargs)
        return self._run(args, kwargs, self._scratch())

    def _run_on_single(
        self, inputs: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the forward pass on a single value per channel.

        torch refuses a single value in training mode. Its mean is the value and its variance 0, so
        the layer normalizes with these two in evaluation mode.
        """
        mean, variance = self._scratch()
        if mean is not None:
            mean.copy_(inputs.detach().reshape(-1))
        return self._run(args, kwargs, (mean, variance), training=False)

    def _add(self, moments: Moments) -> None:
        """Add moments for all statistics of the layer."""
        self._sink.add(self.name, self.statistics, moments)

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        statistics: tuple[torch.Tensor | None, ...],
        *,
        training: bool = True,
    ) -> Any:
        """Run the forward pass with a temporary mean and variance as running statistics."""
        layer, state = self.layer, vars(self.layer)
        buffers, originals = layer._buffers, dict(layer._buffers)
        momentum = state["momentum"]
        buffers["running_mean"], buffers["running_var"] = statistics
        # A temporary counter, since the layer's own counter must not advance.
        if (counter := originals.get("num_batches_tracked")) is not None:
            if self._counter is None:
                self._counter = torch.zeros_like(counter)
            buffers["num_batches_tracked"] = self._counter
        # Not .train(): the parts of a subclass, dropout for instance, stay in evaluation mode.
        # With a momentum of 1 the kernel writes the batch's own statistics into the buffers.
        state["training"], state["momentum"] = training, 1.0
        try:
            return self._forward(*args, **kwargs)
        finally:
            buffers.update(originals)
            state["training"], state["momentum"] = False, momentum

    def _scratch(self) -> tuple[torch.Tensor | None, ...]:
        """Make a temporary mean and variance that are never read.

        A layer may keep only a mean or only a variance.
        """
        buffers = (self.layer._buffers.get(name) for name in self.statistics)
        return tuple(None if value is None else torch.zeros_like(value) for value in buffers)


class CustomLayerHooks(LayerHooks):
    """Hooks of a layer with a custom forward pass, whose update of statistics is found by trial.

    ``LayerUpdate`` runs a copy of the layer to find the values that the statistics are of.
    """

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__(name, layer)
        self._update: LayerUpdate
        self._rule: Rule | None = None
        self._has_noted_estimate = False

    def attach(self, sink: MomentsSink) -> None:
        """Intercept the layer's calls."""
        super().attach(sink)
        # The kernel is trusted once the first call has shown that it takes the layer's argument.
        self.uses_kernel = False

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward pass and collect moments by the layer's rule."""
        tensor = only_tensor(args, kwargs)
        if tensor is not None and not tensor.numel():
            return self._forward(*args, **kwargs)
        if tensor is not None and self._is_single(tensor):
            self._add(batch_moments(tensor))
            return self._run_on_single(tensor, args, kwargs)
        if self._rule is None:
            self._rule = self._find_rule(args, kwargs)
        if self._rule == "argument" and tensor is not None:
            return self._collect(tensor, args, kwargs)
        if self._rule in {"frozen", "unknown"}:
            return self._forward(*args, **kwargs)
        if self._rule == "kernel":
            return self._observe_kernel(args, kwargs)
        self._use_copy(args, kwargs)
        return self._run_with_copies(args, kwargs)

    def _is_single(self, inputs: torch.Tensor) -> bool:
        """Return True if a BatchNorm layer gets one value per channel."""
        if not isinstance(self.layer, _BatchNorm) or inputs.dim() < 2:
            return False
        return inputs.numel() == inputs.shape[1] == self.layer.num_features

    def _find_rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule:
        """Find by which rule the layer updates its statistics, from the first call."""
        self._update = LayerUpdate(self.layer, self.statistics, self._instance_forward)
        rule = self._update.rule(args, kwargs)
        if rule == "frozen":
            self.keep_reason = "frozen"
        elif rule == "unknown":
            self.keep_reason = "unknown"
            _require_finite(self.name, (args, kwargs))
        self.uses_kernel = rule == "argument" and self.slot is not None
        return rule

    def _observe_kernel(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward pass and reduce the inputs of torch's kernel calls."""
        inputs: list[Moments] = []
        with KernelCalls(self.layer, lambda value: inputs.append(batch_moments(value))):
            outputs = self._run_with_copies(args, kwargs)
        for moments in inputs:
            self._add(moments)
        # The kernel may be called in some forward passes only.
        if not inputs:
            self._use_copy(args, kwargs)
        return outputs

    def _use_copy(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Collect the moments that a copy of the layer computes from the arguments."""
        for names, moments in self._update.moments(args, kwargs).items():
            self._sink.add(self.name, names, moments)
        if self._update.estimates and not self._has_noted_estimate:
            self._has_noted_estimate = True
            log.info(
                "the number of values in the statistics of %s is estimated from the input's size",
                self.name,
            )

    def _run_with_copies(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the forward pass in training mode on copies of the buffers."""
        buffers, state = self.layer._buffers, vars(self.layer)
        originals = dict(buffers)
        for name, value in originals.items():
            if value is not None:
                buffers[name] = value.clone()
        state["training"] = True
        try:
            return self._forward(*args, **kwargs)
        finally:
            buffers.update(originals)
            state["training"] = False


def hook_layer(name: str, layer: nn.Module) -> LayerHooks:
    """Make the hooks for the kind of a layer's forward pass: torch's own, or custom."""
    if _forward_is_torchs(layer):
        return LayerHooks(name, layer)
    return CustomLayerHooks(name, layer)


def _forward_is_torchs(layer: nn.Module) -> bool:
    """Return True if a layer's forward pass is that of torch's own BatchNorm or InstanceNorm."""
    torch_forwards = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)
    return "forward" not in vars(layer) and type(layer).forward in torch_forwards


class _LocalSyncBatchNorm(nn.SyncBatchNorm):
    """A SyncBatchNorm layer that does not communicate with other processes.

    Other processes may have fewer batches, and the layer would wait for them forever.
    """

    forward = _BatchNorm.forward


def _local_class(kind: type[nn.SyncBatchNorm]) -> type[nn.SyncBatchNorm]:
    """Derive a class of SyncBatchNorm layer with the forward pass of ``_LocalSyncBatchNorm``."""
    if kind is nn.SyncBatchNorm:
        return _LocalSyncBatchNorm
    return type(kind.__name__, (kind, _LocalSyncBatchNorm), {})


def _with_batch_axis(layer: _InstanceNorm, values: torch.Tensor) -> torch.Tensor:
    """Add the batch axis to a single sample, for an input of shape (N, C, ...)."""
    if values.dim() == layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
        return values.unsqueeze(0)
    return values


def _require_finite(name: str, arguments: Any) -> None:
    """Raise an error if a call's arguments are not finite.

    Values that are not finite explain why the layer's rule cannot be found.

    Raises:
        BatchNormError: A tensor in the arguments is not finite.
    """
    if all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(list(arguments))):
        return
    raise BatchNormError(
        f"the inputs of the layer {name} are not finite", "Look at the data and the weights."
    )
