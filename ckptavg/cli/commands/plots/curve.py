"""``ckptavg plot curve``."""

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
    from ckptavg.landscape.landscape import Landscape

_CURVE = "Curve"


@dataclass(frozen=True)
class CurveOptions:
    """All options of the command.

    Attributes:
        paths: Directories and checkpoints of the runs.
        window: Number of checkpoints of the sliding average; None for none.
        key: Entry that holds the weights; None to find it.
        select: Selection of checkpoints of each run.
        running: Model, data and loaders.
        figure: The figure and its data.
    """

    paths: tuple[str, ...]
    window: int | None
    key: str | None
    select: SelectionOptions
    running: RunningOptions
    figure: FigureOptions


@command("curve", shared=True)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@figure_options
@option(
    _CURVE, "--window", type=click.IntRange(2), metavar="W", common=True,
    help="Add the average of the last W checkpoints.",
)  # fmt: skip
@running_options(
    "Recomputes the averages' BatchNorm, and is scored, too",
    scoring="Data to score on; without it, the recorded metrics are drawn",
    must_score=False,
)
@selection_options
@key_option
@bundle("options", CurveOptions)
def curve(report: Report, processes: TorchrunGroup | None, options: CurveOptions) -> None:
    """Draw each checkpoint beside the average so far, over training.

    The average begins with the first selected checkpoint. Several runs share a figure. Without a
    model and data, the figure has what training recorded.

    \b
      ckptavg plot curve runs/swa --from 160 --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train -o curve.png
    """
    options.figure.check()
    options.running.check_scoring()
    landscape = _score(report, processes, options)
    show_lines(report, landscape)
    options.figure.publish(report, landscape)


def _score(report: Report, processes: TorchrunGroup | None, options: CurveOptions) -> Landscape:
    """Make the curve of recorded or of scored metrics."""
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.landscape.curves.curve import curve as draw  # noqa: PLC0415
    from ckptavg.landscape.curves.named_runs import name_runs  # noqa: PLC0415
    from ckptavg.landscape.curves.series import check_window  # noqa: PLC0415
    from ckptavg.landscape.store import check_results  # noqa: PLC0415

    figure = options.figure
    check_results(figure.results, "curve", resume=figure.resume)
    selection = options.select.open(options.paths, options.key)[1]
    # Before the model is built, which takes long.
    check_window(name_runs(selection), options.window)
    if not options.running.data.spec:
        return draw(selection, window=options.window, results=figure.results, resume=figure.resume)
    call = build.build_scoring(options.running, selection, processes)
    with report.samples_progress() as progress:
        return draw(
            selection, call.model, call.data, **call.keywords, window=options.window,
            results=figure.results, resume=figure.resume, progress=progress,
        )  # fmt: skip
