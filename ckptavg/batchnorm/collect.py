"""Collection of layer moments of one model during a pass, and new statistics from the moments."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckptavg.batchnorm.buffer_updates import BufferUpdate
from ckptavg.batchnorm.hooks import KeepReason, LayerHooks, Names, hook_layer
from ckptavg.batchnorm.model_state import ModelState, stop_observers
from ckptavg.batchnorm.moments import (
    TOLERANCE,
    AccuracyCheck,
    KernelBuffers,
    KernelStatistics,
    Moments,
    require_finite,
    require_several,
)
from ckptavg.batchnorm.norm_layers import is_hookable, keeps_nothing, tracked_layers
from ckptavg.batchnorm.scripted_layers import KernelDispatch, ScriptedLayerHooks, is_scripted
from ckptavg.distributed.peers import Peers
from ckptavg.errors import BatchNormError, first_few
from ckptavg.models.batches import Forward
from ckptavg.models.load import bare_module
from ckptavg.models.memory_format import MemoryFormat
from ckptavg.models.runtime import Runtime
from ckptavg.models.shared_context import SharedContext

log = logging.getLogger("ckptavg")
Key = tuple[str, Names]
"""Name of a layer, and names of the layer's statistics that some moments are for."""

_MESSAGES: Mapping[KeepReason | None, tuple[int, str]] = {
    None: (logging.WARNING, "no data went through %s: statistics left as they were"),
    "frozen": (logging.INFO, "statistics that do not change in training are kept: %s"),
    "unknown": (
        logging.WARNING,
        "it is not known how layers update their statistics, which are left as they were: %s",
    ),
}
"""Level and text of the message on layers that were not recomputed, by reason."""


@dataclass(frozen=True)
class BatchNormResult:
    """Result of a pass over the data.

    Attributes:
        layers: Number of layers whose statistics were recomputed.
        batches: Batches that this process passed.
        samples: Samples that this process passed.
        unreached: Layers that no batch went through. Their statistics are kept.
        written: Entries of the model's state dict that were recomputed: means and variances. A
            layer with several names has an entry under each name.
        frozen: Layers that do not change their statistics in training. Their statistics are kept.
        unknown: Layers whose update rule is unknown. Their statistics are kept.
    """

    layers: int
    batches: int
    samples: int
    unreached: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()
    frozen: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Format the result in one line of bounded length, however many layers there are."""
        parts = [f"layers={self.layers}, batches={self.batches}, samples={self.samples}"]
        for name in ("unreached", "frozen", "unknown"):
            if layers := getattr(self, name):
                parts.append(f"{name}: {first_few(list(layers))}")
        return f"<BatchNormResult {'; '.join(parts)}>"


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of one batch, already on the device, for any of the models."""

    forward: Forward
    runtime: Runtime
    memory_format: MemoryFormat
    batch: Any

    def __call__(self, model: nn.Module, begin: Callable[[], None]) -> None:
        """Run a model on the batch, after calling ``begin`` at each attempt."""

        def attempt(batch: Any) -> None:
            begin()
            with self.runtime.autocast():
                self.forward(model, batch)

        self.memory_format.run(attempt, model, self.batch)


@dataclass
class _BatchStatistics:
    """Moments of a batch before merging, until the accuracy is known.

    Attributes:
        forward_pass: The forward pass, kept so that the batch can be run again.
        buffers: Buffers with the kernels' statistics. The nth call of a layer has the nth buffers.
        moments: Moments that were reduced in float64, in the order of the calls.
        accuracy: Check for kernels' statistics that may be off.
    """

    forward_pass: ForwardPass
    buffers: list[KernelBuffers] = field(default_factory=list)
    moments: list[tuple[Key, Moments]] = field(default_factory=list)
    accuracy: AccuracyCheck = field(init=False)


class _StatisticsCollector:
    """A collector of the moments of a model's layers, batch by batch.

    The collector holds no reference to layers, so that a model is freed with its last user.
    """

    def __init__(self, kernels: KernelStatistics) -> None:
        self.kernels = kernels
        self._batch: _BatchStatistics

    def run(self, model: nn.Module, forward_pass: ForwardPass) -> _BatchStatistics:
        """Run a model on a batch and return the moments of the batch."""

        def begin() -> None:
            """Discard the moments of an earlier attempt."""
            self._batch = _BatchStatistics(forward_pass)

        forward_pass(model, begin)
        self._batch.accuracy = self.kernels.check_accuracy(self._batch.buffers)
        return self._batch

    def buffers_for(self, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reserve a kernel's buffers, as ``MomentsSink.buffers_for`` describes."""
        buffers = self._unwritten_buffers(slot)
        buffers.counts[slot] = count
        return buffers.mean[slot], buffers.variance[slot]

    def _unwritten_buffers(self, slot: int) -> KernelBuffers:
        """Return buffers that the layer has not written in this batch."""
        for buffers in self._batch.buffers:
            if not buffers.counts[slot]:
                return buffers
        # A layer that is called several times per batch needs buffers for each call.
        buffers = self.kernels.take_buffers()
        self._batch.buffers.append(buffers)
        return buffers

    def add(self, layer: str, statistics: Names, moments: Moments) -> None:
        """Add moments for some statistics of a layer, as ``MomentsSink.add`` describes.

        Args:
            layer: Name of the layer.
            statistics: Names of the buffers that the moments are for.
            moments: Moments of one call's input.
        """
        self._batch.moments.append(((layer, statistics), moments))


class ModelPass:
    """A pass over data of one model, with the moments of the model's layers.

    Args:
        model: The model; the layers inside its wrappers get hooks.
        exclude: Names of layers that keep their statistics.
        device: Device of the model.
    """

    def __init__(self, model: nn.Module, exclude: Collection[str], device: torch.device) -> None:
        self._outer_model, self.model = model, bare_module(model)
        self.layers: dict[str, LayerHooks] = {}
        self._scripted: list[ScriptedLayerHooks] = []
        self._add_hooks(exclude)
        self.moments: dict[Key, Moments] = {}
        self._slots = [layer for layer in self.layers.values() if layer.suits_kernel()]
        sizes: list[int] = []
        eps: list[float] = []
        for slot, layer in enumerate(self._slots):
            layer.slot = slot
            norm: Any = layer.layer
            sizes.append(norm.num_features)
            eps.append(norm.eps)
        self.collector = _StatisticsCollector(KernelStatistics(sizes, eps, device))
        self._waiting: deque[_BatchStatistics] = deque()
        # On CUDA, batches are checked one batch late, as ``take`` explains.
        self._late = int(device.type == "cuda")

    def _add_hooks(self, exclude: Collection[str]) -> None:
        """Make hooks for the layers, and log the layers without running statistics."""
        untracked = [name for name, layer in self.model.named_modules() if keeps_nothing(layer)]
        if untracked:
            log.info("layers without running statistics are skipped: %s", first_few(untracked))
        unhookable: list[str] = []
        for name, layer in tracked_layers(self.model).items():
            if name in exclude:
                continue
            if is_hookable(layer):
                self.layers[name] = hook_layer(name, layer)
            elif is_scripted(layer):
                self._scripted.append(ScriptedLayerHooks(name, layer))
            else:
                unhookable.append(name)
        for hooks in self._scripted:
            self.layers[hooks.name] = hooks
        self._unhookable = tuple(unhookable)

    def take(self, forward_pass: ForwardPass) -> None:
        """Run the model on a batch and collect the layers' moments.

        On a GPU the accuracy of a batch is checked after the next batch is queued, so that the GPU
        never waits.
        """
        self._waiting.append(self._run(forward_pass))
        if len(self._waiting) > self._late:
            self._merge_oldest()

    def end(self) -> None:
        """Merge the batches that are left, and gather the moments of all layers on the CPU."""
        while self._waiting:
            self._merge_oldest()
        self.moments = {key: moments.on_cpu() for key, moments in self.moments.items()}
        for layer, moments in zip(self._slots, self.collector.kernels.moments(), strict=True):
            if moments is not None:
                self._merge((layer.name, layer.statistics), moments)

    def to_plain(self) -> list[Any]:
        """Convert this process's moments to plain values."""
        return [[layer, [*names], m.to_plain()] for (layer, names), m in self.moments.items()]

    def replace(self, parts: Iterable[Sequence[Any]]) -> None:
        """Replace this process's moments by the merged results of ``to_plain`` of all processes."""
        self.moments = {}
        for part in parts:
            for layer, names, values in part:
                self._merge((layer, tuple(names)), Moments.from_plain(values))

    def check(self, *, keep_nonfinite: bool = False) -> None:
        """Raise an error if the moments of a layer give no statistics.

        Args:
            keep_nonfinite: True to accept values that are not finite.

        Raises:
            BatchNormError: A layer saw a single value, or a value that is not finite.
        """
        for (layer, _), moments in self.moments.items():
            require_several(layer, moments)
            if not keep_nonfinite:
                require_finite(layer, moments)

    def updates(self, batches: int, *, keep_nonfinite: bool = False) -> list[BufferUpdate]:
        """Compute the new statistics of the layers, without writing the statistics.

        Args:
            batches: Number of batches that went through the model, in all processes.
            keep_nonfinite: True to give NaN for statistics that are not finite.

        Raises:
            BatchNormError: Statistics do not fit a layer, or are too large for the layer's dtype.
        """
        updates: list[BufferUpdate] = []
        for name, layer in self.layers.items():
            for buffer_name, value in layer.new_values(self._moments_of(name), batches).items():
                buffer = getattr(layer.layer, buffer_name)
                update = BufferUpdate.fit(
                    f"{name}.{buffer_name}", buffer, value, keep_nonfinite=keep_nonfinite
                )
                updates.append(update)
        return updates

    def result(self, batches: int, samples: int) -> BatchNormResult:
        """Build the result of the pass, and log the layers that were left out.

        Layers with new statistics end training first (``LayerHooks.end_training``).
        """
        recomputed = {name for name, _ in self.moments}
        unchanged: dict[KeepReason | None, list[str]] = {reason: [] for reason in _MESSAGES}
        for name, layer in self.layers.items():
            if name in recomputed:
                layer.end_training()
            else:
                unchanged[layer.keep_reason].append(name)
        self._log_unchanged(unchanged)
        return BatchNormResult(
            layers=len(recomputed),
            batches=batches,
            samples=samples,
            unreached=tuple(unchanged[None]),
            written=self._written(),
            frozen=tuple(unchanged["frozen"]),
            unknown=(*unchanged["unknown"], *self._unhookable),
        )

    def _log_unchanged(self, unchanged: Mapping[KeepReason | None, Sequence[str]]) -> None:
        """Log the names of the layers that were not recomputed, by reason."""
        for reason, (level, text) in _MESSAGES.items():
            if unchanged[reason]:
                log.log(level, text, first_few([name or "the model" for name in unchanged[reason]]))
        if self._unhookable:
            log.warning(
                "the inputs of %s cannot be seen: statistics left as they were",
                first_few([*self._unhookable]),
            )

    def _moments_of(self, layer: str) -> dict[Names, Moments]:
        """Select the moments of a layer, by the names of the statistics."""
        return {names: m for (name, names), m in self.moments.items() if name == layer}

    def _written(self) -> frozenset[str]:
        """List the recomputed statistics by the names in the given model's state dict."""
        written: dict[nn.Module, Names] = {}
        for name, names in self.moments:
            layer = self.layers[name].layer
            written[layer] = (*written.get(layer, ()), *names)
        entries: set[str] = set()
        for prefix, module in self._outer_model.named_modules(remove_duplicate=False):
            for name in written.get(module, ()):
                entries.add(f"{prefix}.{name}".lstrip("."))
        return frozenset(entries)

    def _run(self, forward_pass: ForwardPass) -> _BatchStatistics:
        """Run the model on a batch and return the moments of the batch."""
        if not self._scripted:
            return self.collector.run(self.model, forward_pass)
        with KernelDispatch(self._scripted):
            return self.collector.run(self.model, forward_pass)

    def _merge_oldest(self) -> None:
        """Merge the oldest batch that is not merged yet, once its moments are accurate.

        A batch with doubtful moments goes through the model again, with the doubtful layers reduced
        in float64. The outputs are the same as before, since a layer in training mode ignores its
        running statistics.
        """
        while inaccurate := self._waiting[0].accuracy.inaccurate_layers():
            for slot in inaccurate:
                # Later batches are likely to be doubtful too.
                self._slots[slot].uses_kernel = False
            log.info(
                "the kernels' statistics of %s may be off by more than %g: reduced in float64",
                first_few([self._slots[slot].name for slot in inaccurate]),
                TOLERANCE,
            )
            self._waiting[0] = self._run(self._waiting[0].forward_pass)
        oldest = self._waiting.popleft()
        for written in oldest.buffers:
            self.collector.kernels.merge(written)
        for key, moments in oldest.moments:
            self._merge(key, moments)

    def _merge(self, key: Key, moments: Moments) -> None:
        """Merge moments by layer and statistics."""
        if key in self.moments:
            self.moments[key].merge(moments)
        else:
            self.moments[key] = moments


@contextmanager
def collect_moments(
    model: nn.Module, exclude: Collection[str], memory_format: MemoryFormat
) -> Iterator[ModelPass]:
    """Prepare a model for a pass, and restore the model's state afterwards.

    Args:
        model: The model. It is moved to the device and into the memory format of ``memory_format``.
        exclude: Names of layers that keep their statistics.
        memory_format: Device and memory format of the pass.
    """
    memory_format.place(model)
    model_pass = ModelPass(model, exclude, memory_format.device)
    state = ModelState(model)
    with _uncompiled(model):
        try:
            # Not .eval(): some modules merge their weights in eval().
            for module in model.modules():
                module.training = False
            stop_observers(model)
            for layer in model_pass.layers.values():
                layer.attach(model_pass.collector)
            yield model_pass
        finally:
            for layer in model_pass.layers.values():
                layer.detach()
            state.restore()


# The stance of the compiler holds for the whole process.
_eager = SharedContext(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of a model uncompiled, so that calls of layers can be intercepted."""
    for module in model.modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl:
            with _eager.in_use():
                yield
            return
    yield


def finish(
    passes: Sequence[ModelPass], batches: int, peers: Peers, *, keep_nonfinite: bool = False
) -> int:
    """Merge the moments of all processes, in the order of ranks, and check the result.

    Args:
        passes: The passes of this process, one per model.
        batches: Number of batches that this process passed.
        peers: The processes that share the data.
        keep_nonfinite: True to accept moments that are not finite.

    Returns:
        The number of batches of all processes together.

    Raises:
        BatchNormError: There are no batches, or the moments of a layer give no statistics.
    """
    for model_pass in passes:
        model_pass.end()
    if peers.world_size > 1:
        parts = peers.gather([batches, [model_pass.to_plain() for model_pass in passes]])
        counts, moments_of_peers = zip(*parts, strict=True)
        batches = sum(counts)
        for model_pass, moments in zip(passes, zip(*moments_of_peers, strict=True), strict=True):
            model_pass.replace(moments)
    if not batches:
        raise BatchNormError("the training data is empty", "Check the training data.")
    for model_pass in passes:
        model_pass.check(keep_nonfinite=keep_nonfinite)
    return batches
