"""Commands under a launcher such as ``torchrun``: the first process prints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from ckptavg.cli.console import Report
from ckptavg.distributed.processes import Processes, own_rank, several
from ckptavg.distributed.processes import joined as all_joined
from ckptavg.errors import UsageError


def report(*, as_json: bool, verbosity: int) -> Report:
    """Make the report of a command; only the first of several processes prints."""
    if own_rank() == 0:
        return Report(as_json=as_json, verbosity=verbosity)
    return Report(verbosity=-1, stdout=Console(file=io.StringIO()))


def refuse(what: str) -> None:
    """Refuse several processes for a command that is the work of one.

    Raises:
        UsageError: It was.
    """
    if several():
        raise UsageError(
            f"{what} is the work of one process", "Start it without torchrun and WORLD_SIZE."
        )


@contextmanager
def joined() -> Iterator[Processes | None]:
    """Join the processes that share a command; yield None for a single process.

    An error that all of them meet is shown by one.
    """
    if not several():
        yield None
        return
    together: Processes | None = None
    try:
        with all_joined() as together:
            yield together
    except Exception as error:  # the user's model and data raise what they like
        if together is not None and together.repeated:
            raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error
        raise
