"""``ckptavg eval``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ckptavg.cli import options
from ckptavg.cli.also import Also, also, planned_also
from ckptavg.cli.console import Report
from ckptavg.cli.help import GroupedCommand
from ckptavg.cli.resume import Keeper
from ckptavg.cli.selection import open_selection, plan_selection
from ckptavg.distributed.peers import global_rank
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import OutputError, UsageError

if TYPE_CHECKING:
    from ckptavg.evaluation.candidates import Candidate
    from ckptavg.evaluation.results import Result
    from ckptavg.evaluation.results_file import ResultsFile
    from ckptavg.formats import Checkpoint
    from ckptavg.models.batches import Batches
    from ckptavg.specs.recorded import ModelSource
    from ckptavg.tasks import Task

log = logging.getLogger("ckptavg")
_CANDIDATES = "Candidates"
_RESULTS = "Results"
_OF_A_RUN = (
    "each", "compare", "fail_if_worse", "glob", "skip", "every", "cycle", "at_lr_min", "best",
    "sample", "last", "scheme", "weights", "include", "exclude", "base", "dtype",
)  # fmt: skip
_WORSE = 3  # exit code of --fail-if-worse


@click.command("eval", cls=GroupedCommand)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@options.option(
    _CANDIDATES, "--run", "run_path", metavar="RUN", common=True,
    help="Score its last checkpoint and the average of the selected ones.",
)  # fmt: skip
@options.option(
    _CANDIDATES, "--each", is_flag=True, common=True, help="Score every selected checkpoint, too."
)
@options.option(
    _CANDIDATES, "--also", "further", multiple=True, type=also, metavar="NAME=SCHEME[@SELECTION]",
    help="Score one more average. SELECTION is of the whole run, in the words of the options: "
    "last5=uniform@last=5.",
)  # fmt: skip
@options.option(
    _CANDIDATES, "--compare", type=click.Choice(["fge"]), common=True,
    help="Score the ensemble, too: the mean of the selected checkpoints' outputs.",
)  # fmt: skip
@options.option(
    _CANDIDATES, "--no-stale", is_flag=True,
    help="Score no average with its BatchNorm statistics as averaged beside the recomputed ones.",
)  # fmt: skip
@options.option(
    _RESULTS, "--results", type=click.Path(dir_okay=False), metavar="FILE", common=True,
    help="Keep the results in FILE.json or FILE.csv, beside what it holds.",
)  # fmt: skip
@options.option(
    _RESULTS, "--resume", is_flag=True,
    help="Score only what FILE.json of --results does not hold yet.",
)  # fmt: skip
@options.option(
    _RESULTS, "--fail-if-worse", is_flag=True,
    help="Exit 3 if the average does worse than the last checkpoint by the first metric.",
)  # fmt: skip
@options.model_options
@options.data_options("data", "What is scored on", required=True)
@options.data_options("train-data", "Recomputes the averages' BatchNorm", required=False)
@options.loader_options
@options.selection_options
@options.scheme_options
@options.keys_option
@options.tensor_options
@options.everywhere_by_several
def evaluate(
    report: Report,
    processes: TorchrunGroup | None,
    paths: tuple[str, ...],
    further: tuple[Also, ...],
    results: str | None,
    resume: bool,
    fail_if_worse: bool,
    **settings: Any,
) -> None:
    """Score checkpoints, an average and the FGE ensemble side by side on the same data.

    \b
      ckptavg eval --run runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train --each --compare fge
    """
    _check(paths, results, resume, further, settings)
    file = _open_results(results, resume=resume)
    candidates = _candidates(paths, further, settings)
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.evaluation.results import is_worse, without_repeats  # noqa: PLC0415

    source = build.model_source(settings, _recorders(candidates))
    task = build.task(settings)
    if fail_if_worse and task.metrics[0].higher is None:
        raise UsageError(
            f"--fail-if-worse needs a first metric that says which is better: "
            f"{task.metrics[0].key} does not"
        )
    keeper = Keeper(candidates, settings, file, resume=resume, processes=processes)
    scored = _scored(report, processes, keeper, source, task, settings)
    failure = _keep(keeper, scored)
    scored = without_repeats(scored)
    _show(report, scored, task)
    report.result(keeper.outcome(scored))
    if failure is not None:
        raise failure
    if fail_if_worse and is_worse(scored, task):
        if processes is not None:
            processes.gather(None)  # a launcher ends all when one exits: the first has written
        if not global_rank():
            report.remark("The average does worse than the last checkpoint.")
        raise click.exceptions.Exit(_WORSE)


def _scored(
    report: Report,
    processes: TorchrunGroup | None,
    keeper: Keeper,
    source: ModelSource,
    task: Task,
    settings: dict[str, Any],
) -> list[Result]:
    """Score the candidates without a kept result, and return the results of all."""
    if not keeper.missing:
        return keeper.merged([])
    from ckptavg.cli.build import (  # noqa: PLC0415
        evaluation_data,
        forward,
        model_and_runtime,
        training_data,
    )
    from ckptavg.evaluation import evaluate as evaluation  # noqa: PLC0415

    custom_forward = forward(settings)
    model, runtime = model_and_runtime(settings, source, task)
    training = None
    if any(candidate.recompute for candidate in keeper.missing):
        training = training_data(settings, source, runtime, processes)
    elif settings["train_data"]:
        evaluation.note_idle_training(keeper.missing)
    data = evaluation_data(settings, source, runtime, processes)
    _warn_of_training_data(settings, data, training)
    with report.samples_progress() as progress:
        scored = evaluation.score(
            keeper.missing, model, data, runtime, training, task=task, forward=custom_forward,
            progress=progress,
            keep_nonfinite=settings["on_nonfinite"] == "keep", peers=processes,
            on_results=keeper.keep_so_far,
            exclude=settings["bn_exclude"],
        )  # fmt: skip
    return keeper.merged(scored)


def _warn_of_training_data(
    settings: Mapping[str, Any], data: Batches, training: Batches | None
) -> None:
    """Warn of scores on the training data, where a function's argument was forgotten.

    The same function gives other data where it is asked for a split by name: a module of data
    loaders, say. Such are told from the same by their number of samples.
    """
    named = [(settings[name], settings[f"{name}_arg"]) for name in ("data", "train_data")]
    scored, trained = _count_samples(data), _count_samples(training)
    if named[0] == named[1] and scored is not None and scored == trained:
        log.warning(
            "--data and --train-data name the same %d samples: the scores are on training data",
            scored,
        )


def _count_samples(batches: Batches | None) -> int | None:
    """Return the number of samples that a loader reads from; None where it has no such number."""
    dataset = getattr(batches, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def _check(
    paths: tuple[str, ...],
    results: str | None,
    resume: bool,
    further: tuple[Also, ...],
    settings: dict[str, Any],
) -> None:
    """Refuse combinations of options before any file is opened."""
    run = settings["run_path"]
    if not paths and run is None:
        raise UsageError("Nothing to evaluate: name checkpoints, or a run with --run")
    source_of = click.get_current_context().get_parameter_source
    for name in _OF_A_RUN:
        if run is None and source_of(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} needs --run")
    if run is None and further:
        raise UsageError("--also needs --run")
    names = [extra.name for extra in further]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"two averages are called {repeated[0]}: give each its own name")
    if results is not None and Path(results).suffix not in (".json", ".csv"):
        raise UsageError(f"--results is expected to end in .json or .csv but got {results}")
    if resume and (results is None or Path(results).suffix != ".json"):
        raise UsageError("--resume goes on from the file of --results, which has to be a .json")
    if settings["no_stale"] and not settings["train_data"]:
        raise UsageError(
            "--no-stale leaves out averages whose statistics are recomputed as well, which needs "
            "--train-data"
        )
    options.check_statistics_options(settings)


def _open_results(path: str | None, *, resume: bool) -> ResultsFile | None:
    """Open the file of ``--results``; the process that writes checks that writing works."""
    if path is None:
        return None
    from ckptavg.evaluation.results_file import ResultsFile  # noqa: PLC0415
    from ckptavg.io.paths import check_output  # noqa: PLC0415 - help is shown without torch

    check_output(path)
    file = ResultsFile(Path(path))
    if global_rank() == 0:
        file.check(resume=resume)
    return file


def _keep(keeper: Keeper, scored: list[Result]) -> OutputError | None:
    """Keep all results; return a failure, so that the scores are shown before the error."""
    try:
        other_count = keeper.keep(scored)
    except OutputError as error:
        return error
    if other_count and keeper.file is not None:
        log.info("%s goes on to hold results of others: %d", keeper.file.path, other_count)
    return None


def _candidates(
    paths: tuple[str, ...], further: tuple[Also, ...], settings: dict[str, Any]
) -> list[Candidate]:
    """Make the candidates of each ``--key``, with the key in their names if there are several."""
    for path in paths:
        _check_path(path)
    keys = list(dict.fromkeys(settings["keys"]))
    if len(keys) < 2:
        return _candidates_of_key(keys[0] if keys else None, paths, further, settings)
    candidates = []
    for key in keys:
        for candidate in _candidates_of_key(key, paths, further, settings):
            candidates.append(replace(candidate, name=f"{candidate.name} [{key}]"))
    return candidates


def _recorders(candidates: Sequence[Candidate]) -> list[Checkpoint]:
    """Return checkpoints that may record the model: the baseline first, then the named files."""
    from ckptavg.evaluation.candidates import reference_of  # noqa: PLC0415

    singles = [c for c in candidates if c.kind == "checkpoint" and not c.average]
    ordered = [reference_of(candidates), *singles]
    last = [candidate.checkpoints[-1] for candidate in ordered if candidate.checkpoints]
    return list({str(checkpoint.path): checkpoint for checkpoint in last}.values())


def _check_path(path: str) -> None:
    from ckptavg.formats import is_checkpoint_directory  # noqa: PLC0415
    from ckptavg.io.paths import locate  # noqa: PLC0415

    location = locate(path)
    if location.is_dir() and not is_checkpoint_directory(location):
        raise UsageError(f"{path} is no checkpoint: a run goes after --run")


def _candidates_of_key(
    key: str | None,
    paths: tuple[str, ...],
    further: tuple[Also, ...],
    settings: Mapping[str, Any],
) -> list[Candidate]:
    """Make the candidates whose weights an entry holds; the default entry where None."""
    from ckptavg.evaluation import candidates  # noqa: PLC0415
    from ckptavg.formats import open_checkpoint  # noqa: PLC0415

    which = {"recompute": bool(settings["train_data"]), "stale": not settings["no_stale"]}
    files = []
    for path in paths:
        files += candidates.candidates_of_file(open_checkpoint(path, key), path, **which)
    if settings["run_path"] is None:
        return files
    settings = dict(settings)
    run, selection = open_selection(
        [settings["run_path"]], settings["glob"], settings["skip"], key, settings
    )
    planned = plan_selection(selection, settings)
    extra_averages = {
        extra.name: planned_also(extra, run, selection, settings) for extra in further
    }
    return files + candidates.candidates_of(
        run, selection, planned, each=settings["each"],
        ensemble=settings["compare"] == "fge", others=extra_averages, **which,
    )  # fmt: skip


def _show(report: Report, scored: list[Result], task: Task) -> None:
    from ckptavg.evaluation.score_table import tabulate_scores  # noqa: PLC0415

    report.draw(tabulate_scores(scored, task))
