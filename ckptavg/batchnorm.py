"""Running statistics recomputed for fixed weights.

Averaged weights need statistics of their own (Izmailov et al. 2018, 3.2). What is computed here are
the population statistics of Wu & Johnson 2021 ("Rethinking 'Batch' in BatchNorm", 3): each layer's
mean and variance over all samples, given the layer's inputs, by merging count, mean and sum of
squared deviations batch by batch in float64 (Chan et al. 1979). ``torch.optim.swa_utils.update_bn``
averages the batches' variances instead, which leaves out how the batches' means differ.

A batch's own mean and variance are those that the layer's kernel computes anyway to normalize it.
Where they may be off by more than ``moments.TOLERANCE``, the batch goes through the model once more
and that layer's inputs are reduced in float64, from then on too.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.data import Dataset

from ckptavg import heap
from ckptavg.batches import Batches, Forward, size_of
from ckptavg.calling import call
from ckptavg.channels import Channels
from ckptavg.errors import BatchNormError, first_few
from ckptavg.loaders import Subset, as_subset, counted, moved, open_loader
from ckptavg.loading import undistributed
from ckptavg.moments import TOLERANCE, Doubt, KernelMoments, Landing, Moments
from ckptavg.processes import Alone, Peers, peers_of_group
from ckptavg.progress import ProgressLike, open_phase
from ckptavg.running_statistics import match_layers
from ckptavg.runtime import Runtime
from ckptavg.watching import WatchedLayer

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class BatchNormResult:
    """What a pass over the data did.

    Attributes:
        layers: Layers whose statistics were recomputed.
        batches: Batches seen, by this process.
        samples: Samples seen, by this process.
        unreached: Layers that no batch went through; they keep their statistics.
        written: The entries of the model's state dict that were recomputed: means and variances,
            under each of the names of a layer that has several.
    """

    layers: int
    batches: int
    samples: int
    unreached: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()


def update_bn(
    model: nn.Module,
    data: Batches | Dataset[Any],
    *,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    amp: str = "off",
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    bn_samples: int | Subset | None = None,
    progress: ProgressLike = None,
) -> BatchNormResult:
    """Recompute a model's BatchNorm statistics in one pass over data.

    Weights stay as they are; only the BatchNorm layers (and InstanceNorm layers that track
    statistics) are in training mode during the pass. At a layer whose inputs do not depend on the
    batch, the first above all, the result is the same for any split into batches: a batch's own
    mean and variance are exact up to ``moments.TOLERANCE``, and merged in float64. Deeper layers
    see activations that were normalized batch by batch, as in training, so there one pass is not
    invariant to the batch size. If anything fails, the model is as it was before.

    A batch may go through the model a second time, so its forward pass must not change its input.

    Under an initialized ``torch.distributed`` process group, each process passes its own part of
    the data, and all end with the statistics of the whole.

    Args:
        model: Any module. With ``device`` it is moved there; on CUDA its convolutions' weights come
            to lie in memory as channels_last.
        data: A Dataset, read in seeded random order; or a loader, used as it is.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own where None.
        forward: ``forward(model, batch)``, for batches of which the signature of the model's own
            forward does not tell what it gets (``ckptavg.calling``).
        exclude: Shell patterns of layers to leave alone (frozen ones), by their modules' names.
        amp: ``off``, ``bf16`` or ``fp16``: autocast of the forward pass.
        batch_size: Of a Dataset.
        workers: Processes that load a Dataset.
        seed: Of a Dataset's order.
        bn_samples: How many samples of the data, drawn at random, or a ``ckptavg.loaders.Subset``,
            which may be stratified; all of them where None.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in samples;
            see ``ckptavg.progress``.

    Raises:
        BatchNormError: There are no data, no such layers, or a layer saw a single value or one that
            is not finite.
        UsageError: A pattern of ``exclude`` matches no layer.
    """
    layers = tracked_layers(_bare(model))
    excluded = match_layers(exclude, layers) if layers else set()
    runtime = Runtime.on(device, model, amp=amp, batch_size=batch_size, workers=workers, seed=seed)
    peers = peers_of_group()
    loader = open_loader(data, runtime, shuffle=True, subset=as_subset(bn_samples), peers=peers)
    with open_phase(progress, "BatchNorm", "samples") as told, heap.kept(runtime.device):
        batches = counted(loader, told or (lambda *_: None), peers)
        return recompute([model], batches, runtime, forward, [excluded], peers)[0]


def recompute(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    runtime: Runtime,
    forward: Forward | None = None,
    exclude: Sequence[Collection[str]] | None = None,
    peers: Peers | None = None,
) -> list[BatchNormResult]:
    """``update_bn`` for several models that share one pass over the data.

    A batch may go through a model twice, so the forward pass must not change it in place.

    Args:
        models: Modules of one kind; they are moved to the runtime's device.
        batches: This process's part of the data.
        runtime: Where and how the models run.
        forward: ``forward(model, batch)`` for unusual batches.
        exclude: For each model, names of the layers to leave alone; none where None.
        peers: The processes that share the data; all end with the statistics of the whole.

    Raises:
        BatchNormError: As for ``update_bn``.
    """
    seen, samples = 0, 0
    channels = Channels(models[0], runtime.device, scoring=False)
    with ExitStack() as stack, torch.no_grad():
        passes = [
            stack.enter_context(_collecting(model, excluded, channels))
            for model, excluded in zip(models, exclude or [()] * len(models), strict=True)
        ]
        for batch in moved(batches, runtime.device):
            here = channels.arrange(batch.here)
            through = _Through(forward or call, runtime, channels, here)
            for one in passes:
                one.take(through)
            seen += 1
            samples += size_of(batch.given)
        of_all = _finish(passes, seen, peers or Alone())
    return [one.write(seen, samples, of_all) for one in passes]


def tracked_layers(model: nn.Module) -> dict[str, _NormBase]:
    """The layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats
    }


def _bare(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel.

    Hooks do not reach into compiled code, and replicas would call them from several threads.
    """
    while True:
        model = undistributed(model)
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _keeps_nothing(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm layer that normalizes each batch by itself."""
    return isinstance(module, _BatchNorm) and not module.track_running_stats


@dataclass(frozen=True)
class _Through:
    """Takes a model through a batch."""

    forward: Forward
    runtime: Runtime
    channels: Channels
    batch: Any

    def __call__(self, model: nn.Module, begin: Callable[[], None]) -> None:
        """Do it; ``begin`` is called first, and again if it starts anew."""

        def attempt(batch: Any) -> None:
            begin()
            with self.runtime.autocast():
                self.forward(model, batch)

        self.channels.run(attempt, model, self.batch)


@dataclass
class _Seen:
    """What a batch left behind in a model, until that is known to be accurate.

    Attributes:
        landings: What the kernels left; a layer's second call has the second one, and so on.
        moments: What was reduced in float64, in the order of the calls.
        doubt: Which of the kernels' statistics may be off.
    """

    through: _Through
    landings: list[Landing] = field(default_factory=list)
    moments: list[tuple[str, Moments]] = field(default_factory=list)
    doubt: Doubt = field(init=False)


class _Collector:
    """Takes in what the layers of a model see, batch by batch.

    It does not know the layers, so that a model is gone as soon as nobody else holds it.
    """

    def __init__(self, kernels: KernelMoments) -> None:
        self.kernels = kernels
        self._seen: _Seen

    def see(self, model: nn.Module, through: _Through) -> _Seen:
        """Take a model through a batch."""

        def begin() -> None:
            self._seen = _Seen(through)

        through(model, begin)
        self._seen.doubt = self.kernels.doubt(self._seen.landings)
        return self._seen

    def land(self, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a kernel is to leave mean and variance of so many values a channel."""
        landings = self._seen.landings
        landing = next((one for one in landings if not one.counts[slot]), None)
        if landing is None:
            landing = self.kernels.landing()
            landings.append(landing)
        landing.counts[slot] = count
        return landing.mean[slot], landing.variance[slot]

    def add(self, name: str, moments: Moments) -> None:
        """Take in what a layer's input was reduced to."""
        self._seen.moments.append((name, moments))


class _Pass:
    """The layers of one model while data goes through it."""

    def __init__(self, model: nn.Module, exclude: Collection[str], device: torch.device) -> None:
        self._given, self.model = model, _bare(model)
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
            name: WatchedLayer(name, layer) for name, layer in found.items() if name not in exclude
        }
        self.moments: dict[str, Moments] = {}
        self._slots = [one for one in self.layers.values() if one.suits_kernel()]
        for slot, one in enumerate(self._slots):
            one.slot = slot
        norms = [one.layer for one in self._slots]
        sizes, eps = [n.num_features for n in norms], [n.eps for n in norms]
        self.collector = _Collector(KernelMoments(sizes, eps, device))
        self._waiting: deque[_Seen] = deque()
        self._late = 1 if device.type == "cuda" else 0

    def take(self, through: _Through) -> None:
        """Take the model through a batch, and take in what its layers saw.

        A GPU is asked about a batch when it has the next one to work on, so that it never waits.
        """
        self._waiting.append(self.collector.see(self.model, through))
        if len(self._waiting) > self._late:
            self._settle()

    def end(self) -> None:
        """Settle what is left, and put together what each layer saw."""
        while self._waiting:
            self._settle()
        self.moments = {name: moments.on_cpu() for name, moments in self.moments.items()}
        for one, moments in zip(self._slots, self.collector.kernels.moments(), strict=True):
            if moments is not None:
                self._merge(one.name, moments)

    def replace(self, parts: Iterable[Mapping[str, Any]]) -> None:
        """Take over what all processes saw, in place of what this one did."""
        self.moments = {}
        for part in parts:
            for name, values in part.items():
                self._merge(name, Moments.of_plain(values))

    def check(self) -> None:
        """Raise an error unless there are statistics of what data went through.

        Raises:
            BatchNormError: No data did, or they have none.
        """
        if self.layers and not self.moments:
            raise BatchNormError(
                f"no data went through any of {first_few([*self.layers])}",
                "Check that the model's forward uses its BatchNorm layers.",
            )
        for name in self.layers:
            if name in self.moments:
                _check(name, self.moments[name])

    def write(self, batches: int, samples: int, batches_of_all: int) -> BatchNormResult:
        """Give the layers their new statistics."""
        for name, moments in self.moments.items():
            self.layers[name].write(moments, batches_of_all)
        unreached = tuple(name for name in self.layers if name not in self.moments)
        if unreached:
            log.warning(
                "no data went through %s: statistics left as they were", first_few([*unreached])
            )
        return BatchNormResult(len(self.moments), batches, samples, unreached, self._written())

    def _written(self) -> frozenset[str]:
        """Names of the statistics that layers were given, as in the given model's state dict."""
        written = {self.layers[name].layer for name in self.moments}
        names: list[str] = []
        for prefix, module in self._given.named_modules(remove_duplicate=False):
            if module in written:
                names += [f"{prefix}.{key}".lstrip(".") for key in ("running_mean", "running_var")]
        return frozenset(names)

    def _settle(self) -> None:
        """Merge the oldest batch once nothing about it is in doubt.

        Where something is, it goes through the model again, which does the same as before: in
        training mode a layer does not heed its running statistics.
        """
        while doubted := self._waiting[0].doubt.layers():
            for slot in doubted:
                self._slots[slot].trusted = False
            log.info(
                "what the kernels find at %s may be off by more than %g: reduced in float64",
                first_few([self._slots[slot].name for slot in doubted]),
                TOLERANCE,
            )
            self._waiting[0] = self.collector.see(self.model, self._waiting[0].through)
        seen = self._waiting.popleft()
        for landing in seen.landings:
            self.collector.kernels.merge(landing)
        for name, moments in seen.moments:
            self._merge(name, moments)

    def _merge(self, name: str, moments: Moments) -> None:
        if name in self.moments:
            self.moments[name].merge(moments)
        else:
            self.moments[name] = moments


@contextmanager
def _collecting(model: nn.Module, exclude: Collection[str], channels: Channels) -> Iterator[_Pass]:
    """Prepare a model for the pass, and leave it as it was afterwards."""
    channels.place(model)
    one = _Pass(model, exclude, channels.device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for layer in one.layers.values():
            layer.enter(one.collector)
        yield one
    finally:
        for layer in one.layers.values():
            layer.leave()
        for module, mode in modes:
            module.training = mode


def _finish(passes: Sequence[_Pass], batches: int, peers: Peers) -> int:
    """Merge what all processes saw, in the order of their ranks, and check it.

    Returns:
        The batches that all of them saw.
    """
    for one in passes:
        one.end()
    if peers.count > 1:
        mine = [{name: m.plain() for name, m in one.moments.items()} for one in passes]
        parts = peers.gather([batches, mine])
        batches = sum(count for count, _ in parts)
        for i, one in enumerate(passes):
            one.replace(found[i] for _, found in parts)
    if not batches:
        raise BatchNormError("the training data is empty", "Check --train-data.")
    for one in passes:
        one.check()
    return batches


def _check(name: str, moments: Moments) -> None:
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
