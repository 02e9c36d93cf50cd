"""``ckptavg plot rays``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands.plots.line_options import LineOptions, line_options, run_argument
from ckptavg.cli.console import Report
from ckptavg.cli.options.declare import option
from ckptavg.cli.options.param_types import positive
from ckptavg.display.tables import NOTHING
from ckptavg.distributed.torchrun import TorchrunGroup

if TYPE_CHECKING:
    from ckptavg.landscape.landscape import Landscape

_RAYS = "The rays"


@command("rays", shared=True)
@run_argument
@option(
    _RAYS, "--centers", default="average,last", show_default=True, metavar="A,B,...", common=True,
    help="Any of average, first, middle, last, names of checkpoints, and paths of other runs.",
)  # fmt: skip
@option(
    _RAYS, "--directions", type=positive, default="10", show_default=True, metavar="N",
    common=True, help="Random directions, the same from all centers.",
)  # fmt: skip
@option(
    _RAYS, "--points", type=click.IntRange(2), default=11, show_default=True, metavar="N",
    common=True, help="Points on each ray, the center included.",
)  # fmt: skip
@option(
    _RAYS, "--radius", type=click.FloatRange(0, min_open=True), metavar="R",
    help="Length of the rays in weight space.  [default: a multiple of the distance between the "
    "centers, such that the loss rises enough]",
)  # fmt: skip
@option(
    _RAYS, "--rise", type=click.FloatRange(0, min_open=True), metavar="L",
    help="The rise of the loss that tells the width.  [default: 0.1 nats; a tenth of another "
    "loss]",
)  # fmt: skip
@line_options
def rays(
    report: Report,
    processes: TorchrunGroup | None,
    centers: str,
    options: LineOptions,
    **numbers: Any,
) -> None:
    """Draw loss and error along random directions, and tell the wider minimum.

    All parameters move, and statistics are recomputed from --train-data at every point. The width
    is the distance at which the loss on --train-data, else on --data, has risen by L. --seed also
    decides the directions.

    \b
      ckptavg plot rays runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train \\
          -o rays.png --results rays.json
    """
    names = centers.split(",")
    run = options.open_run("rays")
    from ckptavg.landscape.lines import rays as library  # noqa: PLC0415 - help without torch
    from ckptavg.landscape.lines.bundle import check_rise  # noqa: PLC0415

    library.check_centers(run, names, numbers["radius"])
    check_rise(numbers["rise"])
    landscape = options.score(library.rays, run, report, processes, centers=names, **numbers)
    _show(report, landscape)
    options.figure.publish(report, landscape)


def _show(report: Report, landscape: Landscape) -> None:
    """Print the metrics and the width of each center, with statistics as along its rays."""
    starts = {point.series: point for point in landscape.points if not point.x}
    widths = {width["center"]: width for width in landscape.facts["widths"]}
    norms = landscape.facts["norms"] or [None]
    rows = []
    for name, norm in zip(landscape.facts["centers"], norms, strict=True):
        metrics = [starts[name].data.get(metric.key) for metric in landscape.metrics]
        cells = [name]
        for metric, value in zip(landscape.metrics, metrics, strict=True):
            cells.append(NOTHING if value is None else format(value, metric.form))
        cells.append(_length_text(norm))
        width = widths.get(name, {})
        cells.append(_length_text(width.get("mean")))
        ends = NOTHING
        if width.get("low") is not None:
            ends = f"{_length_text(width['low'])} to {_length_text(width['high'])}"
        rows.append((*cells, ends))
    titles = [metric.title for metric in landscape.metrics]
    facts = landscape.facts
    title = f"{facts['directions']} rays of length {facts['radius']:.4g} from each center"
    report.table(("center", *titles, "norm", "width", "95 % interval"), rows, title=title)
    report.line(facts["text"])


def _length_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.4g}"
