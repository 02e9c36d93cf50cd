"""``ckptavg plot``: figures of a run, a module per figure."""

from __future__ import annotations

import click

from ckptavg.cli.commands.plots.curve import curve
from ckptavg.cli.commands.plots.geometry import geometry
from ckptavg.cli.options.help import CommandGroup


@click.group(cls=CommandGroup)
def plot() -> None:
    """Draw a run: curves, planes, segments and rays from its checkpoints."""


plot.add_command(curve)
plot.add_command(geometry)
