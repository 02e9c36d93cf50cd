"""Facts on a run and its files, in words for the page of a report."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import datetime, timezone

import torch

from ckptavg._version import __version__
from ckptavg.display.tables import NOTHING, Column, Table, rows_of_texts
from ckptavg.errors.printable import size_text, step_text
from ckptavg.formats import Checkpoint
from ckptavg.optional import import_optional
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run

# Most paths that are listed as left out.
_MOST_LEFT_OUT = 40
_SECOND = 10**9  # nanoseconds


def steps_text(checkpoints: Sequence[Checkpoint]) -> str:
    """Word the range of the checkpoints' steps."""
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if not steps:
        return "not recorded"
    low, high = min(steps), max(steps)
    if low == high:
        return step_text(low)
    return f"{step_text(low)} to {step_text(high)}"


def rates_text(checkpoints: Sequence[Checkpoint]) -> str:
    """Word the learning rates that training recorded."""
    recorded: list[float] = []
    for checkpoint in checkpoints:
        if checkpoint.record.lr is not None:
            recorded.append(checkpoint.record.lr)
    if not recorded:
        return "not recorded"
    missing = len(checkpoints) - len(recorded)
    text = f"{min(recorded):.6g} throughout"
    if min(recorded) != max(recorded):
        text = f"{min(recorded):.6g} to {max(recorded):.6g}"
    if missing:
        text += f"; {missing} record none"
    return text


def tabulate_left_out(run: Run) -> Table | None:
    """Make the table of paths that were found and not taken; None where there are none."""
    if not run.left_out:
        return None
    rows: list[tuple[str, str]] = []
    for path, why in run.left_out[:_MOST_LEFT_OUT]:
        rows.append((str(path), why))
    legend: tuple[str, ...] = ()
    if len(run.left_out) > _MOST_LEFT_OUT:
        legend = (f"and {len(run.left_out) - _MOST_LEFT_OUT} more",)
    columns = (Column("left out", "name"), Column("why", "prose"))
    return Table("", columns, rows_of_texts(rows), legend)


def tabulate_files(run: Run, selection: Run, coefficients: Sequence[float]) -> Table:
    """Make the table of the run's checkpoints with size, date and coefficient.

    Args:
        run: The whole run.
        selection: The averaged checkpoints.
        coefficients: One per averaged checkpoint; divided by their sum here.
    """
    total = sum(coefficients)
    shares: dict[int, float] = {}
    for checkpoint, coefficient in zip(selection.checkpoints, coefficients, strict=True):
        shares[id(checkpoint)] = coefficient / total
    names = short_names(paths_of(run.opened))
    rows: list[list[str]] = []
    for name, checkpoint in zip(names, run.opened, strict=True):
        share = shares.get(id(checkpoint))
        rows.append(
            [
                name,
                _number_text(checkpoint.step),
                _number_text(checkpoint.record.lr),
                NOTHING if share is None else f"{share:.4g}",
                size_text(checkpoint.size),
                date_text(checkpoint),
            ]
        )
    columns = (
        Column("checkpoint", "name"),
        Column("step", "number"),
        Column("LR", "number"),
        Column("coefficient", "number"),
        Column("size", "number"),
        Column("last change (UTC)", "text"),
    )
    return Table("", columns, rows_of_texts(rows))


def date_text(*checkpoints: Checkpoint) -> str:
    """Word the time of the last change of the checkpoints' files, in UTC."""
    newest = 0
    for checkpoint in checkpoints:
        for stamp in checkpoint.files:
            newest = max(newest, stamp.mtime_ns)
    if not newest:
        return NOTHING
    try:
        moment = datetime.fromtimestamp(newest // _SECOND, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        # A broken clock may give a file any year.
        return NOTHING
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def versions_text() -> str:
    """Word the versions of all that decides the page."""
    matplotlib = import_optional("matplotlib", "matplotlib")
    versions = {
        "ckptavg": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "matplotlib": matplotlib.__version__,
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _number_text(value: float | None) -> str:
    if value is None:
        return NOTHING
    return step_text(value)
