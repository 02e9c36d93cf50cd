"""``ckptavg eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ckptavg.cli import options
from ckptavg.errors import OutputError, UsageError
from ckptavg.report import Report, write_results

if TYPE_CHECKING:
    from ckptavg.evaluation import Candidate, Result

_CANDIDATES = "Candidates"
_RESULTS = "Results"
_OF_A_RUN = (
    "each", "compare", "fail_if_worse", "glob", "every", "cycle", "at_lr_min", "best", "sample",
    "last", "scheme", "weights", "include", "exclude", "base", "dtype", "train_data",
)  # fmt: skip
_WORSE = 3  # exit code of --fail-if-worse


@click.command("eval", cls=options.Grouped)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@options.option(
    _CANDIDATES, "--run", "run_path", metavar="RUN",
    help="Adds its last checkpoint and the average of the selection.",
)  # fmt: skip
@options.option(_CANDIDATES, "--each", is_flag=True, help="Adds every selected checkpoint.")
@options.option(
    _CANDIDATES, "--compare", type=click.Choice(["fge"]), help="Adds the output ensemble (FGE)."
)
@options.option(
    _RESULTS, "--results", type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE", help="Also write them to FILE.json or FILE.csv.",
)  # fmt: skip
@options.option(
    _RESULTS, "--fail-if-worse", is_flag=True,
    help="Exit 3 if the average has a lower top-1 than the last checkpoint.",
)  # fmt: skip
@options.model_options(required=True)
@options.data_options("data", "Scored on", required=True)
@options.data_options("train-data", "Recomputes the average's BatchNorm", required=False)
@options.loader_options
@options.selection_options
@options.scheme_options
@options.tensor_options
@options.everywhere
def evaluate(
    report: Report,
    paths: tuple[str, ...],
    results: Path | None,
    fail_if_worse: bool,
    **settings: Any,
) -> None:
    """Score checkpoints, an average and the FGE ensemble side by side on the same data.

    \b
      ckptavg eval --run runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train --each --compare fge
    """
    _check(paths, results, settings)
    candidates = _candidates(paths, settings)
    from ckptavg import evaluation, sources  # noqa: PLC0415 - help is shown without torch
    from ckptavg.cli.sources import (  # noqa: PLC0415
        evaluation_data,
        runtime_options,
        training_data,
    )

    model = sources.make_model(
        settings["model_spec"], sources.parse_arguments(settings["model_arg"])
    )
    train = training_data(settings) if settings["train_data"] else None
    with report.batch_progress() as progress:
        scored = evaluation.evaluate(
            candidates, model, evaluation_data(settings), train_loader=train,
            device=settings["device"], progress=progress,
            keep_nonfinite=settings["on_nonfinite"] == "keep", **runtime_options(settings),
        )  # fmt: skip
    _show(report, scored)
    outcome = {"candidates": [result.as_json() for result in scored]}
    if results is not None:
        write_results(results, outcome)
    report.result(outcome)
    if fail_if_worse and evaluation.is_worse(scored):
        click.echo("The average does worse than the last checkpoint.", err=True)
        raise click.exceptions.Exit(_WORSE)


def _check(paths: tuple[str, ...], results: Path | None, settings: dict[str, Any]) -> None:
    """Refuse what cannot work before any file is opened."""
    run = settings["run_path"]
    if not paths and run is None:
        raise UsageError("Nothing to evaluate: name checkpoints, or a run with --run")
    given = click.get_current_context().get_parameter_source
    for name in _OF_A_RUN:
        if run is None and given(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} needs --run")
    if results is not None and results.suffix not in (".json", ".csv"):
        raise UsageError(f"--results is expected to end in .json or .csv but got {results}")
    if results is not None and not results.absolute().parent.is_dir():
        raise OutputError(f"the directory {results.parent} does not exist", "Create it first.")


def _candidates(paths: tuple[str, ...], settings: dict[str, Any]) -> list[Candidate]:
    from ckptavg import evaluation  # noqa: PLC0415
    from ckptavg.formats import is_checkpoint_directory, open_checkpoint  # noqa: PLC0415
    from ckptavg.formats.storage import locate  # noqa: PLC0415

    for path in paths:
        place = locate(path)
        if place.is_dir() and not is_checkpoint_directory(place):
            raise UsageError(f"{path} is no checkpoint: a run goes after --run")
    found = [
        evaluation.Candidate.of_checkpoint(open_checkpoint(path, settings["key"]), path)
        for path in paths
    ]
    if settings["run_path"] is None:
        return found
    run, selection = options.open_selected(
        [settings["run_path"]], settings["glob"], settings["key"], settings
    )
    planned = options.planned(selection, settings)
    return found + evaluation.candidates_of(
        run, selection, planned, each=settings["each"],
        ensemble=settings["compare"] == "fge", recompute=bool(settings["train_data"]),
    )  # fmt: skip


def _show(report: Report, scored: list[Result]) -> None:
    rows = [
        (
            result.candidate.name,
            result.bn,
            f"{result.metrics['top1']:.2f}",
            f"{result.metrics['top5']:.2f}",
            f"{result.metrics['nll']:.4f}",
            f"{result.metrics['ece']:.4f}",
            str(result.forwards),
        )
        for result in scored
    ]
    columns = ("candidate", "BatchNorm", "top-1 %", "top-5 %", "NLL", "ECE", "passes")
    report.table(columns, rows, title=f"{scored[0].metrics['n']} samples")
