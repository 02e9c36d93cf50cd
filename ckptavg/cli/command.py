"""Commands: a report, one line per error, the end by signals, and the options of all commands."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli import launcher, repeated, signals
from ckptavg.cli.error_lines import show_in_one_line
from ckptavg.cli.libraries import silence_libraries
from ckptavg.cli.options.declare import option, together
from ckptavg.cli.options.help import EVERYWHERE, GroupedCommand
from ckptavg.cli.options.param_types import positive

if TYPE_CHECKING:
    from ckptavg.cli.options.also import AlsoAverage

_common_options = together(
    option(EVERYWHERE, "--json", "as_json", is_flag=True, help="Print the result as JSON."),
    option(
        EVERYWHERE, "--threads", type=positive, metavar="N",
        help="Processor threads that compute. On a machine that others use, too, one is often "
        "faster than many that wait for each other.  [default: OMP_NUM_THREADS, else one per "
        "core]",
    ),
    option(
        EVERYWHERE, "-q", "--quiet", is_flag=True,
        help="The result alone: no notes, no progress, and no plan of what is written.",
    ),
    option(
        EVERYWHERE, "-v", "--verbose", count=True,
        help="More notes, and those of transformers and DeepSpeed.",
    ),
    option(EVERYWHERE, "--debug", is_flag=True, help="Show the traceback of an error."),
)  # fmt: skip


def command(
    name: str | None = None, *, shared: bool = False
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function, with the options of every command.

    The function receives a ``report``. An error is shown in one line.

    Args:
        name: Name of the command; the function's own where None.
        shared: True for a command that several processes may share; the function also receives the
            ``processes``, which are None for a single one. Other commands refuse a launcher.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        run = _refuse_several(function)
        if shared:
            run = _share(function)
        return click.command(name, cls=_Command)(_report(run))

    return decorate


class _Command(GroupedCommand):
    """Command with the options of every command after its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        carrier = _common_options(lambda: None)
        self.params += reversed(carrier.__click_params__)  # type: ignore[attr-defined]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and keep them as typed for a command that repeats them."""
        ctx.meta[repeated.TYPED] = tuple(args)
        return super().parse_args(ctx, args)


def _share(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wait for the processes that share the work, and pass them to the function."""

    @functools.wraps(function)
    def run(**values: Any) -> Any:
        with launcher.join_processes() as processes:
            return function(processes=processes, **values)

    return run


def _refuse_several(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let the function refuse to run in several processes."""

    @functools.wraps(function)
    def run(**values: Any) -> Any:
        launcher.refuse_several(f"ckptavg {click.get_current_context().info_name}")
        return function(**values)

    return run


def _report(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass a report to the function, show errors in one line, and end on signals."""

    @functools.wraps(function)
    def run(
        *,
        as_json: bool,
        threads: int | None,
        quiet: bool,
        verbose: int,
        debug: bool,
        **values: Any,
    ) -> Any:
        """Call the function with a report.

        Args:
            as_json: Print the result as JSON.
            threads: Processor threads that compute; None for the default.
            quiet: Show no notes and no progress.
            verbose: Number of ``-v``.
            debug: Show tracebacks.
            values: All other options of the command.
        """
        from ckptavg.specs.user_modules import keep_imports  # noqa: PLC0415 - not for help

        verbosity = verbose
        if quiet:
            verbosity = -1
        report = launcher.open_report(as_json=as_json, verbosity=verbosity)
        with (
            warnings.catch_warnings(),
            signals.unwind_on_signals() as received,
            signals.report_interrupt(_outputs(**values), received),
            show_in_one_line(debug),
            report.notes(),
            silence_libraries(verbose=bool(verbose)),
            _limited(threads),
            keep_imports(),
        ):
            # Nothing here converts tensors to NumPy.
            warnings.filterwarnings("ignore", "Failed to initialize NumPy")
            return function(report=report, **values)

    return run


def _limited(threads: int | None) -> AbstractContextManager[None]:
    """Limit the threads to the requested number, if there is one."""
    if threads is None:
        return nullcontext()
    from ckptavg.distributed.threads import (  # noqa: PLC0415 - help is shown without torch
        limit_threads,
    )

    return limit_threads(threads)


def _outputs(
    out: str | None = None,
    results: str | None = None,
    further: Sequence[AlsoAverage] = (),
    **_: Any,
) -> list[str]:
    """Return the paths of a command's outputs."""
    paths = [path for path in (out, results) if path]
    if out:
        paths += [average.path(out) for average in further]
    return paths
