"""``ckptavg plot plane`` and ``ckptavg plot pca``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.command import command
from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.declare import bundle, option, together
from ckptavg.cli.options.figure import FigureOptions, figure_options
from ckptavg.cli.options.running import RunningOptions
from ckptavg.cli.options.scoring import point_options, weight_decay_option
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ckptavg.landscape.landscape import Kind, Landscape
    from ckptavg.runs.run import Run

_GRID = "The grid"


@dataclass(frozen=True)
class PlaneOptions:
    """All options of the two commands.

    Attributes:
        paths: Directories and checkpoints of the run.
        key: Entry that holds the weights; None to find it.
        points: Number of points along each axis.
        margin: Width of the grid beyond the marked points, as a share of their extent.
        weight_decay: Weight decay of the L2 term; None for no term.
        select: Selection of checkpoints.
        running: Model, data and loaders.
        figure: The figure and its data.
    """

    paths: tuple[str, ...]
    key: str | None
    points: int
    margin: float
    weight_decay: float | None
    select: SelectionOptions
    running: RunningOptions
    figure: FigureOptions

    def open_run(self, kind: Kind) -> Run:
        """Check the options, and open the selected checkpoints.

        Raises:
            CkptavgError: Options cannot be meant, or there is no run.
        """
        self.figure.check()
        self.running.check_statistics()
        if self.weight_decay is not None and not self.running.training.spec:
            raise UsageError("--weight-decay adds to the training loss, which needs --train-data")
        from ckptavg.landscape.store import check_results  # noqa: PLC0415 - help without torch

        check_results(self.figure.results, kind, resume=self.figure.resume)
        return self.select.open(self.paths, self.key)[1]

    def score(
        self,
        function: Callable[..., Landscape],
        run: Run,
        report: Report,
        processes: TorchrunGroup | None,
        **further: Any,
    ) -> Landscape:
        """Call a function that scores a grid of points.

        Args:
            function: ``plane`` or ``pca`` of the library.
            run: The checkpoints.
            report: Shows the progress.
            processes: Processes that share the data; None for this process alone.
            further: Further keywords of the function.
        """
        from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch

        call = build.build_scoring(self.running, run, processes)
        with report.samples_progress() as progress, self.figure.draw_interrupted():
            return function(
                run, call.model, call.data, **call.keywords, **further, points=self.points,
                margin=self.margin, weight_decay=self.weight_decay, results=self.figure.results,
                resume=self.figure.resume, progress=progress,
            )  # fmt: skip


_plane_options = together(
    click.argument("paths", nargs=-1, required=True, metavar="RUN..."),
    figure_options,
    option(
        _GRID, "--points", type=click.IntRange(2), default=21, show_default=True, metavar="N",
        common=True, help="Points along each axis, N * N in all.",
    ),
    option(
        _GRID, "--margin", type=click.FloatRange(0), default=0.2, show_default=True, metavar="M",
        help="Go on beyond the outermost marked points by this share of their extent.",
    ),
    weight_decay_option,
    point_options,
    selection_options,
    key_option,
)  # fmt: skip


@command("plane", shared=True)
@option(
    _GRID, "--through", default="first,middle,last", show_default=True, metavar="A,B,C",
    common=True,
    help="Three of average, first, middle, last, names of checkpoints, and paths of other runs.",
)  # fmt: skip
@_plane_options
@bundle("options", PlaneOptions)
def plane(
    report: Report, processes: TorchrunGroup | None, through: str, options: PlaneOptions
) -> None:
    """Draw loss and error on the plane through three checkpoints.

    Every point's BatchNorm statistics are recomputed from --train-data before its loss on that
    and its error on --data are measured. All checkpoints are projected on the plane.

    \b
      ckptavg plot plane runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train \\
          --weight-decay 1e-4 -o plane.png --results plane.json

    The grid is scored from coarse to fine. After Ctrl-C the figure shows what is in the file of
    --results by then, and --resume goes on.
    """
    names = [name.strip() for name in through.split(",")]
    run = options.open_run("plane")
    from ckptavg.landscape.landmark_table import (  # noqa: PLC0415 - help without torch
        tabulate_landmarks,
    )
    from ckptavg.landscape.planes import scored_plane  # noqa: PLC0415

    scored_plane.check_corners(run, names)
    landscape = options.score(scored_plane.plane, run, report, processes, through=names)
    title = f"the plane through {', '.join(landscape.facts['through'])}; values are exact"
    report.draw(tabulate_landmarks(landscape, title))
    options.figure.publish(report, landscape)


@command("pca", shared=True)
@_plane_options
@bundle("options", PlaneOptions)
def pca(report: Report, processes: TorchrunGroup | None, options: PlaneOptions) -> None:
    """Draw loss and error on the plane along which a run varies most.

    The axes are the first two principal components of the checkpoints. The rest is as for
    `ckptavg plot plane`.

    \b
      ckptavg plot pca runs/swa --model torchvision:resnet50 \\
          --data imagefolder:val --train-data imagefolder:train \\
          --weight-decay 1e-4 -o pca.png --results pca.json
    """
    run = options.open_run("pca")
    from ckptavg.landscape.landmark_table import (  # noqa: PLC0415 - help without torch
        tabulate_landmarks,
    )
    from ckptavg.landscape.planes import scored_plane  # noqa: PLC0415

    landscape = options.score(scored_plane.pca, run, report, processes)
    first, second = landscape.facts["explained"]
    title = f"principal components with {first:.0%} and {second:.0%} of the variance"
    report.draw(tabulate_landmarks(landscape, title))
    options.figure.publish(report, landscape)
