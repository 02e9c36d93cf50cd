"""Copies of checkpoints with recomputed BatchNorm statistics."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.lora import exact_mean
from ckptavg.averaging.pipeline import write_recomputed
from ckptavg.averaging.planning.tensor_plan import plan_copy
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.batchnorm.statistics_pass import statistics_of, uncounted_layers
from ckptavg.batchnorm.update import BatchNormResult
from ckptavg.errors import first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import REFRESHED, Provenance
from ckptavg.formats.running_statistics import match_layers
from ckptavg.outputs.provenance import build_provenance
from ckptavg.outputs.target import Target, prepare
from ckptavg.runs.discovery.nearby import leads_to_checkpoints

log = logging.getLogger("ckptavg")


def prepare_copy(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    provenance: Provenance,
    *,
    overwrite: bool,
) -> Target:
    """Prepare an output for a copy of all tensors of a checkpoint.

    Args:
        checkpoint: The checkpoint to copy.
        out: Path of the output.
        provenance: Provenance of the output.
        overwrite: Replace an existing output.

    Raises:
        CkptavgError: As for ``prepare``.
    """
    tensors = plan_copy(checkpoint).outputs
    return prepare(
        out, tensors, provenance, [checkpoint], is_run=leads_to_checkpoints, overwrite=overwrite
    )


def update_checkpoint(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    statistics_pass: StatisticsPass,
    *,
    overwrite: bool = False,
) -> tuple[BatchNormResult, Provenance]:
    """Write a copy of a checkpoint with recomputed statistics.

    Layers that were frozen in training keep their statistics where the checkpoint is an average
    that records frozen layers. If the checkpoint is an output with digests, the copy has digests
    too: the copy's own digest replaces the output's.

    Args:
        checkpoint: The checkpoint to copy.
        out: Path of the copy.
        statistics_pass: The model, the data and the settings of the pass.
        overwrite: Replace an existing output.

    Returns:
        The result of the pass, and the copy's provenance as written.

    Raises:
        CkptavgError: As for ``write_recomputed``.
        BatchNormError: No statistics of the checkpoint can be recomputed.
    """
    exact_mean.require_models([checkpoint])
    model = statistics_pass.model
    before = statistics_of(checkpoint, model)
    excluded = match_layers(statistics_pass.exclude, before.layers)
    if before.frozen and not excluded.union(before.frozen).issuperset(before.layers):
        log.info(
            "%d of %d BatchNorm layers are frozen in training and are kept as they are: %s",
            len(before.frozen), len(before.layers), first_few([*before.frozen]),
        )  # fmt: skip
    elif before.state == "own" and not excluded and uncounted_layers(checkpoint, model):
        log.info(
            "the checkpoint counts no batches, as after training with frozen BatchNorm: if it was "
            "frozen, keep the statistics by `update_bn(exclude='*')`"
        )
    provenance = checkpoint.provenance or build_provenance(REFRESHED, [checkpoint], [1.0], before)
    provenance = provenance.with_statistics(before)
    if provenance.digest is not None:
        provenance = provenance.with_digest()
    target = prepare_copy(checkpoint, out, provenance, overwrite=overwrite)
    (copied,), (result,) = write_recomputed(
        [target],
        [before],
        [str(checkpoint.path)],
        lambda *_: [read_state_dict(checkpoint)],
        replace(statistics_pass, required=True),
    )
    return result, copied
