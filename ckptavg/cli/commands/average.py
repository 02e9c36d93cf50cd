"""``ckptavg average``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.averaging.planning.rules import Rules
from ckptavg.cli.command import command
from ckptavg.cli.commands import geometry
from ckptavg.cli.console import Report, count_text, number_text
from ckptavg.cli.layer_table import layer_values, show_layers
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
    from ckptavg.averaging import pipeline  # noqa: PLC0415 - help is shown without torch

    outputs = [_Output("", plan_selection(selection, weighting, tensors), out)]
    for extra in further:
        path = None if out is None else extra.path(out)
        outputs.append(_Output(extra.name, extra.plan(run, selection, tensors), path))
    averages = [output.average for output in outputs]
    # The read for the average gives the inner products, too: no second one is needed.
    gram = _measured_weights(selection, tensors) if measured else []
    write_options = pipeline.WriteOptions(overwrite, tensors.keep_nonfinite, digests)
    pairs = [(output.average, output.path) for output in outputs if output.path is not None]
    targets = pipeline.prepare_targets(pairs, write_options)
    statistics_pass = None
    if dry_run:
        _log_notes(averages, targets)
    else:
        statistics_pass = _prepare_pass(running, selection, processes)
    # Quiet means without the plan of what is written; a dry run has nothing else to show.
    if dry_run or report.verbosity >= 0:
        for output in outputs:
            _show_plan(report, output)
    if dry_run:
        # The JSON of a dry run has the entries of a real one, so that programs can compare them.
        records = [{**average.provenance().entries, "output": None} for average in averages]
        _report_result(report, records, outputs)
        return
    if statistics_pass is None:
        written = _write(report, averages, targets, write_options, run, gram, processes)
    else:
        written = _write_recomputed(report, averages, targets, write_options, run, statistics_pass)
    # The first process has looked at the outputs for all.
    if processes is not None and processes.rank:
        return
    records = []
    for provenance, target in zip(written.provenances, targets, strict=True):
        records.append(_report_written(report, provenance, target.out))
    if measured:
        records[0] |= _report_geometry(report, selection, written.gram)
    _report_result(report, records, outputs)


@dataclass(frozen=True)
class _Output:
    """An average of the command.

    Attributes:
        name: Name by ``--also``; empty for the command's own average.
        average: The planned average.
        path: Path of the output; None for no output.
    """

    name: str
    average: Average
    path: str | None


def _log_notes(averages: Sequence[Average], targets: Sequence[Target]) -> None:
    """Log the notes on plans and outputs that writing the averages would log."""
    from ckptavg.averaging import remarks  # noqa: PLC0415
    from ckptavg.outputs.target import layout_notes  # noqa: PLC0415

    remarks.log_plans([average.plan for average in averages])
    for note in layout_notes(targets):
        log.info(note)


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
        # A dry run reads no weights, and recomputing reads them in another way.
        other = "--dry-run" if dry_run else "--train-data"
        raise UsageError(
            f"--geometry and {other} exclude each other: "
            "`ckptavg inspect --geometry` shows it by itself"
        )
    running.check_statistics()


def _prepare_pass(
    running: RunningOptions, selection: Run, processes: TorchrunGroup | None
) -> StatisticsPass | None:
    """Make the model and open the data before a plan is shown, as either may be unusable.

    Returns:
        None where statistics are not to be recomputed.
    """
    if not running.training.spec:
        return None
    from ckptavg.cli.build import build_statistics_pass  # noqa: PLC0415 - imports torch

    return build_statistics_pass(running, selection.opened[-1:], processes)


def _write(
    report: Report,
    averages: Sequence[Average],
    targets: Sequence[Target],
    write_options: WriteOptions,
    run: Run,
    gram: Sequence[TensorPlan],
    processes: TorchrunGroup | None,
) -> Written:
    """Write the averages, from one read."""
    from ckptavg.averaging.pipeline import write_averages  # noqa: PLC0415

    # Reading is the work that takes time, so bytes tell how far it is.
    with report.bytes_progress("averaging") as progress:
        written = write_averages(
            averages,
            targets,
            replace(write_options, progress=progress),
            order=run.opened,
            gram=gram,
            processes=processes,
        )
    if any(average.batchnorm == "stale" for average in averages):
        log.info(
            "BatchNorm statistics are not those of the averaged weights (stale): recompute them "
            "with `ckptavg update-bn`, or by --model and --train-data"
        )
    return written


def _write_recomputed(
    report: Report,
    averages: Sequence[Average],
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
            averages,
            targets,
            replace(write_options, progress=report_reading),
            order=run.opened,
            statistics_pass=replace(statistics_pass, progress=report_pass),
        )


def _measured_weights(selection: Run, tensors: TensorOptions) -> list[TensorPlan]:
    from ckptavg.inspection import geometry as weight_space  # noqa: PLC0415

    # Before the read: a single checkpoint has no distances.
    weight_space.check_several(selection)
    rules = Rules(tensors.include, tensors.exclude)
    return weight_space.list_weights(selection, rules)


def _report_geometry(report: Report, selection: Run, gram: torch.Tensor | None) -> dict[str, Any]:
    """Show the geometry of the averaged checkpoints, or warn that weights are not finite."""
    from ckptavg.inspection import geometry as weight_space  # noqa: PLC0415

    try:
        measured = weight_space.geometry_of(selection, gram)
    except NonFiniteError as error:
        log.warning("no geometry: %s", error.message)
        return {"geometry": None}
    report.line("")
    geometry.show(report, measured)
    return {"geometry": geometry.values(measured)}


def _report_written(report: Report, provenance: Provenance, out: str) -> dict[str, Any]:
    """Print the written output, and return the same as plain values."""
    size = _size(Path(out))
    facts: list[str] = []
    if size is not None:
        facts.append(size_text(size))
    if provenance.bn != "none":
        facts.append(f"BatchNorm statistics: {provenance.bn}")
    about = f" ({', '.join(facts)})" if facts else ""
    report.line(f"wrote {out}{about}")
    if provenance.digest is not None:
        report.line(f"digest of its weights: {provenance.digest}")
    return {**provenance.entries, "output": out, "bytes": size}


def _report_result(
    report: Report, records: Sequence[dict[str, Any]], outputs: Sequence[_Output]
) -> None:
    """Emit the command's average as JSON, further averages under ``also``."""
    with_layers: list[dict[str, Any]] = []
    for planned, record in zip(outputs, records, strict=True):
        with_layers.append(record | layer_values(planned.average.plan))
    # The command's own average stays where it is without further ones.
    result, *further = with_layers
    also: list[dict[str, Any]] = []
    for extra, record in zip(outputs[1:], further, strict=True):
        also.append({"name": extra.name, **record})
    if also:
        result = {**result, "also": also}
    report.result(result)


def _note_order(given: tuple[str, ...], ordered: list[str]) -> None:
    """Note weights that go to other checkpoints than the order of the paths suggests."""
    named = [path for path in given if path in ordered]
    if len(named) > 1 and named != [path for path in ordered if path in named]:
        log.info("the weights go to the checkpoints in the run's order, not in the order given")


def _show_plan(report: Report, output: _Output) -> None:
    """Show the checkpoints of an average by their paths within the run."""
    plan = output.average.plan
    names = short_names([checkpoint.path for checkpoint in plan.checkpoints])
    rows = []
    for name, checkpoint, coefficient in zip(
        names, plan.checkpoints, plan.coefficients, strict=True
    ):
        step, lr = number_text(checkpoint.step), number_text(checkpoint.record.lr)
        rows.append((name, step, lr, f"{coefficient:.6g}"))
    title = f"{count_text(len(rows), 'checkpoint')}, {output.average.scheme.text}"
    if output.name:
        title = f"{output.name}: {title}"
    report.table(("checkpoint", "step", "LR", "coefficient"), rows, title=title)
    show_layers(report, plan)


def _size(path: Path) -> int | None:
    """Return the size of an output in bytes; None where reading the size fails.

    Args:
        path: A file or a directory.
    """
    try:
        if not path.is_dir():
            return path.stat().st_size
        # An output that another process has just moved away is still a success.
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:
        return None
