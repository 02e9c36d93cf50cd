"""Averages of a run: planned, streamed, and written with an account of how they were made."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptavg import discovery, lora, schemes
from ckptavg.blocks import StreamResult
from ckptavg.errors import CheckpointError, UsageError, first_few
from ckptavg.formats import Checkpoint, open_checkpoint, storage
from ckptavg.formats.layout import lay_out
from ckptavg.formats.output import Layout, OutputTensor
from ckptavg.formats.publish import Publication, check_room, check_target
from ckptavg.formats.table import DTYPES, FileStamp
from ckptavg.formats.writing import FileSink, MemorySink
from ckptavg.groups import Job
from ckptavg.plan import Plan, Rules, batchnorm_layers, copy_plan, make_plan
from ckptavg.run import Run, as_run
from ckptavg.schemes import Scheme
from ckptavg.stream import Progress, stream
from ckptavg.version import __version__

log = logging.getLogger("ckptavg")
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Average:
    """An average that is planned and not yet computed.

    Attributes:
        plan: What becomes of each tensor.
        scheme: How the coefficients came about.
    """

    plan: Plan
    scheme: Scheme

    @property
    def batchnorm(self) -> str:
        """State of the running statistics: ``none``, ``stale``, or ``own``: all weights theirs."""
        if not batchnorm_layers(tensor.name for tensor in self.plan.tensors):
            return "none"
        floats = [t for t in self.plan.tensors if t.dtype.kind != "int"]
        owners = {owner.path for tensor in floats for owner in tensor.owners}
        return "own" if len(owners) == 1 else "stale"

    def provenance(self, batchnorm: str | None = None) -> dict[str, Any]:
        """How the average is made, as plain values for JSON."""
        return provenance(
            self.scheme.text,
            self.plan.checkpoints,
            self.plan.coefficients,
            batchnorm or self.batchnorm,
            self.plan.ties,
        )


def average(
    run: Run | Iterable[Checkpoint],
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
    progress: Progress | None = None,
) -> StateDict | Path:
    """Average the checkpoints of a run.

    Floats are averaged in float64 and rounded once to the output type; integers and bools come from
    the last checkpoint. Memory stays flat in the number of checkpoints and, with ``out``, in their
    size. BatchNorm statistics are averaged too and thereby stale: see ``update_bn``.

    Args:
        run: What ``open_run`` returned, or a selection of it.
        scheme: ``NAME[:key=value,...]``, see ``ckptavg.schemes.parse``.
        weights: One a checkpoint instead of a scheme; normalized.
        out: ``.safetensors``, a ``torch.save`` suffix, or a directory (Hugging Face). None returns
            the state dict instead.
        include: Shell patterns of tensor names to average; all where empty.
        exclude: Shell patterns of those not to.
        base: The checkpoint that the rest comes from; the last one where None.
        dtype: Of the output's floats: ``keep``, ``float32``, ``bfloat16``, ``float16`` or
            ``float64``.
        overwrite: Replace an existing output.
        on_nonfinite: ``error``, or ``keep`` to write an average that is not finite.
        progress: Called with the bytes read and their total.

    Returns:
        The state dict under bare names, or the path of the output.

    Raises:
        MismatchError: The checkpoints do not hold the same tensors.
        NonFiniteError: An average is not finite.
        OutputError: The output may not or could not be written.
        CkptavgError: Anything else that is wrong; nothing is written then.
    """
    planned = plan_average(
        run, scheme, weights=weights, include=include, exclude=exclude, base=base, dtype=dtype
    )
    if on_nonfinite not in ("error", "keep"):
        raise UsageError(f"on_nonfinite is expected to be error or keep but got {on_nonfinite!r}")
    keep = on_nonfinite == "keep"
    if out is None:
        return in_memory(planned, keep_nonfinite=keep, progress=progress)
    return write(planned, out, overwrite=overwrite, keep_nonfinite=keep, progress=progress)


def plan_average(
    run: Run | Iterable[Checkpoint],
    scheme: str = "uniform",
    *,
    weights: Sequence[float] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep",
) -> Average:
    """Check that a run can be averaged, without reading a tensor. Arguments as for ``average``."""
    run = as_run(run)
    for training in () if run.named else run.trainings:
        discovery.refuse_two_series(training)
    checkpoints = run.checkpoints
    if weights is not None and scheme != "uniform":
        raise UsageError("a scheme and weights exclude each other: give one of them")
    chosen = schemes.parse(scheme) if weights is None else schemes.explicit(weights)
    coefficients = chosen.coefficients([c.step for c in checkpoints])
    if base is not None and not isinstance(base, Checkpoint):
        base = _open_base(base, checkpoints[-1].key)
    rules = Rules(_patterns(include), _patterns(exclude), base, dtype)
    involved = checkpoints if base is None else (*checkpoints, base)
    plan = lora.plan_merge if lora.are_adapters(involved) else make_plan
    return Average(lora.noted(plan(checkpoints, coefficients, rules)), chosen)


def _open_base(path: str | os.PathLike[str], key: str) -> Checkpoint:
    """Open a base under the run's weights entry, or its own if it has no such entry."""
    try:
        return open_checkpoint(path, key or None)
    except CheckpointError:
        if not key:
            raise
        return open_checkpoint(path)


def _patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def in_memory(
    planned: Average,
    *,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
    stale: bool = True,
) -> StateDict:
    """Compute an average as a state dict; ``stale=False`` if its statistics will be recomputed."""
    sink = MemorySink(planned.plan.outputs)
    jobs = [Job(planned.plan.tensors, sink, keep_nonfinite)]
    (result,) = stream(jobs, progress=progress).results
    _verify(planned.plan)
    _log(planned, result, stale=stale)
    return sink.state_dict


def write(
    planned: Average,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Compute an average straight into its output."""
    tensors = planned.plan.outputs
    layout = prepare(planned, out, overwrite=overwrite)

    def fill(sink: FileSink) -> None:
        jobs = [Job(planned.plan.tensors, sink, keep_nonfinite)]
        (result,) = stream(jobs, progress=progress).results
        _verify(planned.plan)
        _log(planned, result)

    return _publish(layout, Path(out), tensors, overwrite, fill)


def prepare(
    planned: Average, out: str | os.PathLike[str], *, overwrite: bool, batchnorm: str | None = None
) -> Layout:
    """Lay the output of an average out and make sure that it may and can be written.

    Raises:
        OutputError: It may not be written, or there is too little room.
    """
    plan, made = planned.plan, planned.provenance(batchnorm)
    template = plan.checkpoints[-1]
    layout = _prepare(out, plan.outputs, made, plan.files, template, overwrite)
    if plan.companions and not layout.directory:
        beside = first_few(list(plan.companions))
        raise UsageError(
            f"{out} would be a file, but {beside} has to stand beside the weights",
            "Name a directory: -o with no suffix.",
        )
    layout.companions.update(plan.companions)
    return layout


def prepare_copy(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    made: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Layout:
    """As ``prepare``, for a checkpoint whose tensors are all taken."""
    outputs = copy_plan(checkpoint).outputs
    return _prepare(out, outputs, made, [checkpoint], checkpoint, overwrite)


def _prepare(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    made: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    template: Checkpoint,
    overwrite: bool,
) -> Layout:
    storage.check_output(out)
    places = [str(name) for c in inputs for name in (c.path, *(f.path for f in c.files))]
    names = [Path(place) for place in places if not storage.is_url(place)]
    check_target(Path(out), overwrite=overwrite, inputs=names)
    layout = lay_out(os.fspath(out), tensors, made, template)
    check_room(Path(out), layout.size)
    return layout


def _publish(
    layout: Layout,
    out: Path,
    tensors: Sequence[OutputTensor],
    overwrite: bool,
    fill: Callable[[FileSink], None],
) -> Path:
    with Publication(out, directory=layout.directory, overwrite=overwrite) as publication:
        with FileSink(layout, publication.temporary, tensors) as sink:
            fill(sink)
            sink.finish()
        publication.publish()
    for note in layout.notes:
        log.info(note)
    return out


def save(
    state_dict: Mapping[str, torch.Tensor],
    out: str | os.PathLike[str],
    made: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    *,
    overwrite: bool = False,
) -> Path:
    """Write tensors that are in memory, with the same care as an average.

    Args:
        state_dict: What to write, under bare names.
        out: As for ``average``.
        made: Its provenance.
        inputs: The checkpoints that it was made of; none of them may be the output, and a
            directory follows the last one's layout and copies its configuration.
        overwrite: Replace an existing output.
    """
    tensors = output_tensors(state_dict)
    layout = _prepare(out, tensors, made, inputs, inputs[-1], overwrite)

    def fill(sink: FileSink) -> None:
        for tensor in tensors:
            if tensor.tied_to is None and state_dict[tensor.name].numel():
                values = state_dict[tensor.name].detach().cpu().contiguous()
                raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
                sink.write(tensor.name, 0, memoryview(raw).cast("B"))

    return _publish(layout, Path(out), tensors, overwrite, fill)


def output_tensors(state_dict: Mapping[str, torch.Tensor]) -> list[OutputTensor]:
    """What writing a state dict needs to know of it; names of one tensor are tied."""
    seen: dict[object, str] = {}
    found: list[OutputTensor] = []
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        first = seen.setdefault(place, name) if tensor.numel() else name
        dtype = DTYPES[str(tensor.dtype).removeprefix("torch.")]
        tied = None if first == name else first
        found.append(OutputTensor(name, dtype, tuple(tensor.shape), tied))
    return found


def provenance(
    scheme: str,
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    batchnorm: str,
    ties: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """How an output was made, as plain values for JSON.

    Returns:
        ``version``, ``scheme``, ``checkpoints`` (each with ``path``, ``step``, ``coefficient``,
        ``size`` in bytes and ``mtime`` in seconds), ``bn`` and ``tied`` names, if there are any.
    """
    made: dict[str, Any] = {
        "version": __version__,
        "scheme": scheme,
        "checkpoints": [
            {
                "path": storage.without_secrets(str(c.path)),
                "step": c.step,
                "coefficient": coefficient,
                "size": c.size,
                "mtime": max(stamp.mtime_ns for stamp in c.files) / 1e9,
            }
            for c, coefficient in zip(checkpoints, coefficients, strict=True)
        ],
        "bn": batchnorm,
    }
    return made | ({"tied": [list(group) for group in ties]} if ties else {})


def load(checkpoint: Checkpoint) -> StateDict:
    """Read one checkpoint's tensors as they are, under bare names."""
    plan = copy_plan(checkpoint)
    sink = MemorySink(plan.outputs)
    stream([Job(plan.tensors, sink)])
    _verify(plan)
    return sink.state_dict


def _verify(plan: Plan) -> None:
    stamps: dict[str, FileStamp] = {s.path: s for c in plan.files for s in c.files}
    for stamp in stamps.values():
        stamp.verify()


def _log(planned: Average, result: StreamResult, *, stale: bool = True) -> None:
    for note in planned.plan.notes:
        log.info(note)
    if result.differing:
        names = first_few(sorted(result.differing))
        log.info("integers are not averaged but taken from the last checkpoint: %s", names)
    if result.nonfinite:
        log.warning("not finite and kept: %s", first_few(sorted(result.nonfinite)))
    if stale and planned.batchnorm == "stale":
        log.info(
            "BatchNorm statistics are not those of the averaged weights (stale): recompute them "
            "with `ckptavg update-bn`, or by --model and --train-data"
        )
