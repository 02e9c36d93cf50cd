"""The selection options of a command applied to a run, and the plan of its average."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptavg.errors import UsageError
from ckptavg.runs.selection_notes import note_run, note_selection

if TYPE_CHECKING:
    from ckptavg.averaging.plan import Average
    from ckptavg.runs.best import Mode
    from ckptavg.runs.run import Run

log = logging.getLogger("ckptavg")


def select(
    run: Run,
    *,
    first: float | None,
    final: float | None,
    every: int | None,
    cycle: tuple[int, int | None] | None,
    at_lr_min: bool,
    best: int | None,
    metric: str | None,
    mode: Mode | None,
    sample: tuple[int, int | None] | None,
    last: int | None,
) -> Run:
    """Apply the selection options to a run."""
    if first is not None or final is not None:
        run = run.steps(first, final)
    if every is not None:
        run = run.every(every)
    if cycle is not None:
        run = run.cycle(*cycle)
    if at_lr_min:
        run = run.at_lr_min()
    if best is not None:
        run = run.best(best, metric, mode)
    if sample is not None:
        run = run.sample(sample[0], sample[1] or 0)
    if last is not None:
        run = run.last(last)
    return run


def select_for_average(run: Run, picks: Mapping[str, Any]) -> Run:
    """Apply the selection options to a run that is averaged."""
    selection = select(run, **picks)
    if len(selection) == 1:
        log.info("one checkpoint is selected: its average is itself")
    return selection


SELECTION = (
    "first", "final", "every", "cycle", "at_lr_min", "best", "metric", "mode", "sample", "last",
)  # fmt: skip


def open_selection(
    paths: Sequence[str],
    glob: str | None,
    skip: Sequence[str],
    key: str | None,
    options: dict[str, Any],
) -> tuple[Run, Run]:
    """Open a run and apply the selection options, which are taken out of ``options``."""
    from ckptavg.runs.run import open_run  # noqa: PLC0415 - help is shown without it

    picks = {name: options.pop(name) for name in SELECTION}
    check_picks(picks)
    run = open_run(*paths, glob=glob, skip=skip, key=key)
    note_run(run)
    selection = select_for_average(run, picks)
    note_selection(run, selection)
    return run, selection


def check_picks(picks: Mapping[str, Any]) -> None:
    """Refuse ``--metric`` and ``--mode`` without ``--best``.

    Raises:
        UsageError: There is nothing that they could belong to.
    """
    for name in ("metric", "mode"):
        if picks[name] is not None and picks["best"] is None:
            raise UsageError(f"--{name} says which are the --best N: name N")


def plan_selection(
    selection: Run, settings: Mapping[str, Any], *, scheme: str | None = None
) -> Average:
    """Plan the average of a selection by the tensor options, and a scheme or the options' own."""
    from ckptavg.averaging.plan import plan_average  # noqa: PLC0415 - help is shown without torch

    return plan_average(
        selection,
        scheme or settings["scheme"],
        weights=None if scheme else settings["weights"],
        include=settings["include"],
        exclude=settings["exclude"],
        base=settings["base"],
        dtype=settings["dtype"],
    )
