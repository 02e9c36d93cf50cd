"""``ckptavg average``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.averaging.planning.rules import Rules
from ckptavg.cli.command import command
from ckptavg.cli.commands import geometry
from ckptavg.cli.console import Report, count_text, number_text
from ckptavg.cli.options.also import AlsoAverage, read_also
from ckptavg.cli.options.averaging import (
    TensorOptions,
    WeightingOptions,
    key_option,
    plan_selection,
    tensor_options,
    weighting_options,
)
from ckptavg.cli.options.declare import option
from ckptavg.cli.options.param_types import output
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.errors import NonFiniteError, UsageError
from ckptavg.errors.printable import size_text
from ckptavg.runs.discovery.numbered import short_names

if TYPE_CHECKING:
    import torch

    from ckptavg.averaging.pipeline import WriteOptions, Written
    from ckptavg.averaging.plan import Average
    from ckptavg.averaging.planning.tensor_plan import TensorPlan
    from ckptavg.batchnorm.recompute import StatisticsPass
    from ckptavg.distributed.torchrun import TorchrunGroup
    from ckptavg.formats.provenance import Provenance
    from ckptavg.outputs.target import Target
    from ckptavg.runs.run import Run

_OUT = "Output"
log = logging.getLogger("ckptavg")


@command(shared=True)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@option(
    _OUT, "-o", "--out", metavar="OUT", type=output, common=True,
    help="FILE.safetensors, FILE.pt, a file with the inputs' suffix, or a directory.",
)  # fmt: skip
@option(
    _OUT, "--also", "further", multiple=True, type=read_also, metavar="NAME=SCHEME[@SELECTION]",
    help="One more average beside OUT, from the same read. SELECTION is of the whole run, in the "
    "words of the options: last5=uniform@last=5, few=@from=100,every=2.",
)  # fmt: skip
@option(
    _OUT, "--geometry", "measured", is_flag=True,
    help="Show norms and distances of the checkpoints, too, from the same read.",
)  # fmt: skip
@option(_OUT, "--dry-run", is_flag=True, common=True, help="Show the plan, write nothing.")
@option(_OUT, "--overwrite", is_flag=True, common=True, help="Replace an existing output.")
@option(
    _OUT, "--digests", "--hash", "digests", is_flag=True,
    help="Record digests of inputs and output, which `inspect --verify` compares.",
)  # fmt: skip
@selection_options
@weighting_options
@key_option
@tensor_options
@running_options("Training data, to recompute BatchNorm statistics")
def average(
    report: Report,
    processes: TorchrunGroup | None,
    paths: tuple[str, ...],
    out: str | None,
    further: tuple[AlsoAverage, ...],
    dry_run: bool,
    overwrite: bool,
    digests: bool,
    measured: bool,
    key: str | None,
    select: SelectionOptions,
    weighting: WeightingOptions,
    tensors: TensorOptions,
    running: RunningOptions,
) -> None:
    """Average the checkpoints of a run into one model.

    PATH is a run directory or a checkpoint, or its URL (s3://bucket/run, https://...); several are
    fine. Checkpoints are ordered by recorded step, then epoch, then the numbers in their names.
    What repeats another counts once.

    \b
      ckptavg average runs/swa -o swa.safetensors
      ckptavg average runs/cyclic --at-lr-min --last 5 -o swa.pt
      ckptavg average runs/swa --best 5 --metric val_acc -o best5.pt
      ckptavg average runs/swa -o swa.pt \\
          --model torchvision:resnet50 --train-data imagefolder:train
    """
    _check_usage(out, dry_run, measured, running)
    run, selection = select.open(paths, key)
    if weighting.weights:
        _note_order(paths, [str(c.path) for c in selection])
    from ckptavg.averaging import pipeline, remarks  # noqa: PLC0415 - help is shown without torch

    planned = [plan_selection(selection, weighting, tensors)]
    planned += [extra.plan(run, selection, tensors) for extra in further]
    gram = _measured_weights(selection, tensors) if measured else []
    outs = [] if out is None else [out, *(extra.path(out) for extra in further)]
    write_options = pipeline.WriteOptions(overwrite, tensors.keep_nonfinite, digests)
    targets = pipeline.prepare_targets(list(zip(planned, outs, strict=bool(outs))), write_options)
    if dry_run:
        remarks.log_plans([planned_average.plan for planned_average in planned])
        for note in _layout_notes(targets):
            log.info(note)
    statistics_pass = None if dry_run else _prepare_pass(running, selection, processes)
    if dry_run or report.verbosity >= 0:
        names = ["", *(extra.name for extra in further)]
        for planned_average, name in zip(planned, names, strict=True):
            _show_plan(report, planned_average, name)
    if out is None or dry_run:
        records = [{**average.provenance().entries, "output": None} for average in planned]
        _result(report, records, further)
        return
    if statistics_pass is None:
        written = _write(report, planned, targets, write_options, run, gram, processes)
    else:
        written = _write_recomputed(report, planned, targets, write_options, run, statistics_pass)
    if processes is not None and processes.rank:  # the first has looked at the output for all
        return
    records = []
    for provenance, path in zip(written.provenances, outs, strict=True):
        records.append(_written(report, provenance, path))
    if measured:
        records[0] |= _geometry(report, selection, written.gram)
    _result(report, records, further)


def _layout_notes(targets: Sequence[Target]) -> Iterable[str]:
    return dict.fromkeys(note for target in targets for note in target.layout.notes)


def _check_usage(
    out: str | None,
    dry_run: bool,
    measured: bool,
    running: RunningOptions,
) -> None:
    if out is None and not dry_run:
        raise UsageError("Missing option '-o': where the average goes (or pass --dry-run)")
    if running.model.spec and not running.training.spec:
        raise UsageError("--model and --train-data go together: they recompute BatchNorm")
    if measured and (dry_run or running.training.spec):
        raise UsageError(
            f"--geometry and {'--dry-run' if dry_run else '--train-data'} exclude each other: "
            "`ckptavg inspect --geometry` shows it by itself"
        )
    running.check_statistics()


def _prepare_pass(
    running: RunningOptions, selection: Run, processes: TorchrunGroup | None
) -> StatisticsPass | None:
    """Make the model and open the data before a plan is shown, as neither may be usable.

    Returns:
        None where statistics are not to be recomputed.
    """
    if not running.training.spec:
        return None
    from ckptavg.cli.build import build_statistics_pass  # noqa: PLC0415 - imports torch

    return build_statistics_pass(running, selection.opened[-1:], processes)


def _write(
    report: Report,
    planned: Sequence[Average],
    targets: Sequence[Target],
    write_options: WriteOptions,
    run: Run,
    gram: Sequence[TensorPlan],
    processes: TorchrunGroup | None,
) -> Written:
    """Write the averages, from one read."""
    from ckptavg.averaging.pipeline import write_averages  # noqa: PLC0415

    with report.bytes_progress("averaging") as progress:
        written = write_averages(
            planned,
            targets,
            replace(write_options, progress=progress),
            order=run.opened,
            gram=gram,
            processes=processes,
        )
    if any(planned_average.batchnorm == "stale" for planned_average in planned):
        log.info(
            "BatchNorm statistics are not those of the averaged weights (stale): recompute them "
            "with `ckptavg update-bn`, or by --model and --train-data"
        )
    return written


def _write_recomputed(
    report: Report,
    planned: Sequence[Average],
    targets: Sequence[Target],
    write_options: WriteOptions,
    run: Run,
    statistics_pass: StatisticsPass,
) -> Written:
    """Write the averages with recomputed statistics."""
    from ckptavg.averaging.pipeline import write_averages  # noqa: PLC0415

    with report.samples_progress() as progress:
        report_reading = functools.partial(progress, "averaging (bytes)")
        report_pass = functools.partial(progress, "BatchNorm")
        return write_averages(
            planned,
            targets,
            replace(write_options, progress=report_reading),
            order=run.opened,
            statistics_pass=replace(statistics_pass, progress=report_pass),
        )


def _measured_weights(selection: Run, tensors: TensorOptions) -> list[TensorPlan]:
    from ckptavg.inspection import geometry as weight_space  # noqa: PLC0415

    weight_space.check_several(selection)
    rules = Rules(tensors.include, tensors.exclude)
    return weight_space.list_weights(selection, rules)


def _geometry(report: Report, selection: Run, gram: torch.Tensor | None) -> dict[str, Any]:
    """Show the geometry of the averaged checkpoints; nothing fails, as the outputs are written."""
    from ckptavg.inspection import geometry as weight_space  # noqa: PLC0415

    try:
        measured = weight_space.geometry_of(selection, gram)
    except NonFiniteError as error:
        log.warning("no geometry: %s", error.message)
        return {"geometry": None}
    report.line("")
    geometry.show(report, measured)
    return {"geometry": geometry.values(measured)}


def _written(report: Report, provenance: Provenance, out: str) -> dict[str, Any]:
    """Print the written output, and return the same as plain values."""
    size = _size(Path(out))
    facts = [] if size is None else [size_text(size)]
    facts += [] if provenance.bn == "none" else [f"BatchNorm statistics: {provenance.bn}"]
    report.line(f"wrote {out}" + (f" ({', '.join(facts)})" if facts else ""))
    if provenance.digest is not None:
        report.line(f"digest of its weights: {provenance.digest}")
    return {**provenance.entries, "output": out, "bytes": size}


def _result(report: Report, made: list[dict[str, Any]], further: tuple[AlsoAverage, ...]) -> None:
    """Emit the command's average as JSON, further averages under ``also``."""
    further_records = [
        {"name": extra.name} | record for extra, record in zip(further, made[1:], strict=True)
    ]
    report.result(made[0] | ({"also": further_records} if further_records else {}))


def _note_order(given: tuple[str, ...], ordered: list[str]) -> None:
    """Note weights that go to other checkpoints than the order of the paths suggests."""
    named = [path for path in given if path in ordered]
    if len(named) > 1 and named != [path for path in ordered if path in named]:
        log.info("the weights go to the checkpoints in the run's order, not in the order given")


def _show_plan(report: Report, planned: Average, name: str) -> None:
    """Show the checkpoints of an average by their paths within the run."""
    checkpoints = planned.plan.checkpoints
    names = short_names([checkpoint.path for checkpoint in checkpoints])
    rows = []
    for short, checkpoint, coefficient in zip(
        names, checkpoints, planned.plan.coefficients, strict=True
    ):
        step, lr = number_text(checkpoint.step), number_text(checkpoint.record.lr)
        rows.append((short, step, lr, f"{coefficient:.6g}"))
    of = f"{name}: " if name else ""
    title = f"{of}{count_text(len(rows), 'checkpoint')}, {planned.scheme.text}"
    report.table(("checkpoint", "step", "LR", "coefficient"), rows, title=title)


def _size(path: Path) -> int | None:
    """Return the size of an output in bytes; None where reading the size fails.

    Args:
        path: A file or a directory.
    """
    try:
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files)
    except OSError:
        return None
