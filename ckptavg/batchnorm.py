"""Running statistics recomputed for fixed weights.

Averaged weights need statistics of their own (Izmailov et al. 2018, 3.2). What is computed here are
the population statistics of Wu & Johnson 2021 ("Rethinking 'Batch' in BatchNorm", 3): each layer's
mean and variance over all samples, given the layer's inputs, by merging count, mean and sum of
squared deviations batch by batch in float64 (Chan et al. 1979). ``torch.optim.swa_utils.update_bn``
averages the batches' variances instead, which leaves out how the batches' means differ.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset

from ckptavg.batches import Batches, Forward, call, size_of
from ckptavg.errors import BatchNormError, first_few
from ckptavg.loaders import Progress, Subset, counted, moved, open_loader
from ckptavg.processes import Alone, Peers, peers_of_group
from ckptavg.runtime import Runtime, suits_channels_last

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class BatchNormResult:
    """What a pass over the data did.

    Attributes:
        layers: Layers whose statistics were recomputed.
        batches: Batches seen, by this process.
        samples: Samples seen, by this process.
        unreached: Layers that no batch went through; they keep their statistics.
    """

    layers: int
    batches: int
    samples: int
    unreached: tuple[str, ...] = ()


def update_bn(
    model: nn.Module,
    data: Batches | Dataset[Any],
    *,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    amp: str = "off",
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    samples: int | None = None,
    progress: Progress | None = None,
) -> BatchNormResult:
    """Recompute a model's BatchNorm statistics in one pass over data.

    Weights stay as they are; only the BatchNorm layers (and InstanceNorm layers that track
    statistics) are in training mode during the pass. At a layer whose inputs do not depend on the
    batch, the first above all, the result is exact and the same for any split into batches. Deeper
    layers see activations that were normalized batch by batch, as in training, so there one pass is
    not invariant to the batch size. If anything fails, the model is as it was before.

    Under an initialized ``torch.distributed`` process group, each process passes its own part of
    the data, and all end with the statistics of the whole.

    Args:
        model: Any module. With ``device`` it is moved there.
        data: A Dataset, read in seeded random order; or a loader, used as it is.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own where None.
        forward: ``forward(model, batch)``, for batches that are neither a tensor, nor a tuple with
            the input first, nor a dict of keywords.
        exclude: Shell patterns of layers to leave alone (frozen ones).
        amp: ``off``, ``bf16`` or ``fp16``: autocast of the forward pass. Statistics are in float64.
        batch_size: Of a Dataset.
        workers: Processes that load a Dataset.
        seed: Of a Dataset's order.
        samples: How many samples of the data, drawn at random; all of them where None.
        progress: Called with the samples done and their total.

    Raises:
        BatchNormError: There are no data, no such layers, or a layer saw a single value or one that
            is not finite.
    """
    runtime = Runtime.on(device, model, amp=amp, batch_size=batch_size, workers=workers, seed=seed)
    peers = peers_of_group()
    subset = None if samples is None else Subset(samples)
    loader = open_loader(data, runtime, shuffle=True, subset=subset, peers=peers)
    batches = counted(loader, progress or (lambda *_: None), peers)
    return recompute([model], batches, runtime, forward, exclude, peers=peers)[0]


def recompute(
    models: Sequence[nn.Module],
    data: Iterable[Any],
    runtime: Runtime,
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    peers: Peers | None = None,
) -> list[BatchNormResult]:
    """``update_bn`` for several models that share one pass over this process's batches."""
    run = forward or call
    batches, samples = 0, 0
    channels_last = suits_channels_last(models[0], runtime.device)
    with ExitStack() as stack, torch.no_grad():
        passes = [stack.enter_context(_collecting(m, exclude, runtime)) for m in models]
        for batch in moved(data, runtime, channels_last=channels_last):
            with runtime.autocast():
                for one in passes:
                    run(one.model, batch.here)
            batches += 1
            samples += size_of(batch.given)
        return [one.finish(batches, samples, peers or Alone()) for one in passes]


def tracked_layers(model: nn.Module) -> dict[str, _NormBase]:
    """The layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats
    }


def _bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DataParallel.

    Hooks do not reach into compiled code, and replicas would call them from several threads.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _keeps_nothing(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm layer that normalizes each batch by itself."""
    return isinstance(module, _BatchNorm) and not module.track_running_stats


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations a channel, in float64.

    For InstanceNorm, whose running statistics are means over instances, ``spread`` is the sum of
    the instances' variances instead, and one instance counts one.
    """

    count: int
    mean: torch.Tensor
    spread: torch.Tensor
    instances: bool = False

    def merge(self, other: _Moments) -> None:
        """Take in another set of values (Chan et al.)."""
        total = self.count + other.count
        delta = other.mean - self.mean
        if not self.instances:
            self.spread += delta.square() * (self.count * other.count / total)
        self.spread += other.spread
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """What goes into ``running_var``: unbiased, as torch stores it."""
        return self.spread / (self.count if self.instances else self.count - 1)


def _batch_moments(values: torch.Tensor) -> _Moments:
    """Of a batch of shape (N, C, ...), over all but the channels."""
    axes = [axis for axis in range(values.dim()) if axis != 1]
    variance, mean = torch.var_mean(values, axes, correction=0)
    count = values.numel() // values.shape[1]
    return _Moments(count, mean, variance * count)


def _instance_moments(values: torch.Tensor) -> _Moments:
    """Of a batch of shape (N, C, ...), over each instance by itself."""
    variance, mean = torch.var_mean(values.flatten(2), 2, correction=1)
    return _Moments(values.shape[0], mean.mean(0), variance.sum(0), instances=True)


class _Pass:
    """The layers of one model while data goes through it."""

    def __init__(self, model: nn.Module, exclude: Sequence[str], device: torch.device) -> None:
        self.model = _bare(model)
        found = tracked_layers(self.model)
        if not found:
            raise BatchNormError(
                "the model has no BatchNorm layers with running statistics",
                "There is nothing to recompute; use the average as it is.",
            )
        plain = [n for n, m in self.model.named_modules() if _keeps_nothing(m)]
        if plain:
            log.info("layers without running statistics are skipped: %s", first_few(plain))
        self.layers = {
            name: layer
            for name, layer in found.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
        }
        self.moments: dict[str, _Moments] = {}
        # Apple's mps has no float64
        self.where = torch.device("cpu") if device.type == "mps" else device

    def observe(self, name: str) -> Callable[..., None]:
        """A pre-forward hook that takes in a layer's input."""

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            if not given.numel():
                return
            values = given.detach().to(self.where, torch.float64)
            if isinstance(layer, _InstanceNorm):
                if values.dim() == layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
                    values = values.unsqueeze(0)
                moments = _instance_moments(values)
            else:
                moments = _batch_moments(values)
                if moments.count == 1:
                    _normalize_single(layer, given)
            if name in self.moments:
                self.moments[name].merge(moments)
            else:
                self.moments[name] = moments

        return hook

    def finish(self, batches: int, samples: int, peers: Peers) -> BatchNormResult:
        """Merge what the processes saw, check it, and write it into the layers."""
        batches_of_all = self._merge_processes(batches, peers)
        if not batches_of_all:
            raise BatchNormError("the training data is empty", "Check --train-data.")
        reached = {name: m for name, m in self.moments.items() if name in self.layers}
        if self.layers and not reached:
            raise BatchNormError(
                f"no data went through any of {first_few([*self.layers])}",
                "Check that the model's forward uses its BatchNorm layers.",
            )
        for name, moments in reached.items():
            _check(name, moments)
        for name, moments in reached.items():
            layer = self.layers[name]
            if layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.copy_(moments.mean)
                layer.running_var.copy_(moments.variance)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(batches_of_all)
        unreached = tuple(name for name in self.layers if name not in reached)
        if unreached:
            log.warning(
                "no data went through %s: statistics left as they were", first_few([*unreached])
            )
        return BatchNormResult(len(reached), batches, samples, unreached)

    def _merge_processes(self, batches: int, peers: Peers) -> int:
        """Merge the moments of all processes in the order of their ranks."""
        mine = {
            name: (m.count, m.mean.tolist(), m.spread.tolist(), m.instances)
            for name, m in self.moments.items()
        }
        if peers.count == 1:
            return batches
        gathered = peers.gather([batches, mine])
        self.moments = {}
        for _, moments in gathered:
            for name, (count, mean, spread, instances) in moments.items():
                other = _Moments(
                    count,
                    torch.tensor(mean, dtype=torch.float64, device=self.where),
                    torch.tensor(spread, dtype=torch.float64, device=self.where),
                    instances,
                )
                if name in self.moments:
                    self.moments[name].merge(other)
                else:
                    self.moments[name] = other
        return int(sum(count for count, _ in gathered))


@contextmanager
def _collecting(model: nn.Module, exclude: Sequence[str], runtime: Runtime) -> Iterator[_Pass]:
    """Prepare a model for the pass; leave it as it was, new statistics aside, afterwards."""
    one = _Pass(model, exclude, runtime.device)
    runtime.place(model)
    modes = [(module, module.training) for module in model.modules()]
    before = {name: _statistics(layer) for name, layer in one.layers.items()}
    hooks = []
    try:
        model.eval()
        for name, layer in one.layers.items():
            layer.training = True  # not .train(): what a subclass holds, dropout say, stays off
            hooks.append(layer.register_forward_pre_hook(one.observe(name), with_kwargs=True))
            hooks.append(layer.register_forward_hook(_back_to_training, always_call=True))
        yield one
    except BaseException:
        for name, tensors in before.items():
            _restore(one.layers[name], tensors)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    for name in one.layers.keys() - one.moments.keys():
        _restore(one.layers[name], before[name])


def _statistics(layer: _NormBase) -> list[torch.Tensor | None]:
    tensors = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    return [None if t is None or is_lazy(t) else t.clone() for t in tensors]


def _restore(layer: _NormBase, tensors: list[torch.Tensor | None]) -> None:
    now = (layer.running_mean, layer.running_var, layer.num_batches_tracked)
    for tensor, before in zip(now, tensors, strict=True):
        if tensor is not None and before is not None:
            tensor.copy_(before)


def _normalize_single(layer: nn.Module, values: torch.Tensor) -> None:
    """Let a layer take a batch of one value a channel, which torch refuses in training mode.

    Its mean is the value and its variance 0, so it is normalized with just these, in evaluation
    mode, for this one call.
    """
    if isinstance(layer, _NormBase) and layer.running_mean is not None:
        layer.running_mean.copy_(values.detach().reshape(-1))
        layer.running_var.zero_()  # type: ignore[union-attr]
        layer.training = False


def _back_to_training(layer: nn.Module, *_: Any) -> None:
    layer.training = True


def _check(name: str, moments: _Moments) -> None:
    if moments.count < 2 and not moments.instances:
        raise BatchNormError(
            f"the layer {name} saw a single value a channel, which has no variance",
            "Pass more training data.",
        )
    if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.spread).all()):
        raise BatchNormError(
            f"the inputs of the layer {name} are not finite",
            "Look at the data and the weights; --amp off may help.",
        )
