"""Recomputation of BatchNorm running statistics for fixed weights.

Averaged weights need statistics of their own (Izmailov et al. 2018, 3.2). This module computes the
population statistics of Wu & Johnson 2021 ("Rethinking 'Batch' in BatchNorm", 3): each layer's mean
and variance over all samples, given the layer's inputs. Count, mean and sum of squared deviations
are merged batch by batch in float64 (Chan et al. 1979). ``torch.optim.swa_utils.update_bn``
averages the batches' variances instead, which ignores the differences between the batches' means.

The mean and variance of a batch come from the layer's kernel, which computes both to normalize the
batch. Where the kernel may be off by more than ``moments.TOLERANCE``, the batch goes through the
model once more. From then on that layer's inputs are reduced in float64. For a layer with a custom
forward pass, the statistics of a batch are found with a copy of the layer (``layer_updates``).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.batchnorm.buffer_updates import BufferUpdate, write_updates
from ckptavg.batchnorm.collect import (
    BatchNormResult,
    ForwardPass,
    collect_moments,
    finish,
)
from ckptavg.batchnorm.norm_layers import never_trained_layers, tracked_layers, unreachable_layers
from ckptavg.data.argument_checks import check_forward, check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader
from ckptavg.data.prefetch import prefetch_to_device, with_progress
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.distributed.peers import Peers, SingleProcess, find_peers
from ckptavg.errors import first_few
from ckptavg.formats.running_statistics import match_layers
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward, size_of
from ckptavg.models.calling import call
from ckptavg.models.load import bare_module
from ckptavg.models.memory_format import MemoryFormat
from ckptavg.models.runtime import Runtime

__all__ = ["BatchNormResult", "recompute", "tracked_layers", "update_bn"]
log = logging.getLogger("ckptavg")


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

    Weights are not changed. Only BatchNorm layers, and other layers that keep running statistics
    (InstanceNorm, or a user's own), are in training mode, each during its own forward pass. Some
    layers do not change their statistics in training: by their class, or because the model's own
    ``train()`` keeps these layers in evaluation mode. Such layers are left alone and named in the
    result, and so are layers whose update rule is unknown. A model without running statistics is no
    error.

    If a layer's inputs do not depend on the split into batches, neither does the result; this holds
    for the first layer above all. A batch's own mean and variance are exact up to
    ``moments.TOLERANCE``, and merged in float64. Deeper layers see activations that were normalized
    batch by batch, as in training, so at deeper layers one pass is not invariant to the batch size.
    If an error occurs, the model is restored.

    A batch may go through the model a second time, so the forward pass must not change its input.

    Under an initialized ``torch.distributed`` process group, each process passes its own part of
    the data. All processes end with the statistics of the whole data.

    Args:
        model: Any module. It is moved to ``device`` if that is given. On CUDA the weights of its
            convolutions are stored as channels_last.
        data: A Dataset, read in seeded random order, or a loader, used as is.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own device where None.
        forward: ``forward(model, batch)``, for batches that cannot be matched to the signature of
            the model's own forward (``ckptavg.models.calling``).
        exclude: Shell patterns of layers to leave alone (frozen layers), by module name.
        amp: ``off``, ``bf16`` or ``fp16``: autocast of the forward pass.
        batch_size: Samples per batch, for a Dataset.
        workers: Number of processes that load a Dataset.
        seed: Seed of a Dataset's order, and of random draws in the data such as augmentation.
        bn_samples: Number of samples, drawn at random from the data, or a
            ``ckptavg.data.loaders.Subset``, which may be stratified; all samples where None.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in samples;
            see ``ckptavg.display.progress``.

    Returns:
        Counts of layers, batches and samples, and the names of layers that were left alone.

    Raises:
        BatchNormError: There is no data, or a layer saw a single value or a value that is not
            finite.
        UsageError: ``model`` is not a module, ``data`` is not data, or a pattern of ``exclude``
            matches no layer.
    """
    check_model(model)
    check_forward(forward)
    layers = tracked_layers(bare_module(model))
    unreachable = unreachable_layers(bare_module(model))
    if unreachable:
        log.warning(
            "the running statistics of %s are no buffers: left as they were",
            first_few(unreachable),
        )
    excluded: set[str] = set()
    if layers:
        excluded = match_layers(exclude, layers)
    frozen = _find_frozen(bare_module(model), excluded)
    runtime = Runtime.on(device, model, amp=amp, batch_size=batch_size, workers=workers, seed=seed)
    if frozen and layers.keys() == {*frozen}:
        return BatchNormResult(0, 0, 0, frozen=frozen)
    peers = find_peers()
    loader = open_loader(data, runtime, shuffle=True, subset=as_subset(bn_samples), peers=peers)
    with (
        open_phase(progress, "BatchNorm", "samples") as report,
        malloc.keep_freed_memory(runtime.device),
    ):
        batches = with_progress(loader, report or (lambda *_: None), peers, seed)
        frozen_or_excluded = {*excluded, *frozen}
        result = recompute([model], batches, runtime, forward, [frozen_or_excluded], peers)[0]
    return replace(
        result, frozen=(*frozen, *result.frozen), unknown=(*result.unknown, *unreachable)
    )


def _find_frozen(model: nn.Module, excluded: Collection[str]) -> tuple[str, ...]:
    """Find the layers that a model's own ``train()`` freezes, and log the names."""
    never = never_trained_layers(model).difference(excluded)
    frozen = [layer for layer in tracked_layers(model) if layer in never]
    if frozen:
        log.info(
            "the model's train() leaves %s in evaluation mode: statistics kept", first_few(frozen)
        )
    return tuple(frozen)


def recompute(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    runtime: Runtime,
    forward: Forward | None = None,
    exclude: Sequence[Collection[str]] | None = None,
    peers: Peers | None = None,
    *,
    keep_nonfinite: bool = False,
) -> list[BatchNormResult]:
    """Recompute the statistics of several models in one shared pass over the data.

    ``update_bn`` describes the statistics. A batch may go through a model twice, so the forward
    pass must not change the batch in place.

    Args:
        models: Modules of the same kind. They are moved to the runtime's device.
        batches: This process's part of the data.
        runtime: Device, precision and batch size of the pass.
        forward: ``forward(model, batch)`` for unusual batches.
        exclude: Names of the layers to leave alone, per model; no layers where None.
        peers: The processes that share the data. All end with the statistics of the whole data.
        keep_nonfinite: True to write NaN for statistics that are not finite.

    Returns:
        One result per model.

    Raises:
        BatchNormError: As for ``update_bn``.
    """
    if not any(tracked_layers(bare_module(model)) for model in models):
        log.info("the model has no BatchNorm layers with running statistics: nothing to recompute")
        return [BatchNormResult(0, 0, 0) for _ in models]
    batches_read, samples = 0, 0
    memory_format = MemoryFormat(models[0], runtime.device, scoring=False)
    with ExitStack() as stack, torch.no_grad():
        passes = [
            stack.enter_context(collect_moments(model, excluded, memory_format))
            for model, excluded in zip(models, exclude or [()] * len(models), strict=True)
        ]
        # All models see a batch before the next is read, so the data is read once.
        for batch in prefetch_to_device(batches, runtime.device):
            batch_on_device = memory_format.to_device(batch.on_device)
            through = ForwardPass(forward or call, runtime, memory_format, batch_on_device)
            for model_pass in passes:
                model_pass.take(through)
            batches_read += 1
            samples += size_of(batch.loaded)
        of_all = finish(
            passes, batches_read, peers or SingleProcess(), keep_nonfinite=keep_nonfinite
        )
    # Written at the very end and for all models at once, so that an error changes no model.
    updates: list[BufferUpdate] = []
    for model_pass in passes:
        updates += model_pass.updates(of_all, keep_nonfinite=keep_nonfinite)
    write_updates(updates)
    return [model_pass.result(batches_read, samples) for model_pass in passes]
