"""The average of a run: planned, computed, and written with a provenance."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

from ckptavg.averaging.pipeline import (
    RecomputeLike,
    WriteOptions,
    compute_averages,
    open_pass,
    prepare_targets,
    write_averages,
)
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.rules import parse_on_nonfinite
from ckptavg.averaging.remarks import warn_of_stale
from ckptavg.averaging.weights import provenance_of
from ckptavg.display.progress import ProgressLike
from ckptavg.formats import Checkpoint
from ckptavg.outputs.sinks import StateDict
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
    recompute: RecomputeLike | None = None,
    progress: ProgressLike = None,
) -> StateDict | Path:
    """Average the checkpoints of a run.

    Floats are averaged in float64 and rounded once to the output type. Integers and bools come from
    the last checkpoint. Memory does not grow with the number of checkpoints and, with ``out``, not
    with their size. BatchNorm statistics are averaged too, which makes them stale. A warning says
    so: recompute the statistics by ``recompute``, or later by ``update_bn``.

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
        recompute: A ``ckptavg.Recompute``: the model and the data by which BatchNorm statistics are
            recomputed before the average is returned or written. The average is in memory then.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in bytes
            read (of samples during a pass that recomputes); see ``ckptavg.display.progress``.

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
    options = WriteOptions(overwrite, parse_on_nonfinite(on_nonfinite), digests)
    result: StateDict | Path
    with open_pass(recompute, options, progress) as (options, statistics_pass):
        if out is None:
            (result,) = compute_averages([planned], options, statistics_pass=statistics_pass)
            provenance = provenance_of(result)
        else:
            result = Path(out)
            targets = prepare_targets([(planned, out)], options)
            written = write_averages([planned], targets, options, statistics_pass=statistics_pass)
            (provenance,) = written.provenances
    warn_of_stale({"": planned.statistics}, {"": provenance})
    return result
