"""``ckptavg plot``: figures of a run, a module per figure."""

from __future__ import annotations

import click

from ckptavg.cli.commands.plots.curve import curve
from ckptavg.cli.commands.plots.ensemble import ensemble
from ckptavg.cli.commands.plots.geometry import geometry
from ckptavg.cli.commands.plots.plane import pca, plane
from ckptavg.cli.commands.plots.rays import rays
from ckptavg.cli.commands.plots.reliability import reliability
from ckptavg.cli.commands.plots.segment import segment
from ckptavg.cli.options.help import CommandGroup


@click.group(cls=CommandGroup)
def plot() -> None:
    """Draw a run: curves, planes, segments and rays from its checkpoints."""


plot.add_command(curve)
plot.add_command(plane)
plot.add_command(pca)
plot.add_command(segment)
plot.add_command(rays)
plot.add_command(ensemble)
plot.add_command(geometry)
plot.add_command(reliability)
