"""Many averages of a run from a single read of the inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, overload

from ckptavg.averaging.keywords import TensorRules
from ckptavg.averaging.pipeline import (
    RecomputeLike,
    WriteOptions,
    compute_averages,
    open_pass,
    prepare_targets,
    write_averages,
)
from ckptavg.averaging.plan import Average, plan_average
from ckptavg.averaging.planning.rules import parse_on_nonfinite
from ckptavg.averaging.remarks import warn_of_stale
from ckptavg.averaging.weights import provenance_of
from ckptavg.display.progress import ProgressLike
from ckptavg.errors import OutputError, UsageError, short
from ckptavg.errors.system import unwritable
from ckptavg.formats import Checkpoint
from ckptavg.formats.registry import has_suffix
from ckptavg.io import paths
from ckptavg.outputs.sinks import StateDict
from ckptavg.runs.run import Run, RunLike, as_run

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ckptavg.averaging.keywords import ManyOptions

Asked: TypeAlias = Mapping[str, "str | Run | tuple[Run, str | Sequence[float]]"]


@overload
def average_many(
    run: RunLike, averages: Asked, *, out_dir: None = ..., **options: Unpack[ManyOptions]
) -> dict[str, StateDict]: ...


@overload
def average_many(
    run: RunLike,
    averages: Asked,
    *,
    out_dir: str | os.PathLike[str],
    **options: Unpack[ManyOptions],
) -> dict[str, Path]: ...


@overload
def average_many(
    run: RunLike,
    averages: Asked,
    *,
    out_dir: str | os.PathLike[str] | None,
    **options: Unpack[ManyOptions],
) -> dict[str, StateDict] | dict[str, Path]: ...


def average_many(
    run: RunLike,
    averages: Asked,
    *,
    out_dir: str | os.PathLike[str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    on_nonfinite: str = "error",
    digests: bool = False,
    recompute: RecomputeLike | None = None,
    progress: ProgressLike = None,
) -> dict[str, StateDict] | dict[str, Path]:
    """Compute several averages of a run while each input byte is read once.

    Each average has the same bits as from a separate call of ``average``::

        run = ckptavg.open_run("runs/swa")
        windows = {f"last{k}": run.last(k) for k in (5, 10, 20)}
        ckptavg.average_many(run, windows | {"ema.pt": "ema:decay=0.9"}, out_dir="averages")

    Args:
        run: The result of ``open_run``, or a selection of it; or the path of a run.
        averages: Name → a scheme for the run, a selection of the run (averaged uniformly), or a
            pair of a selection and a scheme. In a pair, weights may replace the scheme: one number
            per checkpoint.
        out_dir: Directory for the outputs, created where missing. A name's suffix decides the
            format as for ``average``. An output whose name has no suffix is a directory where the
            inputs are directories, else a ``.safetensors`` file. None returns state dicts instead.
        include: Shell patterns of tensor names to average; all where empty.
        exclude: Shell patterns of tensor names not to average.
        base: The checkpoint that all other tensors come from; the last one of each selection where
            None.
        dtype: Type of the outputs' floats, as for ``average``.
        overwrite: Replace existing outputs.
        on_nonfinite: ``error``, or ``keep`` to write averages that are not finite.
        digests: Record digests in the outputs, as for ``average``.
        recompute: Model and data by which BatchNorm statistics are recomputed, as for ``average``.
            As many averages as fit in memory share a pass over the data.
        progress: As for ``average``.

    Returns:
        Name → the state dict under bare names, or the path of the output.

    Warns:
        StaleStatisticsWarning: As ``average`` does.

    Raises:
        UsageError: A selection is not from the run, or a name is not a file name.
        OutputError: An output may not or could not be written. No output appears then, except
            where outputs were published before the publication of another one failed.
        CkptavgError: As for ``average``.
    """
    run = as_run(run)
    options = WriteOptions(overwrite, parse_on_nonfinite(on_nonfinite), digests)
    rules = TensorRules(include=include, exclude=exclude, base=base, dtype=dtype)
    planned = _plan_requests(run, averages, rules)
    ordered = list(planned.values())
    result: dict[str, StateDict] | dict[str, Path]
    with open_pass(recompute, options, progress) as (options, statistics_pass):
        if out_dir is None:
            state_dicts = compute_averages(
                ordered, options, order=run.opened, statistics_pass=statistics_pass
            )
            result = dict(zip(planned, state_dicts, strict=True))
            provenances = [provenance_of(state_dict) for state_dict in state_dicts]
        else:
            result = {name: Path(out_dir) / _file_name(name, run) for name in planned}
            paths.check_output(out_dir)
            with _directory(Path(out_dir)):
                pairs = list(zip(ordered, result.values(), strict=True))
                targets = prepare_targets(pairs, options)
                written = write_averages(
                    ordered, targets, options, order=run.opened, statistics_pass=statistics_pass
                )
            provenances = [*written.provenances]
    statistics = {name: average.statistics for name, average in planned.items()}
    warn_of_stale(statistics, dict(zip(planned, provenances, strict=True)))
    return result


def _plan_requests(run: Run, averages: Asked, rules: TensorRules) -> dict[str, Average]:
    """Plan the averages that ``average_many`` is asked for.

    Raises:
        UsageError: The averages are not given by name, or there are none, or one is not valid.
        CkptavgError: As for ``plan_average``.
    """
    if not isinstance(averages, Mapping):
        raise UsageError(f"averages are expected by name but got {short(repr(averages))}")
    planned: dict[str, Average] = {}
    for name, asked in averages.items():
        planned[name] = plan_request(name, run, asked, **rules)
    if not planned:
        raise UsageError("no average is asked for")
    return planned


def plan_request(
    name: str,
    run: Run,
    asked: str | Run | tuple[Run, str | Sequence[float]],
    **rules: Unpack[TensorRules],
) -> Average:
    """Plan an average from a value that ``average_many`` accepts.

    Args:
        name: Name of the average, for messages.
        run: The run that all averages are selections of.
        asked: A scheme, a selection of the run, or a pair of both.
        rules: Keywords of ``plan_average``.

    Raises:
        UsageError: The value is not understood, or the selection is not from the run.
        CkptavgError: As for ``plan_average``.
    """
    selection, scheme = _asked(name, run, asked)
    if isinstance(scheme, str):
        return plan_average(selection, scheme, **rules)
    return plan_average(selection, weights=scheme, **rules)


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Create a directory where missing, and remove a created one again after an error.

    Raises:
        OutputError: The path is not a directory, or cannot be created.
    """
    # The innermost comes first, the order in which they can be removed again.
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    if not missing and not path.is_dir():
        raise OutputError(f"{path} is no directory", "Choose another out_dir.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        yield
    except BaseException:
        # A directory that is not empty stays: an output was published into it.
        with suppress(OSError):
            for directory in missing:
                directory.rmdir()
        raise


def _asked(
    name: str, run: Run, asked: str | Run | tuple[Run, str | Sequence[float]]
) -> tuple[Run, str | Sequence[float]]:
    """Split a value that ``average_many`` accepts into the selection and the scheme.

    Raises:
        UsageError: The value is not understood, or the selection is not from the run.
    """
    selection: Run
    scheme: str | Sequence[float]
    if isinstance(asked, str):
        selection, scheme = run, asked
    elif isinstance(asked, Run):
        selection, scheme = asked, "uniform"
    elif isinstance(asked, tuple) and len(asked) == 2 and isinstance(asked[0], Run):
        selection, scheme = asked
    else:
        raise UsageError(
            f"{name!r} is expected to be a scheme, a selection of the run, or both as "
            f"(run.last(5), 'ema:decay=0.9'), but got {short(repr(asked))}"
        )
    # All averages share one pass in the run's order, so that a selection must keep the order.
    positions = {id(checkpoint): i for i, checkpoint in enumerate(run.opened)}
    order = [positions.get(id(checkpoint), -1) for checkpoint in selection]
    if -1 in order or order != sorted(order):
        raise UsageError(
            f"the checkpoints of {name!r} are no selection of the run that is averaged",
            "Select them from the very run that is passed: run.last(5).",
        )
    return selection, scheme


def _file_name(name: str, run: Run) -> str:
    # Path("..").name is "..", so that the comparison with the name does not refuse "..".
    if (
        not isinstance(name, str)
        or not name.isprintable()
        or not name
        or Path(name).name != name
        or name == ".."
    ):
        raise UsageError(f"the name of an average is expected to be a file name but got {name!r}")
    if has_suffix(name) or run.opened[-1].format.is_directory:
        return name
    return f"{name}.safetensors"
