"""Checkpoints and averages with recomputed BatchNorm statistics, written to outputs."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ckptavg.averaging import api
from ckptavg.averaging.lora import exact_mean
from ckptavg.averaging.plan import Average
from ckptavg.averaging.planning.tensor_plan import plan_copy
from ckptavg.averaging.stream import Progress
from ckptavg.batchnorm.statistics_pass import (
    layers_of,
    recompute_statistics,
    statistics_of,
    uncounted_layers,
)
from ckptavg.batchnorm.update import BatchNormResult
from ckptavg.data.loaders import Progress as SampleProgress
from ckptavg.data.loaders import require_reiterable
from ckptavg.data.prefetch import with_progress
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.errors import BatchNormError, NonFiniteError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import REFRESHED, Provenance
from ckptavg.formats.running_statistics import Statistics, match_layers
from ckptavg.formats.wrappers import bare_names
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.device import Runtime, count_models_that_fit
from ckptavg.models.load import load_into
from ckptavg.models.oom_retry import OomSynchronizedPeers, log_pass_count, run_in_groups_that_fit
from ckptavg.outputs import target as outputs
from ckptavg.outputs.digests import InputDigests
from ckptavg.outputs.provenance import build_provenance, with_digests
from ckptavg.outputs.sinks import FileSink
from ckptavg.outputs.target import StateDict, Target
from ckptavg.runs.discovery.nearby import leads_to_checkpoints

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Pass:
    """Settings of a pass that recomputes statistics.

    Attributes:
        model: The module that the weights are loaded into.
        training: This process's batches of the training data.
        runtime: Device, precision and batch size of the pass.
        forward: ``forward(model, batch)`` for unusual batches.
        progress: Called as ``progress(done, total)`` in samples.
        peers: The processes that share the data. The first process writes the outputs.
        exclude: Shell patterns of layers that keep their statistics.
    """

    model: nn.Module
    training: Batches
    runtime: Runtime
    forward: Forward | None = None
    progress: SampleProgress = lambda *_: None
    peers: Peers = field(default_factory=SingleProcess)
    exclude: Sequence[str] = ()


def write_averages(
    averages: Sequence[Average],
    outs: Sequence[str | os.PathLike[str]],
    how: Pass,
    *,
    order: Sequence[Checkpoint] = (),
    overwrite: bool = False,
    keep_nonfinite: bool = False,
    digests: bool = False,
    progress: Progress | None = None,
) -> list[tuple[BatchNormResult, Provenance]]:
    """Compute averages, recompute running statistics, and write the results.

    As many averages as fit in memory are computed in one read and share a pass over the data.

    Args:
        averages: The averages to compute.
        outs: Path of each output, as for ``averaging.write``.
        how: The model, the data and the settings of the pass.
        order: The run that all averages select their checkpoints from.
        overwrite: Replace existing outputs.
        keep_nonfinite: Write averages that are not finite as they are.
        digests: Record digests in the outputs, as for ``averaging.write``.
        progress: Called as ``progress(done, total)`` in bytes read.

    Returns:
        Per average, the result of the pass and the provenance as written.

    Raises:
        CkptavgError: Any failure. Nothing is written then.
    """
    exact_mean.require_models(c for planned in averages for c in planned.plan.checkpoints)
    excluded = match_layers(how.exclude, layers_of(averages))
    # Outputs are prepared before the pass, so that a wrong path fails at once.
    targets = api.prepare_many(
        list(zip(averages, outs, strict=True)), overwrite=overwrite, digests=digests
    )
    peers = OomSynchronizedPeers(how.peers)
    groups = _groups(len(averages), how)
    # Each group reads the data once more.
    how = replace(how, training=require_reiterable(how.training, len(groups)), peers=peers)
    hashed: InputDigests | None = None
    written: dict[int, tuple[BatchNormResult, Provenance]] = {}

    with _opened(targets, how.peers) as sinks:

        def run_pass(group: Sequence[int], number: int, of: int) -> None:
            """Compute, refresh and store one group of averages."""
            nonlocal hashed
            del number, of
            # Start the digests anew: a pass that failed may have hashed half of a tensor.
            if digests and not written:
                hashed = InputDigests(c for p in averages for c in p.plan.inputs)
            weights = api.in_memory_many(
                [averages[i] for i in group], order=order, keep_nonfinite=keep_nonfinite,
                inputs=None if written else hashed, progress=progress, stale=False,
            )  # fmt: skip
            before = [averages[i].statistics for i in group]
            results = refresh(weights, how, [str(outs[i]) for i in group], before, excluded)
            for i, state_dict, (result, after) in zip(group, weights, results, strict=True):
                provenance = targets[i].provenance.with_statistics(after)
                target = outputs.change_provenance(targets[i], sinks[i], provenance)
                provenance = target.provenance
                if hashed is not None:
                    provenance = with_digests(provenance, averages[i].plan.inputs, hashed.of)
                written[i] = result, outputs.fill(target, sinks[i], state_dict, provenance)
            peers.agree()

        run_in_groups_that_fit(groups, run_pass, how.runtime, peers)
    return [written[i] for i in range(len(averages))]


def prepare_copy(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    provenance: Provenance,
    *,
    overwrite: bool,
) -> outputs.Target:
    """Prepare an output for a copy of all tensors of a checkpoint.

    Args:
        checkpoint: The checkpoint to copy.
        out: Path of the output.
        provenance: Provenance of the output.
        overwrite: Replace an existing output.

    Raises:
        CkptavgError: As for ``outputs.prepare``.
    """
    tensors = plan_copy(checkpoint).outputs
    return outputs.prepare(
        out, tensors, provenance, [checkpoint], is_run=leads_to_checkpoints, overwrite=overwrite
    )


def update_checkpoint(
    checkpoint: Checkpoint, out: str | os.PathLike[str], how: Pass, *, overwrite: bool = False
) -> tuple[BatchNormResult, Provenance]:
    """Write a copy of a checkpoint with recomputed statistics.

    Layers that were frozen in training keep their statistics where the checkpoint is an average
    that records frozen layers. If the checkpoint is an output with digests, the copy has digests
    too: the copy's own digest replaces the output's.

    Args:
        checkpoint: The checkpoint to copy.
        out: Path of the copy.
        how: The model, the data and the settings of the pass.
        overwrite: Replace an existing output.

    Returns:
        The result of the pass, and the copy's provenance as written.

    Raises:
        CkptavgError: As for ``write_averages``.
        BatchNormError: No statistics of the checkpoint can be recomputed.
    """
    exact_mean.require_models([checkpoint])
    before = statistics_of(checkpoint, how.model)
    excluded = match_layers(how.exclude, before.layers)
    if before.frozen and not excluded.union(before.frozen).issuperset(before.layers):
        log.info(
            "%d of %d BatchNorm layers are frozen in training and are kept as they are: %s",
            len(before.frozen), len(before.layers), first_few([*before.frozen]),
        )  # fmt: skip
    elif before.state == "own" and not excluded and uncounted_layers(checkpoint, how.model):
        log.info(
            "the checkpoint counts no batches, as where BatchNorm was frozen in training: if it was"
            ", keep its statistics by exclude='*', --bn-exclude '*' on the command line"
        )
    provenance = checkpoint.provenance or build_provenance(REFRESHED, [checkpoint], [1.0], before)
    provenance = provenance.with_statistics(before)
    if provenance.digest is not None:
        provenance = provenance.with_digest()
    target = prepare_copy(checkpoint, out, provenance, overwrite=overwrite)
    peers = OomSynchronizedPeers(how.peers)
    how = replace(how, peers=peers)
    written: list[tuple[BatchNormResult, Provenance]] = []
    with _opened([target], how.peers) as (sink,):

        def run_pass(group: Sequence[Checkpoint], number: int, of: int) -> None:
            """Refresh and store the copy."""
            del group, number, of
            weights = api.load(checkpoint)
            (refreshed,) = refresh([weights], how, [str(checkpoint.path)], [before], excluded)
            result, after = refreshed
            if after.not_recomputed and not result.layers:
                raise BatchNormError(
                    f"no statistics of {checkpoint.path} can be recomputed: not those of "
                    f"{first_few(list(after.not_recomputed))}",
                    "Recompute them with the model's own code.",
                )
            filled = outputs.change_provenance(
                target, sink, target.provenance.with_statistics(after)
            )
            written.append((result, outputs.fill(filled, sink, weights, filled.provenance)))
            peers.agree()

        run_in_groups_that_fit([[checkpoint]], run_pass, how.runtime, peers)
    return written[0]


def refresh(
    weights: Sequence[StateDict],
    how: Pass,
    origins: Sequence[str],
    before: Sequence[Statistics],
    excluded: Collection[str],
) -> list[tuple[BatchNormResult, Statistics]]:
    """Replace the running statistics in state dicts by recomputed statistics.

    Args:
        weights: State dicts that share a pass over the data. The state dicts are changed.
        how: The model, the data and the settings of the pass.
        origins: Path of each state dict, for messages.
        before: State of the statistics before the pass, per state dict.
        excluded: Names of layers that keep their statistics.

    Returns:
        Per state dict, the result of the pass, and the state of the statistics afterwards. The
        result counts the batches and samples of all processes.

    Raises:
        BatchNormError: As for ``update_bn``.
        ModelError: A state dict does not fit the model.
        NonFiniteError: A statistic is too large for the dtype in which it is stored.
    """
    # Each state dict needs a module of its own, since all go through one pass together.
    models = [how.model, *(copy.deepcopy(how.model) for _ in weights[1:])]
    for model, state_dict, origin in zip(models, weights, origins, strict=True):
        load_into(model, state_dict, origin)
    batches = with_progress(how.training, how.progress, how.peers, how.runtime.seed)
    with malloc.keep_freed_memory(how.runtime.device):
        results = recompute_statistics(
            models, before, excluded, batches, how.runtime, how.forward, how.peers
        )
    for model, state_dict, (result, _) in zip(models, weights, results, strict=True):
        for name, value in _statistics(model, result.written).items():
            if name in state_dict:
                state_dict[name] = _narrowed(name, value, state_dict[name])
    # A model without layers to recompute takes no part in the pass and has counts of 0.
    passed = max((result for result, _ in results), key=lambda result: result.batches)
    counts_of_peers = how.peers.gather([passed.batches, passed.samples])
    batches_of_all, samples_of_all = (sum(counts) for counts in zip(*counts_of_peers, strict=True))
    return [
        (replace(r, batches=batches_of_all, samples=samples_of_all) if r.layers else r, after)
        for r, after in results
    ]


@contextmanager
def _opened(targets: Sequence[Target], peers: Peers) -> Iterator[Sequence[FileSink | None]]:
    """Open sinks for outputs in the first process.

    Other processes get None for each output and wait until the first process has written.
    """
    if peers.rank:
        yield [None] * len(targets)
    else:
        with outputs.opened(targets) as sinks:
            yield sinks
    peers.gather(None)


def _groups(count: int, how: Pass) -> list[range]:
    """Divide averages into groups that fit in memory and share a pass over the data."""
    # Each average is in memory twice: as a state dict, and in a copy of the model.
    size = max(1, min(how.peers.gather(count_models_that_fit(how.model, how.runtime.device) // 2)))
    groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
    log_pass_count(count, len(groups))
    return groups


def _narrowed(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Convert a statistic to the dtype and shape of the checkpoint.

    Raises:
        NonFiniteError: The statistic is too large for that dtype.
    """
    narrowed = value.to(like.dtype).reshape(like.shape)
    if not bool(torch.isfinite(narrowed).all()):
        raise NonFiniteError(
            f"{name} is too large for {str(like.dtype).removeprefix('torch.')}",
            "Write a wider type with --dtype float32.",
        )
    return narrowed


def _statistics(model: nn.Module, written: frozenset[str]) -> Mapping[str, torch.Tensor]:
    """Select the recomputed statistics of a model, with the layers' counts of batches.

    Args:
        model: The model after the pass.
        written: Names of the recomputed statistics in the model's state dict.

    Returns:
        Tensors on the CPU, by bare name.
    """
    states = model.state_dict()
    bare = bare_names(list(states))
    counts = {f"{name.rpartition('.')[0]}.num_batches_tracked".lstrip(".") for name in written}
    return {
        bare.get(name, name): states[name].detach().cpu()
        for name in written | counts
        if name in states
    }
