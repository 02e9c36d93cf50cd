"""Averages computed into state dicts, or into the sinks of outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from ckptavg.averaging import remarks, schemes, spectral_vectors
from ckptavg.averaging.plan import Average
from ckptavg.averaging.planning.tensor_plan import Plan, plan_copy
from ckptavg.averaging.read_groups import Job, common_order
from ckptavg.averaging.sharding import ShardedWrite
from ckptavg.averaging.stream import Progress, StreamRequests, stream
from ckptavg.errors import NonFiniteError, PlacementError
from ckptavg.formats import Checkpoint
from ckptavg.io.stamp import FileStamp
from ckptavg.outputs.digests import InputDigests
from ckptavg.outputs.sinks import MemorySink, Sink, StateDict


def compute_state_dicts(
    averages: Sequence[Average],
    *,
    order: Sequence[Checkpoint] = (),
    keep_nonfinite: bool = False,
    inputs: InputDigests | None = None,
    progress: Progress | None = None,
) -> list[StateDict]:
    """Compute several averages as state dicts, from one read of the inputs.

    Args:
        averages: The averages to compute.
        order: The checkpoints of the run that all averages are selections of, in order. Where
            empty, an order is searched that agrees with every average's order. Where there is no
            such order, since two averages take checkpoints in opposite orders, the inputs are read
            for each average separately.
        keep_nonfinite: Return averages that are not finite as they are.
        inputs: Hashes the inputs as they are read.
        progress: Called with the bytes read and the total of bytes to read.

    Returns:
        The state dict of each average, under bare names.

    Raises:
        CkptavgError: As for ``average``.
    """
    order = order or common_order([planned.plan.checkpoints for planned in averages])
    # Without a common order, each average has a read of its own.
    groups = [averages] if order or len(averages) < 2 else [[planned] for planned in averages]
    state_dicts: list[StateDict] = []
    for group in groups:
        sinks = [MemorySink(planned.plan.outputs) for planned in group]
        requests = request_stream(order, inputs)
        compute_into(group, sinks, requests, keep_nonfinite=keep_nonfinite, progress=progress)
        # The first read has hashed the inputs.
        inputs = None
        state_dicts += [sink.state_dict for sink in sinks]
    return state_dicts


def request_stream(order: Sequence[Checkpoint], inputs: InputDigests | None) -> StreamRequests:
    """Request the order of a stream, and the bytes of checkpoints to hash.

    Args:
        order: The checkpoints of the run that all averages are selections of, in order.
        inputs: Hashes the inputs as they are read.
    """
    if inputs is None:
        return StreamRequests(order)
    return StreamRequests(order, observed=inputs.tensors, observer=inputs.watch)


def compute_into(
    averages: Sequence[Average],
    sinks: Sequence[Sink],
    requests: StreamRequests,
    *,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
    sharded: ShardedWrite | None = None,
) -> torch.Tensor | None:
    """Stream averages into sinks, and log the results.

    Args:
        averages: The averages to compute.
        sinks: Sink of each average.
        requests: Further work on the tensors that are read.
        keep_nonfinite: Write averages that are not finite as they are.
        progress: Called with the bytes read and the total of bytes to read.
        sharded: The part of the outputs that this process computes; all of them where None.

    Returns:
        The products that are requested; None where there are none.

    Raises:
        CkptavgError: As for ``average``.
    """
    plans = [planned.plan for planned in averages]
    tensors = [plan.tensors for plan in plans] if sharded is None else sharded.tensors
    jobs: list[Job] = []
    for plan, plan_tensors, sink in zip(plans, tensors, sinks, strict=True):
        vectors = spectral_vectors.vector_names(plan)
        # Singular vectors come after the stream: they are computed from the averaged weights.
        jobs.append(Job([t for t in plan_tensors if t.name not in vectors], sink, keep_nonfinite))
    compute = stream if sharded is None else sharded.stream
    try:
        outcome = compute(jobs, requests, progress=progress)
    except (NonFiniteError, PlacementError):
        # If another program has changed an input meanwhile, that is the better report.
        _verify_unchanged(plans)
        raise
    # The power iteration needs whole weights, and each process of a group has only parts.
    if sharded is None or sharded.processes.rank == 0:
        for plan, plan_tensors, sink in zip(plans, tensors, sinks, strict=True):
            spectral_vectors.write_vectors(plan, plan_tensors, sink)
    _verify_unchanged(plans)
    # Logged last: notes on an average that is refused after all would mislead.
    remarks.log_results(plans, outcome.results)
    return outcome.gram


def read_state_dict(checkpoint: Checkpoint) -> StateDict:
    """Read the tensors of a checkpoint unchanged, under bare names.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
        CheckpointError: A file cannot be read, or has changed.
    """
    plan = plan_copy(checkpoint)
    sink = MemorySink(plan.outputs)
    stream([Job(plan.tensors, sink)])
    _verify_unchanged([plan])
    return sink.state_dict


def as_average(checkpoint: Checkpoint) -> Average:
    """Plan the average of a single checkpoint, which has the checkpoint's own values.

    Such a plan can share one read of the inputs with other averages.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
    """
    plan = plan_copy(checkpoint)
    # Only tensors that are alike averaged or alike copied share a read with other averages.
    tensors = (replace(t, averaged=t.dtype.kind in ("float", "complex")) for t in plan.tensors)
    return Average(replace(plan, tensors=tuple(tensors)), schemes.parse("uniform"))


def _verify_unchanged(plans: Iterable[Plan]) -> None:
    """Make sure that no input file has changed since the checkpoints were opened."""
    stamps: dict[str, FileStamp] = {}
    for plan in plans:
        for checkpoint in plan.files:
            stamps |= {stamp.path: stamp for stamp in checkpoint.files}
    for stamp in stamps.values():
        stamp.verify()
