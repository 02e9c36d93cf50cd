"""Running statistics recomputed for fixed weights.

Averaged weights need statistics of their own (Izmailov et al. 2018, 3.2). What is computed here are
the population statistics of Wu & Johnson 2021 ("Rethinking 'Batch' in BatchNorm", 3): each layer's
mean and variance over all samples, given the layer's inputs, by merging count, mean and sum of
squared deviations batch by batch in float64 (Chan et al. 1979). ``torch.optim.swa_utils.update_bn``
averages the batches' variances instead, which leaves out how the batches' means differ.

A batch's own mean and variance are those that the layer's kernel computes anyway to normalize it.
Where they may be off by more than ``moments.TOLERANCE``, the batch goes through the model once more
and that layer's inputs are reduced in float64, from then on too. A layer whose forward pass is not
torch's is asked what it makes of a batch (``layer_updates``).
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

from ckptavg.batchnorm.collect import BatchNormResult, Through, collecting, finish, replace_all
from ckptavg.batchnorm.norm_layers import never_trained_layers, tracked_layers, unreachable_layers
from ckptavg.data.argument_checks import check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader
from ckptavg.data.prefetch import counted, moved
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.distributed.processes import Alone, Peers, peers_of_group
from ckptavg.errors import first_few
from ckptavg.formats.running_statistics import match_layers
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward, size_of
from ckptavg.models.calling import call
from ckptavg.models.device import Runtime
from ckptavg.models.load import bare_module
from ckptavg.models.memory_format import Channels

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

    Weights stay as they are; only the BatchNorm layers (and other layers that keep running
    statistics, InstanceNorm's or a user's own) are in training mode during the pass, and only in
    their own forward pass. Layers that do not change their statistics in training, since they never
    do or since the model's own ``train()`` keeps them in evaluation mode, are left and named in the
    result, as are those of which it is not known how they change them; a model without any is no
    error.

    At a layer whose inputs do not depend on the batch, the first above all, the result is the same
    for any split into batches: a batch's own mean and variance are exact up to
    ``moments.TOLERANCE``, and merged in float64. Deeper layers see activations that were normalized
    batch by batch, as in training, so there one pass is not invariant to the batch size. If
    anything fails, the model is as it was before.

    A batch may go through the model a second time, so its forward pass must not change its input.

    Under an initialized ``torch.distributed`` process group, each process passes its own part of
    the data, and all end with the statistics of the whole.

    Args:
        model: Any module. With ``device`` it is moved there; on CUDA its convolutions' weights come
            to lie in memory as channels_last.
        data: A Dataset, read in seeded random order; or a loader, used as it is.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own where None.
        forward: ``forward(model, batch)``, for batches of which the signature of the model's own
            forward does not tell what it gets (``ckptavg.models.calling``).
        exclude: Shell patterns of layers to leave alone (frozen ones), by their modules' names.
        amp: ``off``, ``bf16`` or ``fp16``: autocast of the forward pass.
        batch_size: Of a Dataset.
        workers: Processes that load a Dataset.
        seed: Of a Dataset's order, and of whatever the data draws: its augmentation.
        bn_samples: How many samples of the data, drawn at random, or a
            ``ckptavg.data.loaders.Subset``, which may be stratified; all of them where None.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in samples;
            see ``ckptavg.display.progress``.

    Raises:
        BatchNormError: There are no data, or a layer saw a single value or one that is not finite.
        UsageError: The model is no module, the data is none, or a pattern of ``exclude`` matches
            no layer.
    """
    check_model(model)
    layers = tracked_layers(bare_module(model))
    unreachable = unreachable_layers(bare_module(model))
    if unreachable:
        log.warning(
            "the running statistics of %s are no buffers: left as they were",
            first_few(unreachable),
        )
    excluded = match_layers(exclude, layers) if layers else set()
    frozen = _find_frozen(bare_module(model), excluded)
    runtime = Runtime.on(device, model, amp=amp, batch_size=batch_size, workers=workers, seed=seed)
    if frozen and layers.keys() == {*frozen}:
        return BatchNormResult(0, 0, 0, frozen=frozen)
    peers = peers_of_group()
    loader = open_loader(data, runtime, shuffle=True, subset=as_subset(bn_samples), peers=peers)
    with open_phase(progress, "BatchNorm", "samples") as told, malloc.kept(runtime.device):
        batches = counted(loader, told or (lambda *_: None), peers, seed)
        kept = {*excluded, *frozen}
        result = recompute([model], batches, runtime, forward, [kept], peers)[0]
    return replace(
        result, frozen=(*frozen, *result.frozen), unknown=(*result.unknown, *unreachable)
    )


def _find_frozen(model: nn.Module, excluded: Collection[str]) -> tuple[str, ...]:
    """Find the layers that a model's own ``train()`` freezes, and say so."""
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
    if not any(tracked_layers(bare_module(model)) for model in models):
        log.info("the model has no BatchNorm layers with running statistics: nothing to recompute")
        return [BatchNormResult(0, 0, 0) for _ in models]
    seen, samples = 0, 0
    channels = Channels(models[0], runtime.device, scoring=False)
    with ExitStack() as stack, torch.no_grad():
        passes = [
            stack.enter_context(collecting(model, excluded, channels))
            for model, excluded in zip(models, exclude or [()] * len(models), strict=True)
        ]
        for batch in moved(batches, runtime.device):
            here = channels.arrange(batch.here)
            through = Through(forward or call, runtime, channels, here)
            for model_pass in passes:
                model_pass.take(through)
            seen += 1
            samples += size_of(batch.given)
        of_all = finish(passes, seen, peers or Alone())
    replace_all([change for model_pass in passes for change in model_pass.changes(of_all)])
    return [model_pass.result(seen, samples) for model_pass in passes]
