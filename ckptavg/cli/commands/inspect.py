"""``ckptavg inspect``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands import geometry as shown
from ckptavg.cli.console import Report, count_text, number_text
from ckptavg.cli.options.declare import option
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.cli.wording import for_shell
from ckptavg.display.tables import Column
from ckptavg.errors import UsageError, first_few
from ckptavg.errors.printable import size_text, split_directory
from ckptavg.formats import Checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.statistics_names import batchnorm_layers
from ckptavg.io.paths import locate, without_secrets
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.metric_columns import MetricColumns, choose_metric_columns
from ckptavg.runs.run import Run, open_run
from ckptavg.runs.selection_notes import note_cycles

if TYPE_CHECKING:
    from ckptavg.inspection.geometry import Geometry

_WHAT = "What"
_MOST_METRICS = 3  # columns
_MOST_LISTED = 12  # in a line


@command()
@click.argument("path", metavar="PATH")
@option(
    _WHAT, "--key", metavar="KEY", common=True,
    help="The entry that holds the weights.  [default: found]",
)  # fmt: skip
@option(
    _WHAT, "--geometry", "measured", is_flag=True, common=True,
    help="Read a run's weights, too: norms, steps, distances, the odd one out.",
)  # fmt: skip
@option(
    _WHAT, "--verify", is_flag=True, common=True,
    help="Read everything and compare it with the digests that `average --digests` recorded.",
)  # fmt: skip
@selection_options
def inspect(
    report: Report,
    path: str,
    key: str | None,
    *,
    measured: bool,
    verify: bool,
    select: SelectionOptions,
) -> None:
    """Show what a run or a checkpoint holds.

    Tensors are read only where that is asked for. A run: its checkpoints in order, what was
    recorded, what is left out and why. A checkpoint: its tensors, its BatchNorm layers, and how it
    was made if ckptavg made it.

    The options that select checkpoints are those of `average`: they show what it would take.

    \b
      ckptavg inspect runs/swa
      ckptavg inspect runs/cyclic --at-lr-min --last 5
    """
    if measured and verify:
        raise UsageError("--geometry and --verify exclude each other: ask for one at a time")
    select.check()
    full_run = open_run(path, glob=select.glob, skip=select.skip, key=key)
    run = select.select(full_run)
    # A selection of a run is shown as a run, also where one checkpoint is left.
    is_selection = run is not full_run
    if verify:
        from ckptavg.cli.commands import (  # noqa: PLC0415 - needs torch, the rest does not
            verification,
        )

        verification.show(report, path, run, key)
    elif measured:
        _show_run(report, run, full_run, _measured(report, run))
    elif not is_selection and len(run) == 1 and run.checkpoints[0].path == locate(path):
        _show_checkpoint(report, run.checkpoints[0])
    else:
        _show_run(report, run, full_run)
    note_cycles(full_run, run)


def _measured(report: Report, run: Run) -> Geometry:
    from ckptavg.inspection.geometry import (  # noqa: PLC0415 - all else is shown without torch
        geometry,
    )

    with report.bytes_progress("measuring") as progress:
        return geometry(run, progress=progress)


def _show_run(report: Report, run: Run, whole: Run, geometry: Geometry | None = None) -> None:
    """Show a run, or a selection of the whole run, as tables and as JSON."""
    metrics = choose_metric_columns(run.checkpoints)
    shown_metrics = metrics.names[:_MOST_METRICS]
    rows: list[Sequence[str]] = []
    names = short_names([checkpoint.path for checkpoint in run])
    for name, checkpoint in zip(names, run, strict=True):
        rows.append(_run_row(name, checkpoint, shown_metrics))
    report.table(_run_columns(shown_metrics), rows, title=_run_title(run, whole))
    _show_other_metrics(report, metrics)
    excluded = _show_excluded(report, run)
    if extra_entries := run.checkpoints[-1].other_entries:
        report.line(f"beside the weights, not averaged: {', '.join(extra_entries)}")
    notes: list[str] = []
    for note in _notes_of(run):
        report.line(f"note: {note}")
        notes.append(for_shell(note))
    result: dict[str, Any] = {
        "checkpoints": [_summary(checkpoint) for checkpoint in run],
        "left_out": excluded,
        "notes": notes,
    }
    if geometry is not None:
        shown.show(report, geometry)
        result["geometry"] = shown.values(geometry)
    report.result(result)


def _show_excluded(report: Report, run: Run) -> list[dict[str, str]]:
    """Show the paths that are left out, with reasons, and return the same as plain values."""
    entries: list[dict[str, str]] = []
    rows: list[tuple[str, str]] = []
    # Shortened among themselves: they may be in other directories than the run.
    names = short_names([left_out.path for left_out in run.excluded])
    for name, left_out in zip(names, run.excluded, strict=True):
        why = for_shell(left_out.why)
        rows.append((name, why))
        entries.append({"path": without_secrets(str(left_out.path)), "why": why})
    if rows:
        report.table(("left out", "why"), rows)
    return entries


def _run_title(run: Run, whole: Run) -> str:
    kinds = ", ".join(dict.fromkeys(checkpoint.format.label for checkpoint in run))
    title = f"{count_text(len(whole.opened), 'checkpoint')} in order ({kinds})"
    return title if run is whole else f"{len(run)} of {title}"


def _run_row(name: str, checkpoint: Checkpoint, metrics: Sequence[str]) -> Sequence[str]:
    record = checkpoint.record
    row = [name, number_text(checkpoint.step)]
    row += [number_text(record.epoch), number_text(record.lr)]
    for metric in metrics:
        row.append(number_text(record.metrics.get(metric)))
    row.append(first_few([entry or "(the file)" for entry in checkpoint.entries]))
    return [*row, size_text(checkpoint.size)]


def _show_other_metrics(report: Report, metrics: MetricColumns) -> None:
    """Name the metrics that have no column, with the reason."""
    if more := metrics.names[_MOST_METRICS:]:
        report.line(f"more metrics: {', '.join(more)}")
    if metrics.repeats:
        pairs = [f"{name} (as {column})" for name, column in metrics.repeats.items()]
        report.line(f"the same as other columns: {', '.join(pairs)}")
    if metrics.constants:
        pairs = [f"{name} {number_text(value)}" for name, value in metrics.constants.items()]
        report.line(f"the same in all: {', '.join(pairs)}")


def _notes_of(run: Run) -> list[str]:
    """List the notes of a run and of its checkpoints, each once."""
    # The table of excluded paths says the same.
    in_table = {left_out.note for left_out in run.excluded}
    notes = [note for note in run.notes if note not in in_table]
    for checkpoint in run:
        notes += checkpoint.notes
    return list(dict.fromkeys(notes))


def _run_columns(metrics: Sequence[str]) -> list[Column]:
    """Return the columns of a run's table. Of the metrics, the first is left out last."""
    count = len(metrics[1:])
    columns = [Column("checkpoint", "name"), Column("step", "number")]
    columns += [Column("epoch", "number", count + 2), Column("LR", "number", count + 4)]
    for position, name in enumerate(metrics):
        turn = len(metrics) - position
        if position == 0:
            # The first metric is what people select by: only LR and size stay longer.
            turn = count + 3
        columns.append(Column(name, "number", turn))
    return [*columns, Column("weights", "prose", count + 1), Column("size", "number", count + 5)]


def _show_checkpoint(report: Report, checkpoint: Checkpoint) -> None:
    """Show a single checkpoint as text, as a table of tensors and as JSON."""
    layers, ties = batchnorm_layers(checkpoint.tensors), checkpoint.ties()
    rows: list[tuple[str, str, str]] = []
    tensors: dict[str, dict[str, Any]] = {}
    count = 0
    for name, tensor in checkpoint.tensors.items():
        tensors[name] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
        rows.append((name, tensor.dtype.name, "×".join(map(str, tensor.shape)) or "scalar"))
        count += tensor.numel
    # Entries that no average can have are listed, too, with the reason in place of a type.
    for name, why in checkpoint.refused.items():
        rows.append((name, why, ""))
    report.line(
        f"{checkpoint.path}: {len(rows)} tensors, {count:,} values, {size_text(checkpoint.size)}, "
        f"{_entries_text(checkpoint)}"
    )
    _show_record(report, checkpoint)
    names = f" ({first_few([*layers])})" if layers else ""
    report.line(f"BatchNorm layers: {len(layers)}{names}")
    if checkpoint.other_entries:
        report.line(f"beside the weights: {', '.join(checkpoint.other_entries)}")
    for group in ties:
        report.line(f"tied: {' = '.join(group)}")
    for note in checkpoint.notes:
        report.line(f"note: {note}")
    provenance = checkpoint.provenance
    if provenance is not None:
        _show_provenance(report, provenance)
    report.table(("tensor", "dtype", "shape"), rows)
    entries = None if provenance is None else dict(provenance.entries)
    report.result(
        _summary(checkpoint)
        | {"tensors": tensors, "batchnorm": list(layers), "tied": ties, "ckptavg": entries}
    )


def _show_record(report: Report, checkpoint: Checkpoint) -> None:
    """Show the numbers that training recorded."""
    record = checkpoint.record
    report.line(
        f"step {number_text(record.step)}, epoch {number_text(record.epoch)}, "
        f"LR {number_text(record.lr)}"
    )
    if metrics := choose_metric_columns([checkpoint]).names[:_MOST_LISTED]:
        values = [f"{name} {number_text(record.metrics[name])}" for name in metrics]
        report.line(f"recorded: {', '.join(values)}")


def _entries_text(checkpoint: Checkpoint) -> str:
    if checkpoint.networks:
        return f"{len(checkpoint.networks)} networks"
    if checkpoint.key:
        return f"weights under {checkpoint.key}"
    return "a state dict itself"


def _show_provenance(report: Report, provenance: Provenance) -> None:
    sources = provenance.inputs
    directory, names = split_directory([str(source.path) for source in sources])
    rows = []
    for name, source in zip(names, sources, strict=True):
        rows.append((name, number_text(source.step), number_text(source.coefficient)))
    title = (
        f"made by ckptavg {provenance.version}: {provenance.scheme}, "
        f"BatchNorm statistics {provenance.bn}"
    )
    if directory:
        title += f", from {directory}"
    report.table(("checkpoint", "step", "coefficient"), rows, title=title)
    for kind, layers in provenance.bn_layers.items():
        report.line(f"BatchNorm {kind.replace('_', ' ')}: {first_few(layers)}")
    if provenance.digest is not None:
        report.line(f"digest of its weights: {provenance.digest} (--verify compares)")


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    record = checkpoint.record
    return {
        "path": without_secrets(str(checkpoint.path)),
        "layout": checkpoint.layout,
        "key": checkpoint.key,
        "networks": list(checkpoint.networks),
        "step": checkpoint.step,
        "epoch": record.epoch,
        "lr": record.lr,
        "metrics": dict(record.metrics),
        "size": checkpoint.size,
        "beside": list(checkpoint.other_entries),
    }
