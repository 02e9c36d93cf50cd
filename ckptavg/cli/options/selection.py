"""Options that select checkpoints of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.param_types import pair, positive, window
from ckptavg.errors import UsageError
from ckptavg.runs.selection_notes import note_run, note_selection

if TYPE_CHECKING:
    from ckptavg.runs.best import Mode
    from ckptavg.runs.run import Run

log = logging.getLogger("ckptavg")
_WHICH = "Which checkpoints (of each run, in this order)"


@dataclass(frozen=True, kw_only=True)
class Picks:
    """Selections of a run's checkpoints, applied in the order of the attributes.

    Attributes:
        first: First step.
        final: Last step, included.
        every: Stride, counted from the last checkpoint.
        cycle: Length of a cycle in checkpoints, and the offset of the first.
        at_lr_min: True for the minima of the learning rate.
        best: Number of checkpoints that are best by a metric.
        metric: Name of the metric.
        mode: The better direction of the metric.
        sample: Number of checkpoints to draw, and the seed.
        last: Number of last checkpoints, or a share of training such as ``10%``.
    """

    first: float | None = None
    final: float | None = None
    every: int | None = None
    cycle: tuple[int, int | None] | None = None
    at_lr_min: bool = False
    best: int | None = None
    metric: str | None = None
    mode: Mode | None = None
    sample: tuple[int, int | None] | None = None
    last: int | str | None = None

    def check(self) -> None:
        """Refuse ``--metric`` and ``--mode`` without ``--best``.

        Raises:
            UsageError: One of them is given without ``--best``.
        """
        if self.best is not None:
            return
        for flag, value in (("--metric", self.metric), ("--mode", self.mode)):
            if value is not None:
                raise UsageError(f"{flag} needs --best N")

    def select(self, run: Run) -> Run:
        """Apply the selections to a run."""
        if self.first is not None or self.final is not None:
            run = run.steps(self.first, self.final)
        if self.every is not None:
            run = run.every(self.every)
        if self.cycle is not None:
            run = run.cycle(*self.cycle)
        if self.at_lr_min:
            run = run.at_lr_min()
        if self.best is not None:
            run = run.best(self.best, self.metric, self.mode)
        if self.sample is not None:
            run = run.sample(self.sample[0], self.sample[1] or 0)
        if self.last is not None:
            run = run.last(self.last)
        return run

    def select_for_average(self, run: Run) -> Run:
        """Apply the selections to a run that is averaged."""
        selection = self.select(run)
        if len(selection) == 1:
            log.info("one checkpoint is selected: its average is itself")
        return selection


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(Picks):
    """Options that find and select the checkpoints of a run.

    Attributes:
        glob: Pattern that names match; None for all.
        skip: Patterns of names that are left out.
    """

    glob: str | None = None
    skip: tuple[str, ...] = ()

    def open(self, paths: Sequence[str], key: str | None) -> tuple[Run, Run]:
        """Open a run that is averaged, and select checkpoints.

        Args:
            paths: Directories and checkpoints of the run.
            key: The entry that holds the weights; None to find it.

        Returns:
            The whole run, and the selection.
        """
        from ckptavg.runs.run import open_run  # noqa: PLC0415 - help is shown without it

        self.check()
        run = open_run(*paths, glob=self.glob, skip=self.skip, key=key)
        note_run(run)
        selection = self.select_for_average(run)
        note_selection(run, selection)
        return run, selection


_finding = (
    option(
        _WHICH, "--glob", metavar="PATTERN",
        help="Only names, or ends of paths, that match.  [default: all]",
    ),
    option(
        _WHICH, "--skip", multiple=True, metavar="PATTERN",
        help="Leave out files and directories of such names; may be repeated.",
    ),
    option(_WHICH, "--from", "first", type=float, metavar="STEP", help="From this step on."),
    option(_WHICH, "--to", "final", type=float, metavar="STEP", help="Up to and with this step."),
    option(
        _WHICH, "--every", type=positive, metavar="N", help="Every Nth, counted from the last one."
    ),
    option(
        _WHICH, "--cycle", type=pair, metavar="C[:OFFSET]",
        help="The ends of cycles of C checkpoints: positions OFFSET, OFFSET+C, ... "
        "[default OFFSET: C]",
    ),
    option(
        _WHICH, "--at-lr-min", is_flag=True, common=True,
        help="Only where the recorded learning rate is lowest: the ends of its cycles.",
    ),
)  # fmt: skip
_by_metric = (
    option(
        _WHICH, "--best", type=positive, metavar="N", common=True,
        help="The best N by a recorded metric (--metric).",
    ),
    option(
        _WHICH, "--metric", metavar="NAME",
        help="The metric of --best; `inspect` lists them.  [default: the only one]",
    ),
    option(
        _WHICH, "--mode", type=click.Choice(["max", "min"]),
        help="Which of its values is the best.  [default: by its name: acc max, loss min, ...]",
    ),
)  # fmt: skip
_thinning = (
    option(
        _WHICH, "--sample", type=pair, metavar="N[:SEED]",
        help="N of them drawn at random, to see how far the choice matters.  [default SEED: 0]",
    ),
    option(
        _WHICH, "--last", type=window, metavar="N|P%", common=True,
        help="The last N, or those of the last P % of training.  [default: all]",
    ),
)  # fmt: skip

selection_options = bundle("select", SelectionOptions, *_finding, *_by_metric, *_thinning)
"""Declares all options that select checkpoints, passed as ``select``."""

unscored_selection_options = bundle("select", SelectionOptions, *_finding, *_thinning)
"""Declares those that look at no recorded metric, passed as ``select``."""
