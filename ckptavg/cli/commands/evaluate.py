"""``ckptavg eval``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence, Sized
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ckptavg.cli.command import command
from ckptavg.cli.console import Report
from ckptavg.cli.options.also import AlsoAverage, read_also
from ckptavg.cli.options.averaging import (
    TensorOptions,
    WeightingOptions,
    keys_option,
    plan_selection,
    tensor_options,
    weighting_options,
)
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.param_types import ensemble
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.cli.resume import identify
from ckptavg.distributed.peers import SingleProcess, global_rank
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from ckptavg.evaluation.candidates import Candidate
    from ckptavg.evaluation.results import Result
    from ckptavg.evaluation.results_file import ResultsFile
    from ckptavg.evaluation.resume import ResultStore
    from ckptavg.formats import Checkpoint
    from ckptavg.models.batches import Batches
    from ckptavg.specs.recorded import ModelSource
    from ckptavg.tasks import Task

log = logging.getLogger("ckptavg")
_CANDIDATES = "Candidates"
_RESULTS = "Results"
_WORSE = 3  # exit code of --fail-if-worse


@dataclass(frozen=True)
class CandidateOptions:
    """Options that name candidates.

    Attributes:
        paths: Checkpoints to score as they are.
        run_path: Run with the last checkpoint and the averages to score.
        each: True to score every selected checkpoint, too.
        further: Further averages of the run.
        compare: Ensembles to score, too: ``fge``, ``swag[:key=value,...]``.
        no_stale: True to score averages with recomputed statistics only.
        keys: Entries that hold the weights; empty to find the entry.
    """

    paths: tuple[str, ...]
    run_path: str | None
    each: bool
    further: tuple[AlsoAverage, ...]
    compare: tuple[str, ...]
    no_stale: bool
    keys: tuple[str, ...]


@dataclass(frozen=True)
class ResultsOptions:
    """Options on the results.

    Attributes:
        results: File that holds the results.
        resume: True to score only what the file does not hold.
        fail_if_worse: True to fail if the average does worse than the last checkpoint.
    """

    results: str | None
    resume: bool
    fail_if_worse: bool


@dataclass(frozen=True)
class EvaluationOptions:
    """All options of the command.

    Attributes:
        candidates: Names of candidates.
        select: Selection of checkpoints of the run.
        weighting: Weights of the run's average.
        tensors: Options on the tensors of averages.
        running: Model, data and loaders.
        output: Options on the results.
    """

    candidates: CandidateOptions
    select: SelectionOptions
    weighting: WeightingOptions
    tensors: TensorOptions
    running: RunningOptions
    output: ResultsOptions

    def decisive(self) -> dict[str, Any]:
        """Return the options that decide scores, by the names that identify stored results."""
        running, tensors = self.running, self.tensors
        loader, statistics = running.loader, running.statistics
        return {
            "model_spec": running.model.spec,
            "model_arg": running.model.pairs,
            "data": running.data.spec,
            "data_arg": running.data.pairs,
            "train_data": running.training.spec,
            "train_data_arg": running.training.pairs,
            "task": running.task,
            "forward": running.forward,
            "amp": loader.amp,
            "batch_size": loader.batch_size,
            "seed": loader.seed,
            "bn_samples": statistics.samples,
            "bn_exclude": statistics.exclude,
            "include": tensors.include,
            "exclude": tensors.exclude,
            "base": tensors.base,
            "dtype": tensors.dtype,
            "on_nonfinite": tensors.on_nonfinite,
        }


@command("eval", shared=True)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@option(
    _CANDIDATES, "--run", "run_path", metavar="RUN", common=True,
    help="Score its last checkpoint and the average of the selected ones.",
)  # fmt: skip
@option(
    _CANDIDATES, "--each", is_flag=True, common=True, help="Score every selected checkpoint, too."
)
@option(
    _CANDIDATES, "--also", "further", multiple=True, type=read_also,
    metavar="NAME=SCHEME[@SELECTION]",
    help="Score one more average. SELECTION is of the whole run, in the words of the options: "
    "last5=uniform@last=5.",
)  # fmt: skip
@option(
    _CANDIDATES, "--compare", multiple=True, type=ensemble, common=True,
    metavar="fge|swag[:k=v,...]",
    help="Score an ensemble, too: the mean of the outputs of the selected checkpoints (fge), or of "
    "weights sampled around their average (swag:samples=20,rank=10,scale=0.5,seed=0); may be "
    "repeated.",
)  # fmt: skip
@option(
    _CANDIDATES, "--no-stale", is_flag=True,
    help="Score no average with its BatchNorm statistics as averaged beside the recomputed ones.",
)  # fmt: skip
@option(
    _RESULTS, "--results", type=click.Path(dir_okay=False), metavar="FILE", common=True,
    help="Keep the results in FILE.json or FILE.csv, beside what it holds.",
)  # fmt: skip
@option(
    _RESULTS, "--resume", is_flag=True,
    help="Score only what FILE.json of --results does not hold yet.",
)  # fmt: skip
@option(
    _RESULTS, "--fail-if-worse", is_flag=True,
    help="Exit 3 if the average does worse than the last checkpoint by the first metric.",
)  # fmt: skip
@running_options("Recomputes the averages' BatchNorm", scoring="Data to score on")
@selection_options
@weighting_options
@keys_option
@tensor_options
@bundle("candidates", CandidateOptions)
@bundle("output", ResultsOptions)
@bundle("options", EvaluationOptions)
def evaluate(report: Report, processes: TorchrunGroup | None, options: EvaluationOptions) -> None:
    """Score checkpoints, an average and the FGE ensemble side by side on the same data.

    \b
      ckptavg eval --run runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train --each --compare fge
    """
    _check(options)
    file = _open_results(options.output)
    candidates = _make_candidates(options)
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.evaluation.results import is_worse, without_repeats  # noqa: PLC0415
    from ckptavg.evaluation.resume import ResultStore  # noqa: PLC0415

    source = build.find_model(options.running.model, _recorders(candidates))
    task = build.build_task(options.running)
    fail_if_worse = options.output.fail_if_worse
    if fail_if_worse and task.metrics[0].higher is None:
        raise UsageError(
            f"--fail-if-worse needs a first metric that says which is better: "
            f"{task.metrics[0].key} does not"
        )
    store = ResultStore(
        candidates,
        functools.partial(identify, options=options.decisive()),
        file,
        resume=options.output.resume,
        peers=processes or SingleProcess(),
    )
    scored = _score(report, processes, store, source, task, options)
    # The scores are shown before a failure to store them.
    failure = store.save_all(scored)
    scored = without_repeats(scored)
    _show(report, scored, task)
    report.result(store.to_json(scored))
    if failure is not None:
        raise failure
    if fail_if_worse and is_worse(scored, task):
        if processes is not None:
            # A launcher ends all processes when one exits, so wait until the first has written.
            processes.gather(None)
        if not global_rank():
            report.remark("The average does worse than the last checkpoint.")
        raise click.exceptions.Exit(_WORSE)


def _score(
    report: Report,
    processes: TorchrunGroup | None,
    store: ResultStore,
    source: ModelSource,
    task: Task,
    options: EvaluationOptions,
) -> list[Result]:
    """Score the candidates without a kept result, and return the results of all."""
    # With everything in the file, neither the model nor the data have to be opened.
    if not store.missing:
        return store.merge([])
    from ckptavg.cli import build  # noqa: PLC0415
    from ckptavg.evaluation import session  # noqa: PLC0415
    from ckptavg.evaluation.evaluate import note_idle_training  # noqa: PLC0415

    running = options.running
    forward = build.build_forward(running)
    model, runtime = build.build_model(running, source, task)
    training = None
    if any(candidate.recompute for candidate in store.missing):
        training = build.open_training_data(running, source, runtime, processes)
    elif running.training.spec:
        note_idle_training(store.missing)
    data = build.open_evaluation_data(running, source, runtime, processes)
    warn_of_training_data(running, data, training)
    with report.samples_progress() as progress:
        scored = session.score(
            store.missing, model, data, runtime, training, task=task, forward=forward,
            progress=progress, keep_nonfinite=options.tensors.keep_nonfinite, peers=processes,
            on_results=store.save_so_far, exclude=running.statistics.exclude,
        )  # fmt: skip
    return store.merge(scored)


def warn_of_training_data(running: RunningOptions, data: Batches, training: Batches | None) -> None:
    """Warn of scores on the training data, where a function's argument was forgotten.

    The same function gives other data where it is asked for a split by name: a module of data
    loaders, say. Such are told from the same by their number of samples.
    """
    scored, trained = _count_samples(data), _count_samples(training)
    if running.data == running.training and scored is not None and scored == trained:
        log.warning(
            "--data and --train-data name the same %d samples: the scores are on training data",
            scored,
        )


def _count_samples(batches: Batches | None) -> int | None:
    """Return the number of samples that a loader reads from; None where it has no such number."""
    dataset = getattr(batches, "dataset", None)
    if not isinstance(dataset, Sized):
        return None
    return len(dataset)


def _check(options: EvaluationOptions) -> None:
    """Refuse combinations of options before any file is opened."""
    candidates, running = options.candidates, options.running
    if candidates.run_path is None:
        if not candidates.paths:
            raise UsageError("Nothing to evaluate: name checkpoints, or a run with --run")
        _refuse_run_options(candidates)
    # Two candidates with one name could not be told apart in the table and in the results.
    names: set[str] = set()
    for average in candidates.further:
        if average.name in names:
            raise UsageError(f"two averages are called {average.name}: give each its own name")
        names.add(average.name)
    if candidates.no_stale and not running.training.spec:
        raise UsageError(
            "--no-stale leaves out averages whose statistics are recomputed as well, which needs "
            "--train-data"
        )
    running.check_statistics()


def _refuse_run_options(candidates: CandidateOptions) -> None:
    """Refuse options of a run where no run is named."""
    names = {"each", "compare", "fail_if_worse"}
    for options in (SelectionOptions, WeightingOptions, TensorOptions):
        names.update(field.name for field in fields(options))
    # Checkpoints may hold values that are not finite, too.
    names.discard("on_nonfinite")
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        is_given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if is_given and name in names:
            raise UsageError(f"{parameter.opts[0]} needs --run")
    if candidates.further:
        raise UsageError("--also needs --run")


def _open_results(output: ResultsOptions) -> ResultsFile | None:
    """Open the file of ``--results``; the process that writes checks that writing works."""
    from ckptavg.evaluation.results_file import open_results  # noqa: PLC0415

    file = open_results(output.results, resume=output.resume)
    # The others would meet the first one's trial file.
    if file is not None and global_rank() == 0:
        file.check(resume=output.resume)
    return file


def _make_candidates(options: EvaluationOptions) -> list[Candidate]:
    """Make the candidates of each ``--key``, with the key in their names if there are several."""
    for path in options.candidates.paths:
        _check_path(path)
    keys = list(dict.fromkeys(options.candidates.keys))
    if not keys:
        return _candidates_of_key(None, options)
    # A single key needs no mention in the names.
    if len(keys) == 1:
        return _candidates_of_key(keys[0], options)
    candidates = []
    for key in keys:
        for candidate in _candidates_of_key(key, options):
            # The same files under two keys would have the same names.
            candidates.append(replace(candidate, name=f"{candidate.name} [{key}]"))
    return candidates


def _recorders(candidates: Sequence[Candidate]) -> list[Checkpoint]:
    """Return checkpoints that may record the model: the baseline first, then the named files."""
    from ckptavg.evaluation.candidates import baseline_of  # noqa: PLC0415

    by_path: dict[str, Checkpoint] = {}
    baseline = baseline_of(candidates)
    for candidate in (baseline, *candidates):
        is_file = candidate.kind == "checkpoint" and not candidate.average
        if candidate.checkpoints and (is_file or candidate is baseline):
            checkpoint = candidate.checkpoints[-1]
            by_path[str(checkpoint.path)] = checkpoint
    return list(by_path.values())


def _check_path(path: str) -> None:
    from ckptavg.formats import is_checkpoint_directory  # noqa: PLC0415
    from ckptavg.io.paths import locate  # noqa: PLC0415

    location = locate(path)
    # The commonest slip: a run in the place of a checkpoint.
    if location.is_dir() and not is_checkpoint_directory(location):
        raise UsageError(f"{path} is no checkpoint: a run goes after --run")


def _candidates_of_key(key: str | None, options: EvaluationOptions) -> list[Candidate]:
    """Make the candidates whose weights an entry holds; the default entry where None."""
    from ckptavg.evaluation import candidates  # noqa: PLC0415
    from ckptavg.evaluation.ensembles import (  # noqa: PLC0415
        make_swag_candidates,
        parse_ensembles,
    )
    from ckptavg.formats import open_checkpoint  # noqa: PLC0415

    named = options.candidates
    recompute, stale = bool(options.running.training.spec), not named.no_stale
    made: list[Candidate] = []
    for path in named.paths:
        checkpoint = open_checkpoint(path, key)
        made += candidates.candidates_of_file(checkpoint, path, recompute=recompute, stale=stale)
    if named.run_path is None:
        return made
    run, selection = options.select.open([named.run_path], key)
    planned = plan_selection(selection, options.weighting, options.tensors)
    ensembles = parse_ensembles(named.compare)
    sampled = []
    if ensembles.swag:
        # SWAG is defined around the uniform mean, whatever scheme the average has.
        mean = plan_selection(selection, WeightingOptions("uniform"), options.tensors)
        sampled = make_swag_candidates(mean, ensembles.swag, recompute=recompute)
    further = {}
    for average in named.further:
        further[average.name] = average.plan(run, selection, options.tensors)
    made += candidates.candidates_of(
        run, selection, planned, each=named.each, ensemble=ensembles.fge, sampled=sampled,
        further=further, recompute=recompute, stale=stale,
    )  # fmt: skip
    return made


def _show(report: Report, scored: list[Result], task: Task) -> None:
    from ckptavg.evaluation.score_table import tabulate_scores  # noqa: PLC0415

    report.draw(tabulate_scores(scored, task))
