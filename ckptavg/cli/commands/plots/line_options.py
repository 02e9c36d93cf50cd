"""Options of ``ckptavg plot segment`` and ``ckptavg plot rays`` alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.declare import bundle, together
from ckptavg.cli.options.figure import FigureOptions, figure_options
from ckptavg.cli.options.running import RunningOptions
from ckptavg.cli.options.scoring import point_options, weight_decay_option
from ckptavg.cli.options.selection import SelectionOptions, selection_options
from ckptavg.distributed.torchrun import TorchrunGroup

if TYPE_CHECKING:
    from ckptavg.landscape.landscape import Kind, Landscape
    from ckptavg.runs.run import Run


@dataclass(frozen=True)
class LineOptions:
    """Options of commands that score points on lines through weight space.

    Attributes:
        paths: Directories and checkpoints of the run.
        key: Entry that holds the weights; None to find it.
        weight_decay: Weight decay of the L2 term; None for no term.
        select: Selection of checkpoints.
        running: Model, data and loaders.
        figure: The figure and its data.
    """

    paths: tuple[str, ...]
    key: str | None
    weight_decay: float | None
    select: SelectionOptions
    running: RunningOptions
    figure: FigureOptions

    def open_run(self, kind: Kind) -> Run:
        """Check the options, and open the selected checkpoints.

        Args:
            kind: Kind of the landscape, which a file of results must hold.

        Raises:
            CkptavgError: Options cannot be meant, or there is no run.
        """
        self.figure.check()
        self.running.check_statistics()
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
        """Call a function of the library that scores points.

        Args:
            function: ``segment`` or ``rays``.
            run: The checkpoints.
            report: Shows the progress.
            processes: Processes that share the data; None for this process alone.
            further: Further keywords of the function.
        """
        from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch

        call = build.build_scoring(self.running, run, processes)
        with report.samples_progress() as progress:
            return function(
                run, call.model, call.data, **call.keywords, **further,
                weight_decay=self.weight_decay, results=self.figure.results,
                resume=self.figure.resume, progress=progress,
            )  # fmt: skip


line_options = together(
    weight_decay_option,
    point_options,
    selection_options,
    key_option,
    bundle("options", LineOptions),
)
"""Options that follow those of the line itself, passed as ``options``."""
run_argument = together(
    click.argument("paths", nargs=-1, required=True, metavar="RUN..."), figure_options
)
"""The run and the figure, which come first in the help."""
