"""``ckptavg plot reliability``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ckptavg.cli.command import command
from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.figure import FigureOptions, figure_options
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.display.tables import NOTHING
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from ckptavg.landscape.landscape import Landscape


@dataclass(frozen=True)
class ReliabilityOptions:
    """All options of the command.

    Attributes:
        paths: Directories and checkpoints of the run.
        each: True to add every selected checkpoint.
        key: Entry that holds the weights; None to find it.
        select: Selection of checkpoints.
        running: Model, data and loaders.
        figure: The figure and its data.
    """

    paths: tuple[str, ...]
    each: bool
    key: str | None
    select: SelectionOptions
    running: RunningOptions
    figure: FigureOptions


@command("reliability", shared=True)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@figure_options
@option("Candidates", "--each", is_flag=True, common=True, help="Add every selected checkpoint.")
@running_options("Recomputes the average's BatchNorm", scoring="Data to score on")
@selection_options
@key_option
@bundle("options", ReliabilityOptions)
def reliability(
    report: Report, processes: TorchrunGroup | None, options: ReliabilityOptions
) -> None:
    """Draw how often predictions of a confidence are right.

    For the last checkpoint, the average and the FGE ensemble, with the expected calibration error
    (ECE) over 15 bins.

    \b
      ckptavg plot reliability runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train -o reliability.png
    """
    figure, running = options.figure, options.running
    if figure.resume:
        raise UsageError("--resume is for points to score: a reliability diagram has none")
    figure.check()
    running.check_statistics()
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.landscape import reliability as library  # noqa: PLC0415
    from ckptavg.landscape.store import check_results  # noqa: PLC0415

    check_results(figure.results, "reliability")
    library.check_classifier(build.build_task(running))
    run, selection = options.select.open(options.paths, options.key)
    call = build.build_scoring(running, run, processes)
    with report.samples_progress() as progress:
        landscape = library.reliability(
            run, call.model, call.data, **call.keywords, selection=selection, each=options.each,
            progress=progress,
        )  # fmt: skip
    _show(report, landscape)
    figure.publish(report, landscape)


def _show(report: Report, landscape: Landscape) -> None:
    """Print the metrics of each candidate."""
    rows = []
    for candidate in landscape.facts["candidates"]:
        cells = [candidate["series"]]
        for metric in landscape.metrics:
            value = candidate["metrics"].get(metric.key)
            cells.append(NOTHING if value is None else format(value, metric.form))
        rows.append(cells)
    titles = [metric.title for metric in landscape.metrics]
    report.table(("candidate", *titles), rows)
