"""The pipeline from planned averages to outputs, or to state dicts in memory.

Outputs are prepared first, so that a wrong path fails before any work. Then the averages are
computed from one read of the inputs, their running statistics are recomputed where that is wanted,
and all outputs are published together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from ckptavg.averaging.compute import compute_into, compute_state_dicts, request_stream
from ckptavg.averaging.lora import exact_mean
from ckptavg.averaging.plan import Average, Planned
from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.averaging.sharding import ShardedWrite
from ckptavg.averaging.stream import Progress
from ckptavg.averaging.weights import with_provenance
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_phase, open_progress
from ckptavg.distributed.peers import Peers
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import UsageError, short
from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.running_statistics import Statistics
from ckptavg.outputs import target
from ckptavg.outputs.digests import InputDigests
from ckptavg.outputs.sinks import StateDict
from ckptavg.outputs.target import Target, check_together
from ckptavg.outputs.writing import OpenTargets, open_targets
from ckptavg.runs.discovery.nearby import leads_to_checkpoints

Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


@dataclass(frozen=True)
class WriteOptions:
    """Options of computing and writing averages.

    Attributes:
        overwrite: Replace existing outputs.
        keep_nonfinite: Write averages that are not finite as they are.
        digests: Record digests of the inputs and of the output in each output.
        progress: Called with the bytes read and the total of bytes to read.
    """

    overwrite: bool = False
    keep_nonfinite: bool = False
    digests: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Written:
    """Result of writing outputs.

    Attributes:
        provenances: The provenance of each output.
        gram: The requested products: float64, (sources, sources); None where none were requested.
        passes: Per output, the result of the pass that recomputed statistics; empty without one.
    """

    provenances: Sequence[Provenance]
    gram: torch.Tensor | None = None
    passes: Sequence[object] = ()


class StatisticsPassLike(Protocol[Result_co]):
    """A pass over training data that recomputes the running statistics of state dicts."""

    @property
    def peers(self) -> Peers:
        """The processes that share the data. The first process writes the outputs."""

    def check(self, before: Sequence[Statistics]) -> None:
        """Make sure that the pass fits state dicts with such statistics.

        Raises:
            UsageError: The settings of the pass do not fit.
        """

    def run(
        self,
        before: Sequence[Statistics],
        origins: Sequence[str],
        read: Callable[[Sequence[int]], list[StateDict]],
        store: Callable[[int, StateDict, Statistics], None],
    ) -> Sequence[Result_co]:
        """Recompute statistics, for as many state dicts at a time as memory holds.

        Args:
            before: State of the statistics before the pass, per state dict.
            origins: Description of each state dict, for messages.
            read: Returns the state dicts of some positions.
            store: Takes position, state dict and new state of the statistics. After running out
                of memory, a position may be read and stored once more.

        Returns:
            Per state dict, the result of the pass.
        """


class RecomputeLike(Protocol):
    """Model, data and settings from which a pass over training data is made."""

    def open_pass(self, progress: PhaseProgress | None) -> StatisticsPassLike[object]:
        """Check the settings and open the data.

        Args:
            progress: Called with phase, done and total, in samples; None to report none.
        """


@contextmanager
def open_pass(
    recompute: RecomputeLike | None, options: WriteOptions, progress: ProgressLike
) -> Iterator[tuple[WriteOptions, StatisticsPassLike[object] | None]]:
    """Open a display of progress, and the pass over training data if there is one.

    Args:
        recompute: Model, data and settings of the pass; None for no pass.
        options: Options of the outputs.
        progress: Any value of a ``progress`` parameter.

    Yields:
        The options with progress, and the pass.

    Raises:
        UsageError: A setting of the pass is wrong.
    """
    if recompute is None:
        with open_phase(progress, "averaging", "bytes") as report_bytes:
            yield replace(options, progress=report_bytes), None
        return
    # By its method and not by its class, which is in batchnorm and imports this room.
    if not hasattr(recompute, "open_pass"):
        raise UsageError(
            f"recompute is expected to be a ckptavg.Recompute but got {short(repr(recompute))}",
            "Pass ckptavg.Recompute(model, train_loader).",
        )
    with open_progress(progress, "samples") as report:
        if report is not None:
            options = replace(options, progress=functools.partial(report, "averaging (bytes)"))
        yield options, recompute.open_pass(report)


def prepare_targets(averages: Sequence[Planned], options: WriteOptions) -> list[Target]:
    """Lay out the outputs of several averages, and check permission and room for all together.

    Args:
        averages: Each average and the path of its output.
        options: Options of the outputs.

    Raises:
        OutputError: An output may not be written, or there is too little room.
        UsageError: Two outputs have the same path, or a path does not decide a format.
    """
    # No output may replace an input of another output either.
    inputs: dict[str, Checkpoint] = {}
    for planned, _ in averages:
        inputs |= {str(checkpoint.path): checkpoint for checkpoint in planned.plan.files}
    targets: list[Target] = []
    for planned, out in averages:
        plan = planned.plan
        prepared = target.prepare(
            out,
            plan.outputs,
            planned.provenance(),
            [*inputs.values(), *plan.files, plan.template],
            # Passed as a function, since outputs may not import runs.
            is_run=leads_to_checkpoints,
            companions=plan.companions,
            overwrite=options.overwrite,
            neighbours=planned.members,
            hashed=plan.inputs if options.digests else (),
        )
        targets.append(prepared)
    check_together(targets)
    return targets


def write_averages(
    averages: Sequence[Average],
    targets: Sequence[Target],
    options: WriteOptions,
    *,
    order: Sequence[Checkpoint] = (),
    gram: Sequence[TensorPlan] = (),
    processes: TorchrunGroup | None = None,
    statistics_pass: StatisticsPassLike[object] | None = None,
) -> Written:
    """Compute several averages from one read of the inputs, and write the outputs.

    Without a pass over training data, the outputs are written block by block as the inputs are
    read. With a pass, as many averages as fit in memory are computed in one read and share a pass.

    Args:
        averages: The averages to compute.
        targets: The output of each average, from ``prepare_targets`` with the same options.
        options: Options of the outputs.
        order: The checkpoints of the run that all averages are selections of, in order.
        gram: Tensors whose sources are multiplied with each other during the read, for averages
            without a pass.
        processes: The processes that make the outputs together. Each of them calls this function
            with the same arguments.
        statistics_pass: The pass that recomputes the running statistics.

    Returns:
        The provenance of each output, and the products.

    Raises:
        OutputError: An output may not or could not be written.
        ProcessesError: Another process has failed, or has other arguments.
        CkptavgError: As for ``average``.
    """
    if statistics_pass is not None:
        return _write_recomputed(averages, targets, options, order, statistics_pass)
    sharded = None
    if processes is not None:
        sharded = ShardedWrite(processes, targets, [planned.plan for planned in averages])
    with open_targets(targets) if sharded is None else sharded.open() as outputs:
        products = compute_into(
            averages,
            outputs.sinks,
            replace(request_stream(order, outputs.inputs), gram=gram),
            keep_nonfinite=options.keep_nonfinite,
            progress=options.progress,
            sharded=sharded,
        )
    return Written(outputs.provenances, products)


def compute_averages(
    averages: Sequence[Average],
    options: WriteOptions,
    *,
    order: Sequence[Checkpoint] = (),
    statistics_pass: StatisticsPassLike[object] | None = None,
) -> list[StateDict]:
    """Compute several averages as state dicts that carry a provenance.

    Args:
        averages: The averages to compute.
        options: Options of the computation.
        order: The checkpoints of the run that all averages are selections of, in order.
        statistics_pass: The pass that recomputes the running statistics.

    Returns:
        The state dict of each average, under bare names.

    Raises:
        UsageError: Digests are requested, which are recorded in an output.
        CkptavgError: As for ``average``.
    """
    if options.digests:
        raise UsageError("digests are recorded in an output, and none is named", "Name an output.")
    read = _reader(averages, options, order)
    results: dict[int, StateDict] = {}
    if statistics_pass is None:
        results |= enumerate(read(range(len(averages)), None))
        provenances = [planned.provenance() for planned in averages]
    else:
        before = _check_pass(averages, statistics_pass)
        provenances = [planned.provenance() for planned in averages]

        def store(i: int, state_dict: StateDict, statistics: Statistics) -> None:
            """Keep a state dict.

            Args:
                i: Position of the average.
                state_dict: The averaged weights with the recomputed statistics.
                statistics: State of the statistics after the pass.
            """
            results[i] = state_dict
            provenances[i] = averages[i].provenance().with_statistics(statistics)

        names = [f"the average ({planned.scheme.text})" for planned in averages]
        statistics_pass.run(before, names, lambda group: read(group, None), store)
    return [with_provenance(results[i], provenance) for i, provenance in enumerate(provenances)]


def write_recomputed(
    targets: Sequence[Target],
    before: Sequence[Statistics],
    origins: Sequence[str],
    read: Callable[[Sequence[int], InputDigests | None], list[StateDict]],
    statistics_pass: StatisticsPassLike[Result],
) -> tuple[list[Provenance], Sequence[Result]]:
    """Write outputs with recomputed running statistics.

    Args:
        targets: The outputs.
        before: State of the statistics before the pass, per output.
        origins: Description of each state dict, for messages.
        read: Returns the state dicts of some outputs, and hashes the inputs as they are read.
        statistics_pass: The pass that recomputes the running statistics.

    Returns:
        The provenance of each output as written, and the results of the pass.

    Raises:
        CkptavgError: Any failure. Nothing is written then.
    """
    stored: set[int] = set()
    with _open_in_first(targets, statistics_pass.peers) as outputs:

        def read_group(group: Sequence[int]) -> list[StateDict]:
            """Read some state dicts; the inputs of all outputs are hashed in the first read."""
            if outputs is None or stored:
                return read(group, None)
            # A read that failed may have hashed half of a tensor.
            outputs.restart_input_digests()
            return read(group, outputs.inputs)

        def store(i: int, state_dict: StateDict, statistics: Statistics) -> None:
            """Write a state dict into the output.

            Args:
                i: Position of the output.
                state_dict: The averaged weights with the recomputed statistics.
                statistics: State of the statistics after the pass.
            """
            stored.add(i)
            if outputs is not None:
                writer = outputs.writers[i]
                writer.change_provenance(targets[i].provenance.with_statistics(statistics))
                writer.write_state_dict(state_dict)

        passes = statistics_pass.run(before, origins, read_group, store)
    if outputs is None:
        return [prepared.provenance for prepared in targets], passes
    return outputs.provenances, passes


def _write_recomputed(
    averages: Sequence[Average],
    targets: Sequence[Target],
    options: WriteOptions,
    order: Sequence[Checkpoint],
    statistics_pass: StatisticsPassLike[object],
) -> Written:
    before = _check_pass(averages, statistics_pass)
    origins = [f"the average for {prepared.out}" for prepared in targets]
    read = _reader(averages, options, order)
    provenances, passes = write_recomputed(targets, before, origins, read, statistics_pass)
    return Written(provenances, passes=passes)


def _check_pass(
    averages: Sequence[Average], statistics_pass: StatisticsPassLike[object]
) -> list[Statistics]:
    """Make sure that a pass fits the averages, and return the statistics before the pass."""
    for planned in averages:
        exact_mean.require_models(planned.plan.checkpoints)
    before = [planned.statistics for planned in averages]
    statistics_pass.check(before)
    return before


def _reader(
    averages: Sequence[Average], options: WriteOptions, order: Sequence[Checkpoint]
) -> Callable[[Sequence[int], InputDigests | None], list[StateDict]]:
    """Make the function that computes averages by their positions."""

    def read(group: Sequence[int], inputs: InputDigests | None) -> list[StateDict]:
        return compute_state_dicts(
            [averages[i] for i in group],
            order=order,
            keep_nonfinite=options.keep_nonfinite,
            inputs=inputs,
            progress=options.progress,
        )

    return read


@contextmanager
def _open_in_first(targets: Sequence[Target], peers: Peers) -> Iterator[OpenTargets | None]:
    """Open outputs in the first process.

    Other processes get None and wait until the first process has written.
    """
    if peers.rank:
        yield None
    else:
        with open_targets(targets) as outputs:
            yield outputs
    # So that no process opens an output before it is published.
    peers.gather(None)
