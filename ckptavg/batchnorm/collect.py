"""Collection of layer moments of one model during a pass, and new statistics from the moments."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckptavg.batchnorm.hooks import Kept, Names, watch
from ckptavg.batchnorm.model_state import ModelState, stop_observers
from ckptavg.batchnorm.moments import TOLERANCE, Doubt, KernelMoments, Landing, Moments
from ckptavg.batchnorm.norm_layers import is_watchable, keeps_nothing, tracked_layers
from ckptavg.batchnorm.scripted_layers import KernelDispatch, ScriptedLayer, is_scripted
from ckptavg.distributed.peers import Peers
from ckptavg.errors import BatchNormError, first_few
from ckptavg.models.batches import Forward
from ckptavg.models.device import Runtime
from ckptavg.models.load import bare_module
from ckptavg.models.memory_format import MemoryFormat
from ckptavg.models.shared_context import SharedContext

log = logging.getLogger("ckptavg")
Key = tuple[str, Names]
"""Name of a layer, and names of the layer's statistics that some moments are for."""

_KEPT: Mapping[Kept | None, tuple[int, str]] = {
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
class Change:
    """A new value for a named buffer, in the buffer's shape and dtype, not yet written."""

    name: str
    buffer: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Through:
    """A forward pass of one batch, already on the device, for any of the models."""

    forward: Forward
    runtime: Runtime
    memory_format: MemoryFormat
    batch: Any

    def __call__(self, model: nn.Module, begin: Callable[[], None]) -> None:
        """Run a model on the batch, after calling ``begin`` at each attempt."""

        def attempt(batch: Any) -> None:
            """Run the forward pass once."""
            begin()
            with self.runtime.autocast():
                self.forward(model, batch)

        self.memory_format.run(attempt, model, self.batch)


@dataclass
class _Seen:
    """Moments of a batch before merging, until the accuracy is known.

    Attributes:
        through: The forward pass, kept so that the batch can be run again.
        landings: Buffers with the kernels' statistics. The nth call of a layer has the nth landing.
        moments: Moments that were reduced in float64, in the order of the calls.
        doubt: The kernels' statistics that may be off.
    """

    through: Through
    landings: list[Landing] = field(default_factory=list)
    moments: list[tuple[Key, Moments]] = field(default_factory=list)
    doubt: Doubt = field(init=False)


class _Collector:
    """A collector of the moments of a model's layers, batch by batch.

    The collector holds no reference to layers, so that a model is freed with its last user.
    """

    def __init__(self, kernels: KernelMoments) -> None:
        self.kernels = kernels
        self._seen: _Seen

    def see(self, model: nn.Module, through: Through) -> _Seen:
        """Run a model on a batch and return the moments of the batch."""

        def begin() -> None:
            """Discard the moments of an earlier attempt."""
            self._seen = _Seen(through)

        through(model, begin)
        self._seen.doubt = self.kernels.doubt(self._seen.landings)
        return self._seen

    def land(self, slot: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reserve buffers for a kernel's mean and variance, as ``Sink.land`` describes."""
        # A layer that is called several times per batch needs a landing for each call.
        landings = self._seen.landings
        landing = next((candidate for candidate in landings if not candidate.counts[slot]), None)
        if landing is None:
            landing = self.kernels.landing()
            landings.append(landing)
        landing.counts[slot] = count
        return landing.mean[slot], landing.variance[slot]

    def add(self, layer: str, statistics: Names, moments: Moments) -> None:
        """Add moments for some statistics of a layer, as ``Sink.add`` describes."""
        self._seen.moments.append(((layer, statistics), moments))


class ModelPass:
    """A pass over data of one model, with the moments of the model's layers.

    Args:
        model: The model; the layers inside its wrappers are watched.
        exclude: Names of layers that keep their statistics.
        device: Device of the model.
    """

    def __init__(self, model: nn.Module, exclude: Collection[str], device: torch.device) -> None:
        self._given, self.model = model, bare_module(model)
        plain = [n for n, m in self.model.named_modules() if keeps_nothing(m)]
        if plain:
            log.info("layers without running statistics are skipped: %s", first_few(plain))
        tracked = {n: m for n, m in tracked_layers(self.model).items() if n not in exclude}
        self.layers = {n: watch(n, layer) for n, layer in tracked.items() if is_watchable(layer)}
        scripted = {n: ScriptedLayer(n, m) for n, m in tracked.items() if is_scripted(m)}
        self.layers.update(scripted)
        self._unwatched = tuple(name for name in tracked if name not in self.layers)
        self.moments: dict[Key, Moments] = {}
        self._slots = [layer for layer in self.layers.values() if layer.suits_kernel()]
        for slot, layer in enumerate(self._slots):
            layer.slot = slot
        norms: list[Any] = [layer.layer for layer in self._slots]
        sizes, eps = [n.num_features for n in norms], [n.eps for n in norms]
        self.collector = _Collector(KernelMoments(sizes, eps, device))
        self._waiting: deque[_Seen] = deque()
        # On CUDA, batches are checked one batch late, as ``take`` explains.
        self._late = 1 if device.type == "cuda" else 0

    def take(self, through: Through) -> None:
        """Run the model on a batch and collect the layers' moments.

        On a GPU the accuracy of a batch is checked after the next batch was queued, so that the GPU
        never waits.
        """
        self._waiting.append(self._see(through))
        if len(self._waiting) > self._late:
            self._settle()

    def end(self) -> None:
        """Merge the batches that are left, and gather the moments of all layers on the CPU."""
        while self._waiting:
            self._settle()
        self.moments = {key: moments.on_cpu() for key, moments in self.moments.items()}
        for layer, moments in zip(self._slots, self.collector.kernels.moments(), strict=True):
            if moments is not None:
                self._merge((layer.name, layer.statistics), moments)

    def plain(self) -> list[Any]:
        """Convert this process's moments to plain values."""
        return [[layer, [*names], m.plain()] for (layer, names), m in self.moments.items()]

    def replace(self, parts: Iterable[Sequence[Any]]) -> None:
        """Replace this process's moments by the merged results of ``plain`` of all processes."""
        self.moments = {}
        for part in parts:
            for layer, names, values in part:
                self._merge((layer, tuple(names)), Moments.of_plain(values))

    def check(self) -> None:
        """Raise an error if the moments of a layer give no statistics.

        Raises:
            BatchNormError: A layer saw a single value, or a value that is not finite.
        """
        for (layer, _), moments in self.moments.items():
            _check(layer, moments)

    def changes(self, batches: int) -> list[Change]:
        """Compute the new statistics of the layers, without writing the statistics.

        Args:
            batches: Number of batches that went through the model, in all processes.

        Raises:
            BatchNormError: Statistics do not fit a layer, or are too large for the layer's dtype.
        """
        changes: list[Change] = []
        for name, layer in self.layers.items():
            for buffer, value in layer.new_values(self._moments_of(name), batches).items():
                changes.append(_change(f"{name}.{buffer}", getattr(layer.layer, buffer), value))
        return changes

    def result(self, batches: int, samples: int) -> BatchNormResult:
        """Build the result of the pass, and log the layers that were left out.

        Layers with new statistics end training first (``WatchedLayer.end_training``).
        """
        written = {name for name, _ in self.moments}
        for name in written:
            self.layers[name].end_training()
        unwritten = [layer for name, layer in self.layers.items() if name not in written]
        by_reason = {
            reason: tuple(layer.name for layer in unwritten if layer.kept == reason)
            for reason in _KEPT
        }
        for reason, (level, text) in _KEPT.items():
            names = [name or "the model" for name in by_reason[reason]]
            if names:
                log.log(level, text, first_few(names))
        if self._unwatched:
            log.warning(
                "what goes through %s cannot be seen: statistics left as they were",
                first_few([*self._unwatched]),
            )
        return BatchNormResult(
            len(written),
            batches,
            samples,
            by_reason[None],
            self._written(),
            by_reason["frozen"],
            (*by_reason["unknown"], *self._unwatched),
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
        return frozenset(
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self._given.named_modules(remove_duplicate=False)
            for name in written.get(module, ())
        )

    def _see(self, through: Through) -> _Seen:
        """Run the model on a batch and return the moments of the batch."""
        scripted = [layer for layer in self.layers.values() if isinstance(layer, ScriptedLayer)]
        with KernelDispatch(scripted) if scripted else nullcontext():
            return self.collector.see(self.model, through)

    def _settle(self) -> None:
        """Merge the oldest batch that is not merged yet, once its moments are accurate.

        A batch with doubtful moments goes through the model again, with the doubtful layers reduced
        in float64. The outputs are the same as before, since a layer in training mode ignores its
        running statistics.
        """
        while doubted := self._waiting[0].doubt.layers():
            for slot in doubted:
                # Later batches are likely to be doubtful too.
                self._slots[slot].trusted = False
            log.info(
                "what the kernels find at %s may be off by more than %g: reduced in float64",
                first_few([self._slots[slot].name for slot in doubted]),
                TOLERANCE,
            )
            self._waiting[0] = self._see(self._waiting[0].through)
        oldest = self._waiting.popleft()
        for landing in oldest.landings:
            self.collector.kernels.merge(landing)
        for key, moments in oldest.moments:
            self._merge(key, moments)

    def _merge(self, key: Key, moments: Moments) -> None:
        """Merge moments by layer and statistics."""
        if key in self.moments:
            self.moments[key].merge(moments)
        else:
            self.moments[key] = moments


@contextmanager
def collecting(
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
                layer.enter(model_pass.collector)
            yield model_pass
        finally:
            for layer in model_pass.layers.values():
                layer.leave()
            state.restore()


# The stance of the compiler holds for the whole process.
_eager = SharedContext(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled parts of a model uncompiled, so that calls of layers can be intercepted."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
        with _eager.in_use():
            yield
    else:
        yield


def finish(passes: Sequence[ModelPass], batches: int, peers: Peers) -> int:
    """Merge the moments of all processes, in the order of ranks, and check the result.

    Args:
        passes: The passes of this process, one per model.
        batches: Number of batches that this process passed.
        peers: The processes that share the data.

    Returns:
        The number of batches of all processes together.

    Raises:
        BatchNormError: There are no batches, or the moments of a layer give no statistics.
    """
    for model_pass in passes:
        model_pass.end()
    if peers.world_size > 1:
        parts = peers.gather([batches, [model_pass.plain() for model_pass in passes]])
        batches = sum(count for count, _ in parts)
        for i, model_pass in enumerate(passes):
            model_pass.replace(of_passes[i] for _, of_passes in parts)
    if not batches:
        raise BatchNormError("the training data is empty", "Check --train-data.")
    for model_pass in passes:
        model_pass.check()
    return batches


def replace_all(changes: Sequence[Change]) -> None:
    """Write the new statistics into the layers: all, or none if an error occurs.

    Raises:
        BatchNormError: A buffer cannot be written.
    """
    # The old values undo a partial write.
    before = [change.buffer.detach().clone() for change in changes]
    with torch.no_grad():
        for number, change in enumerate(changes):
            try:
                change.buffer.copy_(change.value)
            except Exception as error:
                # Restore the buffer that failed too: torch may raise after it has written values.
                # Inference tensors can be written in inference mode only. A buffer that refused
                # the new value may refuse the old value as well.
                for written, value in zip(changes[: number + 1], before, strict=False):
                    with (
                        torch.inference_mode(written.buffer.is_inference()),
                        suppress(RuntimeError),
                    ):
                        written.buffer.copy_(value)
                raise BatchNormError(
                    f"{change.name} cannot be written: {type(error).__name__}: {error}",
                    "The statistics of all layers are as they were.",
                ) from error


def _change(name: str, buffer: torch.Tensor | None, value: torch.Tensor) -> Change:
    """Fit a new value to the shape and dtype of a buffer.

    Raises:
        BatchNormError: The value does not fit the buffer, or is too large for its dtype.
    """
    # A complex value arrives as two real numbers.
    if buffer is None or buffer.numel() * (1 + buffer.is_complex()) != value.numel():
        raise BatchNormError(
            f"{name} does not have a value per channel of what goes through its layer",
            "Leave the layer out (exclude).",
        )
    if buffer.is_complex():
        value = torch.view_as_complex(value.reshape(*buffer.shape, 2))
    narrowed = value.reshape(buffer.shape).to(buffer.dtype)
    if not bool(torch.isfinite(narrowed).all()):
        raise BatchNormError(
            f"{name} is too large for {str(buffer.dtype).removeprefix('torch.')}",
            "Take the model in a wider type.",
        )
    return Change(name, buffer, narrowed)


def _check(name: str, moments: Moments) -> None:
    """Raise an error if moments have too few values, or values that are not finite."""
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
