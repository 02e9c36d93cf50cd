"""Options of commands that draw a figure, and what they do with its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptavg.cli.console import Report
from ckptavg.cli.options.declare import bundle, option
from ckptavg.distributed.peers import global_rank
from ckptavg.errors import CkptavgError, OutputError, UsageError

if TYPE_CHECKING:
    from ckptavg.landscape.landscape import Landscape

F = TypeVar("F", bound=Callable[..., Any])
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
_FIGURE = "Figure"


@dataclass(frozen=True)
class FigureOptions:
    """Options on the figure and its data.

    Attributes:
        out: File of the figure; None for none.
        results: File of the data; None for none.
        resume: True to score only points that the file of data does not hold.
    """

    out: str | None
    results: str | None
    resume: bool

    def check(self) -> None:
        """Refuse what cannot be written, before any work.

        Raises:
            UsageError: A file has another suffix, or there is nothing to resume.
            OutputError: A directory is missing.
            SpecError: A figure is wanted, and matplotlib is not installed.
        """
        if self.resume and self.results is None:
            raise UsageError("--resume needs --results FILE.json")
        if self.results is not None:
            from ckptavg.landscape.landscape import check_suffix  # noqa: PLC0415 - imports torch

            check_suffix(Path(self.results))
            _require_directory(Path(self.results))
        if self.resume and not str(self.results).endswith(".json"):
            raise UsageError("--resume needs results in a .json file")
        if self.out is None:
            return
        if Path(self.out).suffix not in FIGURE_SUFFIXES:
            raise UsageError(f"figures end in {', '.join(FIGURE_SUFFIXES)}: {self.out} does not")
        _require_directory(Path(self.out))
        from ckptavg.optional import import_optional  # noqa: PLC0415

        import_optional("matplotlib", "matplotlib", "plot")

    @contextmanager
    def draw_interrupted(self) -> Iterator[None]:
        """Draw what was stored in the file of data meanwhile, if an interrupt ends the context."""
        before = self._stamp()
        try:
            yield
        except KeyboardInterrupt:
            after = self._stamp()
            if self.out is not None and after not in (None, before) and not global_rank():
                from ckptavg.landscape.landscape import Landscape  # noqa: PLC0415

                # The interrupt is what matters.
                with suppress(CkptavgError):
                    Landscape.load(Path(self.results or "")).save_figure(self.out)
            raise

    def _stamp(self) -> int | None:
        """Return the modification time of the file of data; None without one in JSON."""
        if self.results is None or not self.results.endswith(".json"):
            return None
        path = Path(self.results)
        if not path.exists():
            return None
        return path.stat().st_mtime_ns

    def publish(self, report: Report, landscape: Landscape) -> None:
        """Store the data, draw the figure, and give the data as the command's JSON.

        Raises:
            OutputError: A file cannot be written.
        """
        # Of several processes that share the work, the first writes.
        if global_rank():
            return
        if self.results is not None:
            landscape.save(self.results)
        if self.out is not None:
            landscape.save_figure(self.out)
            report.remark(f"wrote {self.out}")
        report.result(landscape.as_json())


def _require_directory(path: Path) -> None:
    if not path.parent.is_dir():
        raise OutputError(f"the directory {path.parent} does not exist", "Create it first.")


def figure_options(function: F) -> F:
    """Declare the options of a figure, passed as ``figure``."""
    decorate: Callable[[F], F] = bundle(
        "figure",
        FigureOptions,
        option(
            _FIGURE, "-o", "out", type=click.Path(dir_okay=False), metavar="FIG", common=True,
            help="Draw FIG.png, FIG.svg or FIG.pdf.  [default: the table alone]",
        ),
        option(
            _FIGURE, "--results", type=click.Path(dir_okay=False), metavar="FILE", common=True,
            help="Store all points in FILE.json, or as arrays in FILE.npz.",
        ),
        option(
            _FIGURE, "--resume", is_flag=True, common=True,
            help="Score only the points that FILE.json of --results does not hold yet.",
        ),
    )  # fmt: skip
    return decorate(function)
