"""``ckptavg report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands.average import average
from ckptavg.cli.commands.evaluate import warn_of_training_data
from ckptavg.cli.console import Report
from ckptavg.cli.options.also import AlsoAverage, read_also
from ckptavg.cli.options.averaging import (
    TensorOptions,
    WeightingOptions,
    key_option,
    plan_selection,
    tensor_options,
    weighting_options,
)
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.cli.repeated import repeat_options
from ckptavg.cli.wording import for_shell

if TYPE_CHECKING:
    from ckptavg.landscape.points import PointScorer
    from ckptavg.plots.report.recipe import Invocation
    from ckptavg.plots.report.subject import Subject
    from ckptavg.specs.recorded import ModelSource

_REPORT = "Report"
_FIGURES = ("curve", "geometry", "segment", "reliability")
# Options of running a model, which an average needs for its statistics only.
_RUNNING = frozenset(
    {"model_spec", "model_arguments", "train_data_spec", "train_data_arguments", "device", "amp",
     "batch_size", "workers", "seed", "bn_samples", "bn_exclude", "task", "forward"}
)  # fmt: skip
# Options that say where a result goes and how it is shown.
_SHOWING = frozenset(
    {"out", "overwrite", "as_json", "threads", "quiet", "verbose", "debug", "further"}
)


@dataclass(frozen=True)
class PageOptions:
    """Options of the page.

    Attributes:
        out: The file of the page.
        overwrite: True to replace an existing file.
        each: True to list every selected checkpoint.
        further: Further averages of the run.
        date: Date of the report; None for none.
        figures: Kinds of figures; None for all.
    """

    out: str
    overwrite: bool
    each: bool
    further: tuple[AlsoAverage, ...]
    date: str | None
    figures: tuple[str, ...] | None


@dataclass(frozen=True)
class ReportOptions:
    """All options of the command.

    Attributes:
        page: Options of the page.
        key: The entry that holds the weights; None to find it.
        select: Selection of the averaged checkpoints.
        weighting: Weights of the average.
        tensors: Options on the tensors of averages.
        running: Model, data and loaders.
    """

    page: PageOptions
    key: str | None
    select: SelectionOptions
    weighting: WeightingOptions
    tensors: TensorOptions
    running: RunningOptions


def _read_figures(text: str) -> tuple[str, ...]:
    """Read kinds of figures separated by commas, or ``none``."""
    if text == "none":
        return ()
    kinds = text.split(",")
    if not {*kinds} <= {*_FIGURES}:
        raise click.BadParameter(f"expected some of {', '.join(_FIGURES)} but got {text!r}")
    return tuple(kinds)


@command("report")
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@option(
    _REPORT, "-o", "--out", metavar="REPORT.html", required=True, common=True,
    type=click.Path(dir_okay=False), help="The page.",
)  # fmt: skip
@option(_REPORT, "--overwrite", is_flag=True, common=True, help="Replace an existing file.")
@option(
    _REPORT, "--each", is_flag=True, common=True,
    help="List every selected checkpoint in the table, too.",
)  # fmt: skip
@option(
    _REPORT, "--also", "further", multiple=True, type=read_also,
    metavar="NAME=SCHEME[@SELECTION]",
    help="List one more average. SELECTION is of the whole run, in the words of the options: "
    "last5=uniform@last=5.",
)  # fmt: skip
@option(
    _REPORT, "--figures", type=_read_figures, metavar="KIND,...", common=True,
    help="Only these of curve, geometry, segment, reliability, or none. Points of curve and "
    "segment are scored besides.  [default: all]",
)  # fmt: skip
@option(
    _REPORT, "--date", metavar="TEXT",
    help="Date below the heading. Without it, the same inputs give the same bytes.",
)  # fmt: skip
@running_options("Recomputes the averages' BatchNorm", scoring="Data to score on")
@selection_options
@weighting_options
@key_option
@tensor_options
@bundle("page", PageOptions)
@bundle("options", ReportOptions)
def report_run(report: Report, paths: tuple[str, ...], options: ReportOptions) -> None:
    """Report on a run in one HTML page: is its average better, and how is it made?

    The page needs nothing else and no network: a verdict with its interval, the scores of all
    candidates, figures of the run, the command that makes the average, and its origin.

    \b
      ckptavg report runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train -o report.html
    """
    options.running.check_statistics()
    from ckptavg.errors.notes import collect_notes  # noqa: PLC0415 - help is shown without torch
    from ckptavg.plots.report import build  # noqa: PLC0415
    from ckptavg.plots.report.figures import FIGURES, check_figures  # noqa: PLC0415

    page = options.page
    kinds = check_figures(page.figures if page.figures is not None else FIGURES)
    target = Path(page.out)
    build.require_packages()
    build.check_output(target, overwrite=page.overwrite)
    with collect_notes() as notes:
        subject = _plan(paths, options)
        build.check_output(target, overwrite=page.overwrite, inputs=subject.run.members)
        scorer, source = _open_scorer(subject, options.running)
        invocation = _describe_call(paths, options, source, scorer)
        with report.samples_progress() as progress:
            finished = build.build_report(
                subject, scorer, invocation, figures=kinds, notes=notes, wording=for_shell,
                date=page.date, progress=progress,
            )  # fmt: skip
    build.write_report(finished, target, overwrite=page.overwrite)
    report.line(str(finished))
    report.line(f"wrote {page.out}")
    report.result({**finished.as_json(), "output": page.out})


def _plan(paths: Sequence[str], options: ReportOptions) -> Subject:
    """Open the run, and plan its averages."""
    from ckptavg.plots.report.recipe import keywords_of  # noqa: PLC0415
    from ckptavg.plots.report.subject import Subject  # noqa: PLC0415

    tensors = options.tensors
    run, selection = options.select.open(paths, options.key)
    planned = plan_selection(selection, options.weighting, tensors)
    further = {}
    for extra in options.page.further:
        further[extra.name] = extra.plan(run, selection, tensors)
    has_rules = bool(keywords_of(_tensor_rules(tensors)))
    return Subject(
        run, selection, planned, further, options.page.each, has_rules, tensors.keep_nonfinite
    )


def _open_scorer(subject: Subject, running: RunningOptions) -> tuple[PointScorer, ModelSource]:
    """Make the model and open the data."""
    from ckptavg.cli import build  # noqa: PLC0415
    from ckptavg.landscape.points import PointScorer  # noqa: PLC0415

    source = build.find_model(running.model, subject.run.opened[-1:])
    task = build.build_task(running)
    forward = build.build_forward(running)
    model, runtime = build.build_model(running, source, task)
    training = None
    if running.training.spec:
        training = build.open_training_data(running, source, runtime)
    data = build.open_evaluation_data(running, source, runtime)
    warn_of_training_data(running, data, training)
    scorer = PointScorer(
        subject.run, model, data, training, task, runtime, forward, running.statistics.exclude
    )
    return scorer, source


def _describe_call(
    paths: Sequence[str], options: ReportOptions, source: ModelSource, scorer: PointScorer
) -> Invocation:
    """Describe the command's arguments, and the command that makes the average."""
    from ckptavg.data.loaders import Subset  # noqa: PLC0415
    from ckptavg.plots.report.recipe import (  # noqa: PLC0415
        Invocation,
        keywords_of,
        recomputing_of,
    )

    running, select = options.running, options.select
    words = repeat_options(click.get_current_context(), average, leave_out=_SHOWING)
    averaging: list[str] = []
    recomputing: list[str] = []
    for name, typed in words.items():
        if name in _RUNNING:
            recomputing += typed
        else:
            averaging += typed
    subset = None
    if running.statistics.samples is not None:
        subset = Subset(*running.statistics.samples)
    training = None
    if running.training.spec is not None:
        training = _source_text(running.training.spec, running.training.pairs)
    return Invocation(
        paths=tuple(paths),
        opening=keywords_of({"glob": select.glob, "skip": select.skip, "key": options.key}),
        averaging=keywords_of(_averaging(options)),
        recomputing=keywords_of(recomputing_of(scorer, running.loader.device, subset)),
        model=_source_text(source.spec, running.model.pairs),
        data=_source_text(running.data.spec or "", running.data.pairs),
        training=training,
        command=("ckptavg", "average", *map(_as_argument, paths), *averaging),
        command_recomputing=tuple(recomputing),
    )


def _averaging(options: ReportOptions) -> Mapping[str, Any]:
    """Return the keywords of ``average``."""
    return {
        "scheme": options.weighting.scheme,
        "weights": options.weighting.weights,
        **_tensor_rules(options.tensors),
        "on_nonfinite": options.tensors.on_nonfinite,
    }


def _tensor_rules(tensors: TensorOptions) -> dict[str, Any]:
    """Return the keywords of ``average`` that choose tensors and their type."""
    return {
        "include": tensors.include,
        "exclude": tensors.exclude,
        "base": tensors.base,
        "dtype": tensors.dtype,
    }


def _as_argument(path: str) -> str:
    """Return a path that a command line does not take for an option."""
    if path.startswith("-"):
        return f"./{path}"
    return path


def _source_text(spec: str, pairs: Sequence[str]) -> str:
    """Word a specification with its arguments."""
    if not pairs:
        return spec
    return f"{spec} ({', '.join(pairs)})"
