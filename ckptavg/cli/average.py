"""``ckptavg average``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import options
from ckptavg.errors import UsageError
from ckptavg.report import Report, counted, number_text, size_text

if TYPE_CHECKING:
    from ckptavg.averaging import Average

_OUT = "Output"
log = logging.getLogger("ckptavg")


@click.command(cls=options.Grouped)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@options.option(
    _OUT, "-o", "--out", metavar="OUT",
    help="FILE.safetensors, FILE.pt, a file with the inputs' suffix, or a directory.",
)  # fmt: skip
@options.option(_OUT, "--dry-run", is_flag=True, help="Show the plan, write nothing.")
@options.option(_OUT, "--overwrite", is_flag=True, help="Replace an existing output.")
@options.selection_options
@options.scheme_options
@options.tensor_options
@options.model_options(required=False)
@options.data_options("train-data", "Recomputes BatchNorm statistics", required=False)
@options.loader_options
@options.everywhere
def average(
    report: Report,
    paths: tuple[str, ...],
    out: str | None,
    dry_run: bool,
    overwrite: bool,
    glob: str | None,
    key: str | None,
    **settings: Any,
) -> None:
    """Average the checkpoints of a run into one model.

    PATH is a run directory or a checkpoint, or the URL of one (s3://bucket/run, https://...);
    several of each are fine. Checkpoints are ordered by
    recorded step, then epoch, then the numbers in their names; what repeats one counts once.

    \b
      ckptavg average runs/swa -o swa.safetensors
      ckptavg average runs/swa --last 10 --scheme ema:decay=0.9 -o ema.pt
      ckptavg average runs/swa -o swa.pt --model torchvision:resnet50 --train-data imagefolder:train
    """
    if out is None and not dry_run:
        raise UsageError("Missing option '-o': where the average goes (or pass --dry-run)")
    if bool(settings["model_spec"]) != bool(settings["train_data"]):
        raise UsageError("--model and --train-data go together: they recompute BatchNorm")
    _, selection = options.open_selected(paths, glob, key, settings)
    if settings["weights"]:
        _note_order(paths, [str(c.path) for c in selection])
    from ckptavg import averaging  # noqa: PLC0415 - help is shown without torch

    planned = options.planned(selection, settings)
    if out is not None:
        layout = averaging.prepare(planned, out, overwrite=overwrite)
        for note in layout.notes if dry_run else ():
            log.info(note)
    _show_plan(report, planned)
    if out is None or dry_run:
        report.result(planned.provenance() | {"output": None})
        return
    batchnorm = _write(report, planned, out, overwrite, settings)
    written = sum(f.stat().st_size for f in _files(Path(out)))
    state = "" if batchnorm == "none" else f", BatchNorm statistics: {batchnorm}"
    report.line(f"wrote {out} ({size_text(written)}{state})")
    report.result(planned.provenance(batchnorm) | {"output": out, "bytes": written})


def _write(
    report: Report, planned: Average, out: str, overwrite: bool, settings: dict[str, Any]
) -> str:
    """Write the average, with recomputed statistics if a model is given; returns their state."""
    from ckptavg import averaging  # noqa: PLC0415

    care = {"overwrite": overwrite, "keep_nonfinite": settings["on_nonfinite"] == "keep"}
    if not settings["model_spec"]:
        with report.bytes_progress("averaging") as progress:
            averaging.write(planned, out, **care, progress=progress)
        return planned.batchnorm
    from ckptavg import refresh  # noqa: PLC0415
    from ckptavg.cli.sources import model_and_runtime, training_data  # noqa: PLC0415

    model, runtime = model_and_runtime(settings)
    data = training_data(settings)
    with report.batch_progress() as progress:
        refresh.write_average(
            planned, out, model, data, runtime, **care,
            progress=lambda done, total: progress("averaging (bytes)", done, total),
            batch_progress=lambda done, total: progress("BatchNorm", done, total),
        )  # fmt: skip
    return refresh.RECOMPUTED


def _note_order(given: tuple[str, ...], ordered: list[str]) -> None:
    """Say so if weights would go to other checkpoints than the order of the paths suggests."""
    named = [path for path in given if path in ordered]
    if len(named) > 1 and named != [path for path in ordered if path in named]:
        log.info("the weights go to the checkpoints in the run's order, not in the order given")


def _show_plan(report: Report, planned: Average) -> None:
    rows = [
        (
            str(checkpoint.path),
            number_text(checkpoint.step),
            number_text(checkpoint.record.lr),
            f"{coefficient:.6g}",
        )
        for checkpoint, coefficient in zip(
            planned.plan.checkpoints, planned.plan.coefficients, strict=True
        )
    ]
    title = f"{counted(len(rows), 'checkpoint')}, {planned.scheme.text}"
    report.table(("checkpoint", "step", "LR", "coefficient"), rows, title=title)


def _files(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
