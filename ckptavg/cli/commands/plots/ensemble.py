"""``ckptavg plot ensemble``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands.plots.lines import show_lines
from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.figure import FigureOptions, figure_options
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.distributed.torchrun import TorchrunGroup

if TYPE_CHECKING:
    from ckptavg.landscape.curves.ensemble_growth import Order

_GROWTH = "Growth"


@dataclass(frozen=True)
class GrowthOptions:
    """All options of the command.

    Attributes:
        paths: Directories and checkpoints of the run.
        order: End of the run that the growth begins at.
        key: Entry that holds the weights; None to find it.
        select: Selection of checkpoints.
        running: Model, data and loaders.
        figure: The figure and its data.
    """

    paths: tuple[str, ...]
    order: Order
    key: str | None
    select: SelectionOptions
    running: RunningOptions
    figure: FigureOptions


@command("ensemble", shared=True)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@figure_options
@option(
    _GROWTH, "--order", type=click.Choice(["last", "first"]), default="last", show_default=True,
    common=True, help="Take the last n checkpoints, or the first n, for n = 1, 2, ...",
)  # fmt: skip
@running_options(
    "Recomputes the averages' BatchNorm, and is scored, too", scoring="Data to score on"
)
@selection_options
@key_option
@bundle("options", GrowthOptions)
def ensemble(report: Report, processes: TorchrunGroup | None, options: GrowthOptions) -> None:
    """Draw the average beside the ensemble of as many checkpoints, as their number grows.

    It also measures how far their outputs are apart. The average costs one forward pass per
    sample, the ensemble one per checkpoint.

    \b
      ckptavg plot ensemble runs/swa --last 10 --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train -o ensemble.png
    """
    figure = options.figure
    figure.check()
    options.running.check_statistics()
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.landscape.curves import ensemble_growth as growth  # noqa: PLC0415
    from ckptavg.landscape.store import check_results  # noqa: PLC0415

    check_results(figure.results, "ensemble", resume=figure.resume)
    selection = options.select.open(options.paths, options.key)[1]
    # Before the model is built, which takes long.
    growth.check_growth(selection, options.order)
    call = build.build_scoring(options.running, selection, processes)
    with report.samples_progress() as progress:
        landscape = growth.ensemble_growth(
            selection, call.model, call.data, **call.keywords, order=options.order,
            results=figure.results, resume=figure.resume, progress=progress,
        )  # fmt: skip
    show_lines(report, landscape)
    figure.publish(report, landscape)
