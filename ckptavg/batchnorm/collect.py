"""One model while data goes through it: what its layers find, and what they are given for it."""

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
from ckptavg.distributed.processes import Peers
from ckptavg.errors import BatchNormError, first_few
from ckptavg.models.batches import Forward
from ckptavg.models.device import Runtime
from ckptavg.models.load import bare_module
from ckptavg.models.memory_format import Channels

log = logging.getLogger("ckptavg")
Key = tuple[str, Names]
"""A layer, and those of its statistics that some moments are for."""

_KEPT: Mapping[Kept | None, tuple[int, str]] = {
    None: (logging.WARNING, "no data went through %s: statistics left as they were"),
    "frozen": (logging.INFO, "statistics that do not change in training are kept: %s"),
    "unknown": (
        logging.WARNING,
        "it is not known how layers update their statistics, which are left as they were: %s",
    ),
}
"""What is said of layers that were not written, by why they were not."""


@dataclass(frozen=True)
class BatchNormResult:
    """What a pass over the data did.

    Attributes:
        layers: Number of layers whose statistics were recomputed.
        batches: Batches seen, by this process.
        samples: Samples seen, by this process.
        unreached: Layers that no batch went through; they keep their statistics.
        written: The entries of the model's state dict that were recomputed: means and variances,
            under each of the names of a layer that has several.
        frozen: Layers that do not change their statistics in training, and keep them.
        unknown: Layers that keep their statistics since it is not known how they update them.
    """

    layers: int
    batches: int
    samples: int
    unreached: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()
    frozen: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """One line, which does not grow with the model."""
        parts = [f"layers={self.layers}, batches={self.batches}, samples={self.samples}"]
        for name in ("unreached", "frozen", "unknown"):
            if layers := getattr(self, name):
                parts.append(f"{name}: {first_few(list(layers))}")
        return f"<BatchNormResult {'; '.join(parts)}>"


@dataclass(frozen=True)
class Change:
    """A buffer, and what it is to hold."""

    name: str
    buffer: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class Through:
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

    through: Through
    landings: list[Landing] = field(default_factory=list)
    moments: list[tuple[Key, Moments]] = field(default_factory=list)
    doubt: Doubt = field(init=False)


class _Collector:
    """Takes in what the layers of a model see, batch by batch.

    It does not know the layers, so that a model is gone as soon as nobody else holds it.
    """

    def __init__(self, kernels: KernelMoments) -> None:
        self.kernels = kernels
        self._seen: _Seen

    def see(self, model: nn.Module, through: Through) -> _Seen:
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

    def add(self, layer: str, statistics: Names, moments: Moments) -> None:
        """Take in the moments that some statistics of a layer are to become."""
        self._seen.moments.append(((layer, statistics), moments))


class ModelPass:
    """The layers of one model while data goes through it."""

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
        self._late = 1 if device.type == "cuda" else 0

    def take(self, through: Through) -> None:
        """Take the model through a batch, and take in what its layers saw.

        A GPU is asked about a batch when it has the next one to work on, so that it never waits.
        """
        self._waiting.append(self._see(through))
        if len(self._waiting) > self._late:
            self._settle()

    def end(self) -> None:
        """Settle what is left, and put together what each layer saw."""
        while self._waiting:
            self._settle()
        self.moments = {key: moments.on_cpu() for key, moments in self.moments.items()}
        for layer, moments in zip(self._slots, self.collector.kernels.moments(), strict=True):
            if moments is not None:
                self._merge((layer.name, layer.statistics), moments)

    def plain(self) -> list[Any]:
        """What this process saw, as plain values."""
        return [[layer, [*names], m.plain()] for (layer, names), m in self.moments.items()]

    def replace(self, parts: Iterable[Sequence[Any]]) -> None:
        """Take over what all processes saw, in place of what this one did."""
        self.moments = {}
        for part in parts:
            for layer, names, values in part:
                self._merge((layer, tuple(names)), Moments.of_plain(values))

    def check(self) -> None:
        """Raise an error unless what data went through have statistics.

        Raises:
            BatchNormError: A layer saw a single value, or one that is not finite.
        """
        for (layer, _), moments in self.moments.items():
            _check(layer, moments)

    def changes(self, batches: int) -> list[Change]:
        """The new statistics of the layers, which do not have them yet.

        Args:
            batches: How many went through the model, in all processes.

        Raises:
            BatchNormError: They do not fit a layer, or are too large for its type.
        """
        changes: list[Change] = []
        for name, layer in self.layers.items():
            for buffer, value in layer.new_values(self._moments_of(name), batches).items():
                changes.append(_change(f"{name}.{buffer}", getattr(layer.layer, buffer), value))
        return changes

    def result(self, batches: int, samples: int) -> BatchNormResult:
        """What the pass did, which is said where a layer was left out."""
        written = {name for name, _ in self.moments}
        for name in written:
            self.layers[name].end_training()
        others = [layer for name, layer in self.layers.items() if name not in written]
        kept = {why: tuple(layer.name for layer in others if layer.kept == why) for why in _KEPT}
        for why, (level, text) in _KEPT.items():
            if kept[why]:
                log.log(level, text, first_few([name or "the model" for name in kept[why]]))
        if self._unwatched:
            log.warning(
                "what goes through %s cannot be seen: statistics left as they were",
                first_few([*self._unwatched]),
            )
        return BatchNormResult(
            len(written),
            batches,
            samples,
            kept[None],
            self._written(),
            kept["frozen"],
            (*kept["unknown"], *self._unwatched),
        )

    def _moments_of(self, layer: str) -> dict[Names, Moments]:
        return {names: m for (name, names), m in self.moments.items() if name == layer}

    def _written(self) -> frozenset[str]:
        """Names of the statistics that layers were given, as in the given model's state dict."""
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
        scripted = [layer for layer in self.layers.values() if isinstance(layer, ScriptedLayer)]
        with KernelDispatch(scripted) if scripted else nullcontext():
            return self.collector.see(self.model, through)

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
            self._waiting[0] = self._see(self._waiting[0].through)
        seen = self._waiting.popleft()
        for landing in seen.landings:
            self.collector.kernels.merge(landing)
        for key, moments in seen.moments:
            self._merge(key, moments)

    def _merge(self, key: Key, moments: Moments) -> None:
        if key in self.moments:
            self.moments[key].merge(moments)
        else:
            self.moments[key] = moments


@contextmanager
def collecting(
    model: nn.Module, exclude: Collection[str], channels: Channels
) -> Iterator[ModelPass]:
    """Prepare a model for the pass, and leave it as it was afterwards."""
    channels.place(model)
    model_pass = ModelPass(model, exclude, channels.device)
    state = ModelState(model)
    with _uncompiled(model):
        try:
            # not .eval(): some modules merge their weights in it
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


@contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Let parts that are compiled run as they are written, where the layers' calls are seen."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def finish(passes: Sequence[ModelPass], batches: int, peers: Peers) -> int:
    """Merge what all processes saw, in the order of their ranks, and check it.

    Returns:
        The batches that all of them saw.
    """
    for model_pass in passes:
        model_pass.end()
    if peers.count > 1:
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
    """Give the layers their new statistics: all of them, or none if that fails.

    Raises:
        BatchNormError: A buffer cannot be written.
    """
    before = [change.buffer.detach().clone() for change in changes]
    with torch.no_grad():
        for number, change in enumerate(changes):
            try:
                change.buffer.copy_(change.value)
            except Exception as error:
                # the one that failed, too: torch may refuse after it has written
                for done, value in zip(changes[: number + 1], before, strict=False):
                    with torch.inference_mode(done.buffer.is_inference()), suppress(RuntimeError):
                        done.buffer.copy_(value)
                raise BatchNormError(
                    f"{change.name} cannot be written: {type(error).__name__}: {error}",
                    "The statistics of all layers are as they were.",
                ) from error


def _change(name: str, buffer: torch.Tensor | None, value: torch.Tensor) -> Change:
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
