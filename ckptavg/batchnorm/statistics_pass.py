"""Recomputation of statistics that keeps frozen and excluded layers and records the outcome."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, get_args

from torch import nn

from ckptavg.averaging.weights import Weights
from ckptavg.batchnorm.norm_layers import never_trained_layers, tracked_layers
from ckptavg.batchnorm.norm_layers import statistics_of as buffers_of_statistics
from ckptavg.batchnorm.update import BatchNormResult, recompute
from ckptavg.distributed.peers import Peers
from ckptavg.errors import first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.running_statistics import State, Statistics
from ckptavg.formats.statistics_names import (
    batch_count,
    batchnorm_layers,
    layer_statistics,
    updated_layers,
)
from ckptavg.formats.wrappers import bare_names
from ckptavg.models.batches import Forward
from ckptavg.models.load import bare_module
from ckptavg.models.runtime import Runtime

log = logging.getLogger("ckptavg")
# Part of the names of classes with constant statistics: FrozenBatchNorm2d of torchvision,
# detectron2 and timm.
_CONSTANT = "Frozen"


def recompute_statistics(
    models: Sequence[nn.Module],
    before: Sequence[Statistics],
    excluded: Collection[str],
    batches: Iterable[Any],
    runtime: Runtime,
    forward: Forward | None,
    peers: Peers,
    *,
    keep_nonfinite: bool = False,
) -> list[tuple[BatchNormResult, Statistics]]:
    """Recompute the running statistics of models in one shared pass over the data.

    Layers that were frozen in training keep their statistics. If no layer is left to recompute,
    there is no pass.

    Args:
        models: Modules of the same kind, with weights loaded.
        before: State of the statistics before the pass, per model.
        excluded: Names of layers that keep their statistics, as in the checkpoint.
        batches: This process's part of the data.
        runtime: Device, precision and batch size of the pass.
        forward: ``forward(model, batch)`` for unusual batches.
        peers: The processes that share the data.
        keep_nonfinite: True to write NaN for statistics that are not finite.

    Returns:
        Per model, the result of the pass and the state of the statistics afterwards.

    Raises:
        BatchNormError: As for ``update_bn``.
    """
    known: list[Statistics] = []
    # Models with layers to recompute, by position, and the layers that each keeps.
    wanting: dict[int, nn.Module] = {}
    kept_layers: list[set[str]] = []
    for i, (model, statistics) in enumerate(zip(models, before, strict=True)):
        known.append(_with_constant_layers(statistics, model))
        kept = _modules(model, {*known[i].frozen, *excluded})
        if tracked_layers(bare_module(model)).keys() - kept:
            wanting[i] = model
            kept_layers.append(kept)
    results = dict.fromkeys(range(len(models)), BatchNormResult(0, 0, 0))
    if wanting:
        recomputed = recompute(
            list(wanting.values()), batches, runtime, forward, kept_layers, peers,
            keep_nonfinite=keep_nonfinite,
        )  # fmt: skip
        results |= dict(zip(wanting, recomputed, strict=True))
    outcome: list[tuple[BatchNormResult, Statistics]] = []
    unreached: set[str] = set()
    for i, model in enumerate(models):
        result = results[i]
        statistics = _with_frozen(known[i], model, _submodules(model, result.frozen))
        outcome.append((result, statistics.after(excluded, _updated(model, result.written))))
        unreached.update(result.unreached)
    _log([state for _, state in outcome], unreached)
    return outcome


def statistics_of(checkpoint: Checkpoint | Weights, model: nn.Module) -> Statistics:
    """Find the state of a checkpoint's running statistics.

    An average written by this package records the layers that were frozen in training. For other
    checkpoints, the layers that the model does not update in training are taken as frozen: by their
    class, or by the model's own ``train()``.

    Args:
        checkpoint: A checkpoint or an average.
        model: A module that the checkpoint's weights fit.
    """
    layers = batchnorm_layers(checkpoint.tensors)
    if not layers:
        return Statistics("none")
    state, frozen = _recorded_state(checkpoint)
    if frozen is not None:
        return Statistics(state, layers, tuple(layer for layer in layers if layer in frozen))
    statistics = _with_constant_layers(Statistics(state, layers), model)
    # Where all counts are missing, the checkpoint may have been written without counts, so missing
    # counts are no sign of frozen layers.
    uncounted = uncounted_layers(checkpoint, model)
    if state != "own" or len(uncounted) == len(layers):
        return statistics
    frozen_names = {*statistics.frozen, *uncounted}
    return replace(statistics, frozen=tuple(n for n in layers if n in frozen_names))


def _recorded_state(checkpoint: Checkpoint | Weights) -> tuple[State, list[str] | None]:
    """Return the recorded state of the statistics, and the frozen layers; None if not recorded."""
    provenance = checkpoint.provenance
    if provenance is None:
        return "own", None
    state: State = "stale" if checkpoint.is_average else "own"
    for candidate in get_args(State):
        if provenance.bn == candidate:
            state = candidate
    return state, provenance.bn_layers.get("frozen")


def uncounted_layers(checkpoint: Checkpoint | Weights, model: nn.Module) -> list[str]:
    """List the layers with a count of batches in the model but not in the checkpoint.

    There are two causes. In training the layers were of a class with constant statistics, as in
    backbones of detectors. Or the program that wrote the checkpoint left all counts out.
    """
    names_in_model = {*bare_names(list(model.state_dict())).values()}
    uncounted: list[str] = []
    for layer in batchnorm_layers(checkpoint.tensors):
        count = batch_count(layer)
        if count in names_in_model and count not in checkpoint.tensors:
            uncounted.append(layer)
    return uncounted


def _with_constant_layers(statistics: Statistics, model: nn.Module) -> Statistics:
    """Mark the layers as frozen that the model never updates in training.

    These are layers of a class with constant statistics, and layers that the model's own
    ``train()`` leaves in evaluation mode.
    """
    if statistics.state != "own" or statistics.frozen:
        return statistics
    constant: set[nn.Module] = set()
    for layer in model.modules():
        if any(_CONSTANT in kind.__name__ for kind in type(layer).__mro__):
            constant.add(layer)
    never = _submodules(model, never_trained_layers(bare_module(model)))
    return _with_frozen(statistics, model, constant | never)


def _with_frozen(
    statistics: Statistics, model: nn.Module, layers: Collection[nn.Module]
) -> Statistics:
    """Mark more layers as frozen if the statistics are a single checkpoint's."""
    # For an average, the frozen layers are known from the checkpoints already.
    if statistics.state != "own" or not layers:
        return statistics
    frozen_names = {*statistics.frozen, *_stored_names(model, layers)}
    return replace(statistics, frozen=tuple(n for n in statistics.layers if n in frozen_names))


def _submodules(model: nn.Module, names: Collection[str]) -> set[nn.Module]:
    """Find the modules with given names in a model without wrappers."""
    inner = bare_module(model)
    return {inner.get_submodule(name) for name in names}


def _stored_names(model: nn.Module, layers: Collection[nn.Module]) -> set[str]:
    """Find the names of layers in a checkpoint."""
    bare = bare_names(list(model.state_dict()))
    names: set[str] = set()
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer in layers:
            statistic = next(iter(buffers_of_statistics(layer)), "running_mean")
            stored = f"{name}.{statistic}".lstrip(".")
            names.add(bare.get(stored, stored).rpartition(".")[0])
    return names


def _modules(model: nn.Module, layers: Collection[str]) -> set[str]:
    """Convert names of layers in a checkpoint to names in a pass.

    A shared layer has one name in a pass but may have several names in a checkpoint.
    """
    inner = bare_module(model)
    bare = bare_names(list(inner.state_dict()))
    named: set[nn.Module] = set()
    for name, module in inner.named_modules(remove_duplicate=False):
        for statistic in buffers_of_statistics(module)[:1]:
            stored = f"{name}.{statistic}".lstrip(".")
            if bare.get(stored, stored).rpartition(".")[0] in layers:
                named.add(module)
    return {name for name, module in tracked_layers(inner).items() if module in named}


def _updated(model: nn.Module, written: Collection[str]) -> set[str]:
    """Find the layers with all statistics written, by names in a checkpoint."""
    bare = bare_names(list(model.state_dict()))
    names = {bare.get(name, name) for name in written}
    return updated_layers(layer_statistics(bare.values()), names)


def _log(states: Sequence[Statistics], unreached: Collection[str]) -> None:
    """Log the layers that were not recomputed, with the reasons.

    Args:
        states: States of the models' statistics after a pass.
        unreached: Layers without data. The pass itself has logged these layers.
    """
    # Models of one kind often share a state, which is logged once.
    for after in dict.fromkeys(states):
        frozen_or_excluded = {*after.frozen, *after.excluded}
        unknown = [layer for layer in after.not_recomputed if layer not in unreached]
        if unknown:
            log.warning(
                "the running statistics of %d of %d layers cannot be recomputed: %s",
                len(unknown), len(after.layers), first_few(unknown),
            )  # fmt: skip
        elif frozen_or_excluded.issuperset(after.layers):
            log.info("%s", _describe_kept(after))


def _describe_kept(statistics: Statistics) -> str:
    """Describe why no layer is recomputed, with layers and a remedy."""
    if not statistics.layers:
        return "no BatchNorm layers: nothing to recompute"
    excluded = [layer for layer in statistics.excluded if layer not in statistics.frozen]
    kinds = {"frozen": list(statistics.frozen), "excluded": excluded}
    why = " or ".join(f"{kind} ({first_few(names)})" for kind, names in kinds.items() if names)
    remedy = "exclude fewer to change that" if excluded else "their statistics fit as they are"
    return f"nothing to recompute, as all BatchNorm layers are {why}: {remedy}"
