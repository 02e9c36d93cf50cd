"""``ckptavg plot geometry``."""

from __future__ import annotations

import click

from ckptavg.cli.command import command
from ckptavg.cli.commands import geometry as shown
from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.figure import FigureOptions, figure_options
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.errors import UsageError


@command("geometry")
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@figure_options
@selection_options
@key_option
def geometry(
    report: Report,
    paths: tuple[str, ...],
    key: str | None,
    *,
    figure: FigureOptions,
    select: SelectionOptions,
) -> None:
    """Draw distances and angles of checkpoints; needs no model and no data.

    The distance of each checkpoint to their mean, norms, steps between successive checkpoints and
    the angles between these, and the distances of all pairs, from one read of the weights.

    \b
      ckptavg plot geometry runs/swa -o geometry.png
    """
    if figure.resume:
        raise UsageError("--resume is for points to score: a geometry has none")
    figure.check()
    from ckptavg.inspection.geometry import check_several  # noqa: PLC0415 - help without torch
    from ckptavg.inspection.geometry import geometry as measure  # noqa: PLC0415
    from ckptavg.landscape.geometry import lay_out_geometry  # noqa: PLC0415
    from ckptavg.runs.run import open_run  # noqa: PLC0415

    select.check()
    run = open_run(*paths, glob=select.glob, skip=select.skip, key=key)
    selection = select.select(run)
    check_several(selection)
    with report.bytes_progress("measuring") as progress:
        measured = measure(selection, progress=progress)
    shown.show(report, measured)
    figure.publish(report, lay_out_geometry(measured))
