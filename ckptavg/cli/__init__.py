"""The command line: parse, call the API, print; no logic, and no torch before a command runs."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ckptavg._version import __version__
from ckptavg.cli import signals
from ckptavg.cli.commands.average import average
from ckptavg.cli.commands.evaluate import evaluate
from ckptavg.cli.commands.inspect import inspect
from ckptavg.cli.commands.plots import plot
from ckptavg.cli.commands.report import report_run
from ckptavg.cli.commands.search import search
from ckptavg.cli.commands.update_bn import update_bn
from ckptavg.cli.options.help import CommandGroup
from ckptavg.display.table_layout import wrap_note
from ckptavg.errors.printable import escape_unseen

_ERROR = "Error: "


class _Commands(CommandGroup):
    """Command group that ends on a signal as its commands do, before any of them has begun."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the arguments of the group."""
        with _end_on_signals(), _printable_errors():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the arguments of a command, and run the command."""
        with _end_on_signals(), _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _end_on_signals() -> Iterator[None]:
    """On a signal, end as a command that has written nothing."""
    # The outer report is for a signal that comes while the inner contexts end.
    with signals.report_interrupt(None), signals.unwind_on_signals(), signals.report_interrupt([]):
        yield


@contextmanager
def _printable_errors() -> Iterator[None]:
    """Escape names in click's own errors: the shell's ``*`` takes them from files.

    On a terminal all errors are wrapped between words.
    """
    try:
        yield
    except click.ClickException as error:
        message = escape_unseen(error.message, keep="\n")
        if sys.stderr is not None and sys.stderr.isatty():
            message = _wrap(message, shutil.get_terminal_size().columns)
        error.message = message  # type: ignore[misc]
        raise


def _wrap(message: str, width: int) -> str:
    """Wrap a message that click shows after ``Error:``."""
    lines: list[str] = []
    for line in f"{_ERROR}{message}".split("\n"):
        lines += wrap_note(line, width)
    return "\n".join(lines)[len(_ERROR) :].lstrip()


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="ckptavg", message="%(prog)s %(version)s")
def main() -> None:
    """Average the checkpoints of a training run, after the fact.

    \b
      ckptavg inspect RUN                 what is there, in order
      ckptavg average RUN -o OUT          one model from a run directory
      ckptavg update-bn CKPT -o OUT ...   BatchNorm statistics for its weights
      ckptavg eval --run RUN ...          did it help? last, average and ensemble
      ckptavg search RUN ...              the best average, and whether to use it
      ckptavg plot KIND RUN ...           figures of its weights and its loss
      ckptavg report RUN -o OUT.html ...  did it help, on a page with all that decides
    """


main.add_command(inspect)
main.add_command(average)
main.add_command(update_bn)
main.add_command(evaluate)
main.add_command(search)
main.add_command(plot)
main.add_command(report_run)
