"""Averages of a run: planned, streamed, and written with a provenance."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from ckptavg.averaging import remarks, schemes, spectral_vectors
from ckptavg.averaging.accounts import with_provenance
from ckptavg.averaging.plan import Average, Planned, plan_average
from ckptavg.averaging.planning.rules import parse_on_nonfinite, require_output
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan, plan_copy
from ckptavg.averaging.read_groups import Job, common_order
from ckptavg.averaging.sharding import Split
from ckptavg.averaging.stream import Progress, StreamRequests, stream
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import NonFiniteError, PlacementError
from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.io.stamp import FileStamp
from ckptavg.outputs import target as outputs
from ckptavg.outputs.digests import LEAF, InputDigests, OutputDigest
from ckptavg.outputs.provenance import with_digests
from ckptavg.outputs.sinks import FileSink, MemorySink, Sink
from ckptavg.outputs.target import StateDict, Target
from ckptavg.runs.discovery.nearby import leads_to_checkpoints
from ckptavg.runs.run import RunLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ckptavg.averaging.keywords import AverageOptions


@overload
def average(
    run: RunLike, scheme: str = ..., *, out: None = ..., **options: Unpack[AverageOptions]
) -> StateDict: ...


@overload
def average(
    run: RunLike,
    scheme: str = ...,
    *,
    out: str | os.PathLike[str],
    **options: Unpack[AverageOptions],
) -> Path: ...


@overload
def average(
    run: RunLike,
    scheme: str = ...,
    *,
    out: str | os.PathLike[str] | None,
    **options: Unpack[AverageOptions],
) -> StateDict | Path: ...


def average(
    run: RunLike,
    scheme: str = "uniform",
    *,
    weights: Sequence[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    on_nonfinite: str = "error",
    digests: bool = False,
    progress: ProgressLike = None,
) -> StateDict | Path:
    """Average the checkpoints of a run.

    Floats are averaged in float64 and rounded once to the output type. Integers and bools come from
    the last checkpoint. Memory does not grow with the number of checkpoints and, with ``out``, not
    with their size. BatchNorm statistics are averaged too, which makes them stale. A warning says
    so: see ``update_bn``.

    Args:
        run: The result of ``open_run``, or a selection of it; or the path of a run.
        scheme: ``NAME[:key=value,...]``, see ``ckptavg.averaging.schemes.parse``.
        weights: One number per checkpoint instead of a scheme. The numbers are normalized.
        out: Path of the output: with the suffix ``.safetensors``, with a suffix of ``torch.save``,
            or a directory (Hugging Face). None returns the state dict instead.
        include: Shell patterns of tensor names to average; all where empty.
        exclude: Shell patterns of tensor names not to average.
        base: The checkpoint that all other tensors come from; the last one where None.
        dtype: Type of the output's floats: ``keep``, ``float32``, ``bfloat16``, ``float16`` or
            ``float64``.
        overwrite: Replace an existing output.
        on_nonfinite: ``error``, or ``keep`` to write an average that is not finite.
        digests: Record digests of the inputs and of the output in the output, see
            ``ckptavg.outputs.digests``. All weights of the inputs are read then.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in bytes
            read; see ``ckptavg.display.progress``.

    Returns:
        The state dict under bare names, or the path of the output.

    Warns:
        StaleStatisticsWarning: BatchNorm statistics are not those of the averaged weights.

    Raises:
        MismatchError: The checkpoints do not hold the same tensors.
        NonFiniteError: An average is not finite.
        OutputError: The output may not or could not be written.
        CkptavgError: Another error. Nothing is written then.
    """
    planned = plan_average(
        run, scheme, weights=weights, include=include, exclude=exclude, base=base, dtype=dtype
    )
    keep = parse_on_nonfinite(on_nonfinite)
    result: StateDict | Path
    with open_phase(progress, "averaging", "bytes") as report:
        if out is None:
            require_output(digests=digests)
            result = in_memory(planned, keep_nonfinite=keep, progress=report, stale=False)
            result = with_provenance(result, planned.provenance())
        else:
            result = write(
                planned, out, overwrite=overwrite, keep_nonfinite=keep, digests=digests,
                progress=report, stale=False,
            )  # fmt: skip
    remarks.warn_of_stale({"": planned.statistics})
    return result


def write(
    planned: Average,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep_nonfinite: bool = False,
    digests: bool = False,
    progress: Progress | None = None,
    stale: bool = True,
) -> Path:
    """Compute an average and write the output, block by block.

    Args:
        planned: The average.
        out: Path of the output.
        overwrite: Replace an existing output.
        keep_nonfinite: Write an average that is not finite as it is.
        digests: Record digests in the output.
        progress: Called with the bytes read and the total of bytes to read.
        stale: Log a note if statistics are stale; False if the caller says so itself.

    Returns:
        The path of the output.

    Raises:
        OutputError: The output may not or could not be written.
        CkptavgError: As for ``average``.
    """
    targets = prepare_many([(planned, out)], overwrite=overwrite, digests=digests)
    settings: dict[str, Any] = {"keep_nonfinite": keep_nonfinite, "digests": digests}
    write_many([planned], targets, **settings, progress=progress, stale=stale)
    return Path(out)


@dataclass(frozen=True)
class Written:
    """Result of writing outputs.

    Attributes:
        provenances: The provenance of each output.
        gram: The requested products: float64, (sources, sources); None where none were requested.
    """

    provenances: Sequence[Provenance]
    gram: torch.Tensor | None


def write_many(
    averages: Sequence[Average],
    targets: Sequence[Target],
    *,
    order: Sequence[Checkpoint] = (),
    keep_nonfinite: bool = False,
    digests: bool = False,
    gram: Sequence[TensorPlan] = (),
    progress: Progress | None = None,
    stale: bool = True,
    processes: TorchrunGroup | None = None,
) -> Written:
    """Compute several averages from one read of the inputs, and write the outputs block by block.

    Args:
        averages: The averages to compute.
        targets: The output of each average, from ``prepare_many`` with the same ``digests``.
        order: The checkpoints of the run that all averages are selections of, in order.
        keep_nonfinite: Write averages that are not finite as they are.
        digests: Record digests in the outputs.
        gram: Tensors whose sources are multiplied with each other during the read.
        progress: Called with the bytes read and the total of bytes to read.
        stale: Log a note if statistics are stale; False if the caller says so itself.
        processes: The processes that make the outputs together. Each of them calls this function
            with the same arguments.

    Returns:
        The provenance of each output, and the products.

    Raises:
        OutputError: An output may not or could not be written.
        ProcessesError: Another process has failed, or has other arguments.
    """
    settings: dict[str, Any] = {
        "keep_nonfinite": keep_nonfinite, "progress": progress, "stale": stale,
    }  # fmt: skip
    split = None
    if processes is not None:
        # A leaf is hashed by a single process, so that it must not be split.
        grain = LEAF if digests else 1
        split = Split(processes, targets, [planned.plan for planned in averages], grain)
    with outputs.opened(targets) if split is None else split.opened() as files:
        if digests:
            return _compute_hashed(
                averages, targets, files, StreamRequests(order, gram), split, settings
            )
        products = _compute(averages, files, StreamRequests(order, gram), split=split, **settings)
    return Written([target.provenance for target in targets], products)


def _compute_hashed(
    averages: Sequence[Average],
    targets: Sequence[Target],
    files: Sequence[FileSink],
    requests: StreamRequests,
    split: Split | None,
    settings: Mapping[str, Any],
) -> Written:
    """Compute averages as ``_compute`` does, and store digests of inputs and outputs.

    The outputs are opened with placeholders for the digests. Each provenance is rewritten in place
    once the digests are known.
    """
    inputs = InputDigests(c for planned in averages for c in planned.plan.inputs)
    sinks = [OutputDigest(f, t.tensors) for f, t in zip(files, targets, strict=True)]
    products = _compute(averages, sinks, requests, inputs=inputs, split=split, **settings)
    if split is not None:
        split.unite([inputs.leaves, *(sink.leaves for sink in sinks)])
    provenances: list[Provenance] = []
    for planned, target, file, sink in zip(averages, targets, files, sinks, strict=True):
        provenance = with_digests(target.provenance, planned.plan.inputs, inputs.of, sink.digest)
        # The other processes write tensors only.
        if split is None or split.processes.rank == 0:
            outputs.rewrite_provenance(target, file, provenance)
        provenances.append(provenance)
    return Written(provenances, products)


def in_memory(
    planned: Average,
    *,
    keep_nonfinite: bool = False,
    inputs: InputDigests | None = None,
    progress: Progress | None = None,
    stale: bool = True,
) -> StateDict:
    """Compute an average as a state dict.

    Args:
        planned: The average.
        keep_nonfinite: Return an average that is not finite as it is.
        inputs: Hashes the inputs as they are read.
        progress: Called with the bytes read and the total of bytes to read.
        stale: Log a note if statistics are stale; False if the caller says so itself or will
            recompute the statistics.

    Returns:
        The state dict under bare names.

    Raises:
        CkptavgError: As for ``average``.
    """
    (state_dict,) = in_memory_many(
        [planned], keep_nonfinite=keep_nonfinite, inputs=inputs, progress=progress, stale=stale
    )
    return state_dict


def in_memory_many(
    averages: Sequence[Average],
    *,
    order: Sequence[Checkpoint] = (),
    keep_nonfinite: bool = False,
    inputs: InputDigests | None = None,
    progress: Progress | None = None,
    stale: bool = True,
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
        stale: Log a note if statistics are stale; False if the caller says so itself.

    Returns:
        The state dict of each average, under bare names.

    Raises:
        CkptavgError: As for ``average``.
    """
    settings: dict[str, Any] = {
        "keep_nonfinite": keep_nonfinite, "progress": progress, "inputs": inputs, "stale": stale,
    }  # fmt: skip
    order = order or common_order([planned.plan.checkpoints for planned in averages])
    if not order and len(averages) > 1:
        return [
            state_dict
            for planned in averages
            for state_dict in in_memory_many([planned], **settings)
        ]
    sinks = [MemorySink(planned.plan.outputs) for planned in averages]
    _compute(averages, sinks, StreamRequests(order), **settings)
    return [sink.state_dict for sink in sinks]


def prepare(
    planned: Average,
    out: str | os.PathLike[str],
    *,
    overwrite: bool,
    digests: bool = False,
    others: Iterable[Checkpoint] = (),
) -> Target:
    """Lay the output of an average out, and check permission and room before any work.

    Args:
        planned: The average.
        out: Path of the output.
        overwrite: Replace an existing output.
        digests: Leave room for digests in the provenance.
        others: Further checkpoints that must not be replaced.

    Raises:
        OutputError: The output may not be written, or there is too little room.
        UsageError: The path does not decide a format that can hold the average.
    """
    plan, provenance = planned.plan, planned.provenance()
    return outputs.prepare(
        out,
        plan.outputs,
        with_digests(provenance, plan.inputs) if digests else provenance,
        [*others, *plan.files, plan.template],
        is_run=leads_to_checkpoints,
        companions=plan.companions,
        overwrite=overwrite,
        neighbours=planned.members,
    )


def prepare_many(
    averages: Sequence[Planned],
    *,
    overwrite: bool,
    digests: bool = False,
) -> list[Target]:
    """Lay the outputs of several averages out, and check permission and room for all together.

    Args:
        averages: Each average and the path of its output.
        overwrite: Replace existing outputs.
        digests: Leave room for digests in the provenances.

    Raises:
        OutputError: An output may not be written, or there is too little room.
        UsageError: Two outputs have the same path, or a path does not decide a format.
    """
    # No output may replace an input of another output either.
    files = {id(c): c for planned, _ in averages for c in planned.plan.files}
    care: dict[str, Any] = {"overwrite": overwrite, "digests": digests}
    targets = [prepare(planned, out, others=files.values(), **care) for planned, out in averages]
    outputs.check_together(targets)
    return targets


def load(checkpoint: Checkpoint) -> StateDict:
    """Read the tensors of a checkpoint unchanged, under bare names.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
        CheckpointError: A file cannot be read, or has changed.
    """
    plan = plan_copy(checkpoint)
    sink = MemorySink(plan.outputs)
    stream([Job(plan.tensors, sink)])
    _verify([plan])
    return sink.state_dict


def alone(checkpoint: Checkpoint) -> Average:
    """Plan the average of a single checkpoint, which has the checkpoint's own values.

    Such a plan can share one read of the inputs with other averages.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
    """
    plan = plan_copy(checkpoint)
    # Only tensors that are alike averaged or alike copied share a read with other averages.
    tensors = (replace(t, averaged=t.dtype.kind in ("float", "complex")) for t in plan.tensors)
    return Average(replace(plan, tensors=tuple(tensors)), schemes.parse("uniform"))


def _compute(
    averages: Sequence[Average],
    sinks: Sequence[Sink],
    requests: StreamRequests,
    *,
    keep_nonfinite: bool,
    progress: Progress | None,
    inputs: InputDigests | None = None,
    stale: bool = True,
    split: Split | None = None,
) -> torch.Tensor | None:
    """Stream averages into sinks, and return the products that are requested."""
    plans = [planned.plan for planned in averages]
    tensors = [plan.tensors for plan in plans] if split is None else split.tensors
    jobs: list[Job] = []
    for plan, plan_tensors, sink in zip(plans, tensors, sinks, strict=True):
        vectors = spectral_vectors.vector_names(plan)
        jobs.append(Job([t for t in plan_tensors if t.name not in vectors], sink, keep_nonfinite))
    if inputs is not None:
        requests = replace(requests, observed=inputs.tensors, observer=inputs.watch)
    compute = stream if split is None else split.stream
    try:
        outcome = compute(jobs, requests, progress=progress)
    except (NonFiniteError, PlacementError):
        # An input that another program rewrites may be the cause, and is then the better report.
        _verify(plans)
        raise
    if split is None or split.processes.rank == 0:
        for plan, plan_tensors, sink in zip(plans, tensors, sinks, strict=True):
            spectral_vectors.write_vectors(plan, plan_tensors, sink)
    _verify(plans)
    stale = stale and any(planned.batchnorm == "stale" for planned in averages)
    remarks.log_results(plans, outcome.results, stale=stale)
    return outcome.gram


def _verify(plans: Iterable[Plan]) -> None:
    """Make sure that no input file has changed since the checkpoints were opened."""
    stamps: dict[str, FileStamp] = {s.path: s for p in plans for c in p.files for s in c.files}
    for stamp in stamps.values():
        stamp.verify()
