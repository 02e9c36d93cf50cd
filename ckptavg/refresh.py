"""Checkpoints written with BatchNorm statistics recomputed for their weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg import averaging, lora, outputs
from ckptavg.averaging import Average
from ckptavg.batches import Batches, Forward, Runtime
from ckptavg.batchnorm import BatchNormResult, recompute, tracked_layers
from ckptavg.batchnorm import Progress as BatchProgress
from ckptavg.digests import DIGEST, PENDING, InputDigests, is_recorded, recorded, sealed
from ckptavg.errors import NonFiniteError
from ckptavg.formats import Checkpoint
from ckptavg.formats.table import REFRESHED
from ckptavg.formats.weights import bare_names
from ckptavg.loading import load_into
from ckptavg.outputs import StateDict
from ckptavg.stream import Progress

RECOMPUTED = "recomputed"


def write_average(
    planned: Average,
    out: str | os.PathLike[str],
    model: nn.Module,
    data: Batches | Dataset[Any],
    runtime: Runtime,
    *,
    forward: Forward | None = None,
    overwrite: bool = False,
    keep_nonfinite: bool = False,
    digests: bool = False,
    progress: Progress | None = None,
    batch_progress: BatchProgress | None = None,
) -> tuple[BatchNormResult, Mapping[str, Any]]:
    """Compute an average, recompute its statistics, then write it.

    Args:
        planned: The average.
        out: The output, as for ``averaging.write``.
        model: Takes the weights.
        data: Training data, a Dataset or a loader.
        runtime: Where and how the model runs.
        forward: ``forward(model, batch)`` for unusual batches.
        overwrite: Replace an existing output.
        keep_nonfinite: Write an average that is not finite as it is.
        digests: Record digests in the output, as for ``averaging.write``.
        progress: Told about the bytes read.
        batch_progress: Told about the batches passed.

    Returns:
        What was recomputed, and the provenance as written.

    Raises:
        CkptavgError: Whatever is wrong; nothing is written then.
    """
    lora.require_models(planned.plan.checkpoints)
    averaging.prepare(planned, out, overwrite=overwrite, batchnorm=RECOMPUTED)
    hashed = InputDigests(planned.plan.inputs) if digests else None
    weights = averaging.in_memory(
        planned, keep_nonfinite=keep_nonfinite, inputs=hashed, progress=progress, stale=False
    )
    result = refresh(weights, model, data, runtime, str(out), forward, batch_progress)
    made, inputs = planned.provenance(RECOMPUTED), [*planned.plan.files]
    inputs.append(planned.plan.checkpoints[-1])
    if hashed is not None:
        made = recorded(made, planned.plan.inputs, hashed.of)
    return result, outputs.save(weights, out, made, inputs, overwrite=overwrite)


def update_checkpoint(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    model: nn.Module,
    data: Batches | Dataset[Any],
    runtime: Runtime,
    *,
    forward: Forward | None = None,
    overwrite: bool = False,
    batch_progress: BatchProgress | None = None,
) -> BatchNormResult:
    """Write a copy of a checkpoint with recomputed statistics; see ``write_average``.

    The copy of an output with digests has them too, with its own in place of the output's.
    """
    lora.require_models([checkpoint])
    made = dict(checkpoint.provenance or outputs.provenance(REFRESHED, [checkpoint], [1.0], ""))
    made["bn"] = RECOMPUTED
    if is_recorded(made):
        made = sealed(made | {DIGEST: PENDING})
    outputs.prepare_copy(checkpoint, out, made, overwrite=overwrite)
    weights = averaging.load(checkpoint)
    result = refresh(weights, model, data, runtime, str(checkpoint.path), forward, batch_progress)
    outputs.save(weights, out, made, [checkpoint], overwrite=overwrite)
    return result


def refresh(
    weights: StateDict,
    model: nn.Module,
    data: Batches | Dataset[Any],
    runtime: Runtime,
    origin: str,
    forward: Forward | None = None,
    progress: BatchProgress | None = None,
) -> BatchNormResult:
    """Replace the running statistics in a state dict by ones recomputed for its weights."""
    load_into(model, weights, origin)
    result = recompute([model], data, runtime, forward, progress=progress)[0]
    for name, value in _statistics(model).items():
        if name in weights:
            weights[name] = _narrowed(name, value, weights[name])
    return result


def _narrowed(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A statistic in the type that the checkpoint stores it in.

    Raises:
        NonFiniteError: It is too large for that type.
    """
    narrowed = value.to(like.dtype).reshape(like.shape)
    if not bool(torch.isfinite(narrowed).all()):
        raise NonFiniteError(
            f"{name} is too large for {str(like.dtype).removeprefix('torch.')}",
            "Write a wider type with --dtype float32.",
        )
    return narrowed


def _statistics(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The running statistics of a model under bare names."""
    bare = bare_names(list(model.state_dict()))
    found: StateDict = {}
    tracked = set(tracked_layers(model).values())
    for name, layer in model.named_modules(remove_duplicate=False):
        if layer not in tracked:
            continue
        for key, value in layer.named_buffers(recurse=False):
            full = f"{name}.{key}".lstrip(".")
            found[bare.get(full, full)] = value.detach().cpu()
    return found
