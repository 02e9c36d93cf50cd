"""Checkpoints written with BatchNorm statistics recomputed for their weights."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ckptavg.averaging import api
from ckptavg.averaging.lora import exact_mean
from ckptavg.averaging.plan import Average
from ckptavg.averaging.planning.tensor_plan import copy_plan
from ckptavg.averaging.stream import Progress
from ckptavg.batchnorm.statistics_pass import (
    layers_of,
    recompute_statistics,
    statistics_of,
    uncounted_layers,
)
from ckptavg.batchnorm.update import BatchNormResult
from ckptavg.data.loaders import Progress as SampleProgress
from ckptavg.data.loaders import rereadable
from ckptavg.data.prefetch import counted
from ckptavg.distributed.processes import Alone, Peers
from ckptavg.errors import BatchNormError, NonFiniteError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.checkpoint import REFRESHED
from ckptavg.formats.running_statistics import Statistics, match_layers, with_statistics
from ckptavg.formats.state_dict import bare_names
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.device import Runtime, fit
from ckptavg.models.load import load_into
from ckptavg.models.oom_retry import Together, run_passes, say
from ckptavg.outputs import target as outputs
from ckptavg.outputs.digests import DIGEST, PENDING, InputDigests, is_recorded, recorded, sealed
from ckptavg.outputs.sinks import FileSink
from ckptavg.outputs.target import StateDict, Target
from ckptavg.runs.discovery.nearby import leads_to_checkpoints

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Pass:
    """How statistics are recomputed.

    Attributes:
        model: Takes the weights.
        training: This process's batches of the training data.
        runtime: Where and how the model runs.
        forward: ``forward(model, batch)`` for unusual batches.
        progress: Told about the samples passed.
        peers: The processes that share the data; the first of them writes.
        exclude: Shell patterns of layers that keep their statistics.
    """

    model: nn.Module
    training: Batches
    runtime: Runtime
    forward: Forward | None = None
    progress: SampleProgress = lambda *_: None
    peers: Peers = field(default_factory=Alone)
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
) -> list[tuple[BatchNormResult, Mapping[str, Any]]]:
    """Compute averages, recompute their statistics, then write them.

    As many averages as memory holds come from one read and share a pass over the data.

    Args:
        averages: What to compute.
        outs: Where each goes, as for ``averaging.write``.
        how: The model, the data, and where it runs.
        order: The run that all of them are selections of.
        overwrite: Replace existing outputs.
        keep_nonfinite: Write averages that are not finite as they are.
        digests: Record digests in the outputs, as for ``averaging.write``.
        progress: Told about the bytes read.

    Returns:
        For each, what was recomputed, and its provenance as written.

    Raises:
        CkptavgError: Whatever is wrong; nothing is written then.
    """
    exact_mean.require_models(c for planned in averages for c in planned.plan.checkpoints)
    excluded = match_layers(how.exclude, layers_of(averages))
    targets = api.prepare_many(
        list(zip(averages, outs, strict=True)), overwrite=overwrite, digests=digests
    )
    peers = Together(how.peers)
    groups = _groups(len(averages), how)
    how = replace(how, training=rereadable(how.training, len(groups)), peers=peers)
    hashed: InputDigests | None = None
    done: dict[int, tuple[BatchNormResult, Mapping[str, Any]]] = {}

    with _opened(targets, how.peers) as sinks:

        def run_pass(group: Sequence[int], number: int, of: int) -> None:
            nonlocal hashed
            del number, of
            if digests and not done:  # anew: a pass that failed may have seen half of a tensor
                hashed = InputDigests(c for p in averages for c in p.plan.inputs)
            weights = api.in_memory_many(
                [averages[i] for i in group], order=order, keep_nonfinite=keep_nonfinite,
                inputs=None if done else hashed, progress=progress, stale=False,
            )  # fmt: skip
            before = [averages[i].statistics for i in group]
            results = refresh(weights, how, [str(outs[i]) for i in group], before, excluded)
            for i, state_dict, (result, after) in zip(group, weights, results, strict=True):
                made = with_statistics(targets[i].made, after)
                target = outputs.change_provenance(targets[i], sinks[i], made)
                made = dict(target.made)
                if hashed is not None:
                    made = recorded(made, averages[i].plan.inputs, hashed.of)
                done[i] = result, outputs.fill(target, sinks[i], state_dict, made)
            peers.agree()

        run_passes(groups, run_pass, how.runtime, peers)
    return [done[i] for i in range(len(averages))]


def prepare_copy(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    made: Mapping[str, Any],
    *,
    overwrite: bool,
) -> outputs.Target:
    """Prepare an output that takes all tensors of a checkpoint; see ``outputs.prepare``."""
    tensors = copy_plan(checkpoint).outputs
    return outputs.prepare(
        out, tensors, made, [checkpoint], is_run=leads_to_checkpoints, overwrite=overwrite
    )


def update_checkpoint(
    checkpoint: Checkpoint, out: str | os.PathLike[str], how: Pass, *, overwrite: bool = False
) -> tuple[BatchNormResult, Mapping[str, Any]]:
    """Write a copy of a checkpoint with recomputed statistics; see ``write_averages``.

    Layers whose statistics were frozen in training keep them, where the checkpoint is an average
    that tells of them. The copy of an output with digests has them too, with its own in place of
    the output's.

    Returns:
        What was recomputed, and the copy's provenance as written.
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
    made = with_statistics(
        checkpoint.provenance or outputs.provenance(REFRESHED, [checkpoint], [1.0], before), before
    )
    if is_recorded(made):
        made = sealed(made | {DIGEST: PENDING})
    target = prepare_copy(checkpoint, out, made, overwrite=overwrite)
    peers = Together(how.peers)
    how = replace(how, peers=peers)
    done: list[tuple[BatchNormResult, Mapping[str, Any]]] = []
    with _opened([target], how.peers) as (sink,):

        def run_pass(group: Sequence[Checkpoint], number: int, of: int) -> None:
            del group, number, of
            weights = api.load(checkpoint)
            (found,) = refresh([weights], how, [str(checkpoint.path)], [before], excluded)
            result, after = found
            if after.not_recomputed and not result.layers:
                raise BatchNormError(
                    f"no statistics of {checkpoint.path} can be recomputed: not those of "
                    f"{first_few(list(after.not_recomputed))}",
                    "Recompute them with the model's own code.",
                )
            filled = outputs.change_provenance(target, sink, with_statistics(target.made, after))
            done.append((result, outputs.fill(filled, sink, weights, filled.made)))
            peers.agree()

        run_passes([[checkpoint]], run_pass, how.runtime, peers)
    return done[0]


def refresh(
    weights: Sequence[StateDict],
    how: Pass,
    origins: Sequence[str],
    before: Sequence[Statistics],
    excluded: Collection[str],
) -> list[tuple[BatchNormResult, Statistics]]:
    """Replace the running statistics in state dicts by ones recomputed for their weights.

    Args:
        weights: State dicts that share a pass over the data; changed.
        how: The model, the data, and where it runs.
        origins: What each state dict is, for messages.
        before: The state of each one's statistics.
        excluded: Names of layers that keep theirs.

    Returns:
        For each, what was recomputed, with the batches and samples of all processes, and the state
        of its statistics now.
    """
    models = [how.model, *(copy.deepcopy(how.model) for _ in weights[1:])]
    for model, state_dict, origin in zip(models, weights, origins, strict=True):
        load_into(model, state_dict, origin)
    batches = counted(how.training, how.progress, how.peers, how.runtime.seed)
    with malloc.kept(how.runtime.device):
        results = recompute_statistics(
            models, before, excluded, batches, how.runtime, how.forward, how.peers
        )
    for model, state_dict, (result, _) in zip(models, weights, results, strict=True):
        for name, value in _statistics(model, result.written).items():
            if name in state_dict:
                state_dict[name] = _narrowed(name, value, state_dict[name])
    passed = max((result for result, _ in results), key=lambda result: result.batches)
    seen = how.peers.gather([passed.batches, passed.samples])
    batches_of_all, samples_of_all = (sum(counts) for counts in zip(*seen, strict=True))
    return [
        (replace(r, batches=batches_of_all, samples=samples_of_all) if r.layers else r, after)
        for r, after in results
    ]


@contextmanager
def _opened(targets: Sequence[Target], peers: Peers) -> Iterator[Sequence[FileSink | None]]:
    """Sinks for outputs in the first process, none in the others, which wait for it."""
    if peers.rank:
        yield [None] * len(targets)
    else:
        with outputs.opened(targets) as sinks:
            yield sinks
    peers.gather(None)


def _groups(count: int, how: Pass) -> list[range]:
    """Which of so many averages go through the data together: as many as memory holds."""
    # Each is there twice: as a state dict, and in its model.
    size = max(1, min(how.peers.gather(fit(how.model, how.runtime.device) // 2)))
    groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
    say(count, len(groups))
    return groups


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


def _statistics(model: nn.Module, written: frozenset[str]) -> Mapping[str, torch.Tensor]:
    """The recomputed statistics of a model, and the counts of batches beside them.

    Args:
        model: It.
        written: Names of the statistics in its state dict.

    Returns:
        Tensors by bare names.
    """
    states = model.state_dict()
    bare = bare_names(list(states))
    counts = {f"{name.rpartition('.')[0]}.num_batches_tracked".lstrip(".") for name in written}
    return {
        bare.get(name, name): states[name].detach().cpu()
        for name in written | counts
        if name in states
    }
