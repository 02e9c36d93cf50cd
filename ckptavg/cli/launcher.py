"""Commands under a launcher such as ``torchrun``: the first process prints."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.console import Console

from ckptavg.cli.console import Report
from ckptavg.distributed.peers import global_rank, is_distributed
from ckptavg.distributed.torchrun import TorchrunGroup, process_group
from ckptavg.errors import UsageError


def open_report(*, as_json: bool, verbosity: int) -> Report:
    """Make the report of a command; only the first of several processes prints."""
    if global_rank() == 0:
        return Report(as_json=as_json, verbosity=verbosity)
    return Report(verbosity=-1, stdout=Console(file=io.StringIO()))


def refuse_several(command: str) -> None:
    """Refuse several processes for a command of a single process.

    Raises:
        UsageError: A launcher has started several.
    """
    if is_distributed():
        raise UsageError(
            f"{command} runs in one process only", "Start it without torchrun and WORLD_SIZE."
        )


@contextmanager
def join_processes() -> Iterator[TorchrunGroup | None]:
    """Join the processes that share a command; yield None for a single process.

    An error that occurs in every process is shown by the first.
    """
    if not is_distributed():
        yield None
        return
    processes: TorchrunGroup | None = None
    try:
        with process_group() as processes:
            yield processes
    # Users' models and data may raise any error.
    except Exception as error:
        if processes is not None and processes.repeated:
            raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error
        raise
