"""``ckptavg plot segment``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands.plots.line_options import LineOptions, line_options, run_argument
from ckptavg.cli.console import Report
from ckptavg.cli.options.declare import option
from ckptavg.display.tables import NOTHING
from ckptavg.distributed.torchrun import TorchrunGroup

if TYPE_CHECKING:
    from ckptavg.landscape.landscape import Landscape

_SEGMENT = "The segment"


@command("segment", shared=True)
@run_argument
@option(
    _SEGMENT, "--ends", default="average,last", show_default=True, metavar="A,B", common=True,
    help="Two of average, first, middle, last, names of checkpoints, and paths of other runs.",
)  # fmt: skip
@option(
    _SEGMENT, "--points", type=click.IntRange(2), default=21, show_default=True, metavar="N",
    common=True, help="Points from end to end.",
)  # fmt: skip
@option(
    _SEGMENT, "--beyond", type=click.FloatRange(0), default=0.25, show_default=True, metavar="S",
    help="Go on beyond each end by this share of the segment.",
)  # fmt: skip
@line_options
def segment(
    report: Report,
    processes: TorchrunGroup | None,
    ends: str,
    points: int,
    beyond: float,
    options: LineOptions,
) -> None:
    """Draw loss and error on the straight line between two points.

    Statistics are recomputed from --train-data at every point. The barrier is the most by which an
    error lies above the straight line between the errors of the ends.

    \b
      ckptavg plot segment runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train -o segment.png
      ckptavg plot segment runs/a --ends last,runs/b ...     two trainings
    """
    names = ends.split(",")
    run = options.open_run("segment")
    from ckptavg.landscape.lines import segment as library  # noqa: PLC0415 - help without torch

    library.check_ends(run, names)
    landscape = options.score(
        library.segment, run, report, processes, ends=names, points=points, beyond=beyond
    )
    _show(report, landscape)
    options.figure.publish(report, landscape)


def _show(report: Report, landscape: Landscape) -> None:
    """Print the barrier of each metric, with the values of the ends."""
    first, second = landscape.facts["ends"]
    ends = {point.x: point for point in landscape.points}
    shown = (landscape.metrics[0].key, landscape.facts["loss"], "l2_loss")
    rows = []
    for barrier in landscape.facts["barriers"]:
        # The file of results has the other metrics.
        if barrier["metric"] not in shown:
            continue
        cells = [barrier["title"], barrier["data"]]
        for t in (0.0, 1.0):
            scores = ends[t].data
            if barrier["data"] == "training data":
                scores = ends[t].train or {}
            cells.append(f"{scores[barrier['metric']]:.4g}")
        height, at = NOTHING, NOTHING
        if barrier["height"] is not None:
            height, at = f"{barrier['height']:.3g}", f"{barrier['at']:.2f}"
        rows.append((*cells, height, at))
    title = "barriers: how far values are worse than on the straight line between the ends"
    report.table(("metric", "data", first, second, "barrier", "at t"), rows, title=title)
    report.line(landscape.facts["text"])
