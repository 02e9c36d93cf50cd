"""``ckptavg search``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptavg.cli.command import command
from ckptavg.cli.console import Report
from ckptavg.cli.options.averaging import key_option
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.param_types import positive, whole
from ckptavg.cli.options.running import RunningOptions, Source, running_options
from ckptavg.cli.options.selection import SelectionOptions, unscored_selection_options
from ckptavg.display.shell_words import quote
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import OutputError

if TYPE_CHECKING:
    from ckptavg.searching.families import Recipe
    from ckptavg.searching.result import SearchResult

_SEARCH = "Search"
_WORSE = 3  # exit code of --fail-if-worse


@dataclass(frozen=True)
class SearchOptions:
    """Options of the search.

    Attributes:
        out: Output of the winner; None to write nothing.
        overwrite: True to replace an existing output.
        families: Names of families, separated by commas; None for the default.
        budget: Largest number of candidates.
        decisive: Metric that decides; None for the task's first.
        report_data: Data that judge; None to divide the evaluation data.
        results: File of all scores; None for none.
        resume: True to score only what the file does not hold.
        select_fraction: Share of the evaluation data that chooses.
        repeats: Number of further splits.
        fail_if_worse: True to exit with 3 if nothing is better than the last checkpoint.
    """

    out: str | None
    overwrite: bool
    families: str | None
    budget: int
    decisive: str | None
    report_data: str | None
    results: str | None
    resume: bool
    select_fraction: float
    repeats: int
    fail_if_worse: bool


@command("search", shared=True)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...")
@option(
    _SEARCH, "-o", "--out", metavar="OUT", common=True,
    help="Write the winner, unless the last checkpoint wins.",
)  # fmt: skip
@option(_SEARCH, "--overwrite", is_flag=True, help="Replace OUT if it exists.")
@option(
    _SEARCH, "--try", "families", metavar="NAME,...", common=True,
    help="Families: checkpoint, window (the last k), sliding, ema, linear, wsm, power, pair, soup, "
    "without-one (what each checkpoint contributes).  [default: all but pair and without-one]",
)  # fmt: skip
@option(
    _SEARCH, "--budget", type=positive, default="64", show_default=True, metavar="N", common=True,
    help="Score at most N candidates.",
)  # fmt: skip
@option(
    _SEARCH, "--metric", "decisive", metavar="NAME", common=True,
    help="The metric that decides.  [default: the task's first]",
)  # fmt: skip
@option(
    _SEARCH, "--report-data", metavar="SPEC", common=True,
    help="Data that judge the winner, which choose nothing.  [default: a part of --data]",
)  # fmt: skip
@option(
    _SEARCH, "--results", type=click.Path(dir_okay=False), metavar="FILE.json", common=True,
    help="Keep every candidate with its scores in FILE.json.",
)  # fmt: skip
@option(
    _SEARCH, "--resume", is_flag=True, common=True,
    help="Score only what FILE.json of --results does not hold yet.",
)  # fmt: skip
@option(
    _SEARCH, "--select-fraction", type=float, default=0.5, show_default=True, metavar="F",
    help="The share of --data that chooses; the rest judges.",
)  # fmt: skip
@option(
    _SEARCH, "--repeats", type=whole, default="0", show_default=True, metavar="R",
    help="Split --data R times anew, to see how often each family wins.",
)  # fmt: skip
@option(
    _SEARCH, "--fail-if-worse", is_flag=True,
    help="Exit 3 if nothing is better than the last checkpoint.",
)  # fmt: skip
@running_options("Recomputes the averages' BatchNorm", scoring="Data to choose and judge on")
@unscored_selection_options
@key_option
@bundle("options", SearchOptions)
def search(
    report: Report,
    processes: TorchrunGroup | None,
    paths: tuple[str, ...],
    key: str | None,
    *,
    running: RunningOptions,
    select: SelectionOptions,
    options: SearchOptions,
) -> None:
    """Find the best average of a run, and tell honestly whether to use it.

    Candidates are chosen on a part of the data and judged on the rest, and differences are
    corrected for the number of candidates. The last checkpoint always stands for election.

    \b
      ckptavg search runs/swa --model model.py:make --data imagefolder:val \\
          --train-data imagefolder:train -o best.safetensors
    """
    running.check_statistics()
    if options.out is not None:
        _check_output(options.out, overwrite=options.overwrite)
    from ckptavg.cli import build  # noqa: PLC0415 - help is shown without torch
    from ckptavg.distributed.peers import SingleProcess, share_work  # noqa: PLC0415
    from ckptavg.searching import search as library  # noqa: PLC0415
    from ckptavg.searching.families import check_families  # noqa: PLC0415

    families = library.FAMILIES
    if options.families is not None:
        families = check_families(options.families.split(","))
    run, selection = select.open(paths, key)
    scoring = build.build_scoring(running, reversed(run.checkpoints), processes)
    report_data = build.build_data(
        Source(options.report_data), running, reversed(run.checkpoints), processes
    )
    with share_work(processes or SingleProcess()):
        with report.samples_progress() as progress:
            result = library.search(
                selection, scoring.model, scoring.data, report_data=report_data,
                select_fraction=options.select_fraction, families=families, budget=options.budget,
                metric=options.decisive, repeats=options.repeats, results=options.results,
                resume=options.resume, progress=progress,
                **scoring.keywords,
            )  # fmt: skip
        if options.out is not None and result.verdict.outcome != "keep-last":
            result.write_winner(options.out, overwrite=options.overwrite)
    # A selection is named checkpoint by checkpoint: the flags of the search would select again.
    sources = paths if selection is run else ()
    words = _Words(
        tuple(str(checkpoint.path) for checkpoint in selection), sources, key, running,
        options.out or "average.safetensors",
    )  # fmt: skip
    if result.command:
        recipe = result.winner.scored.proposal.recipe
        recomputed = result.winner.scored.is_recomputed
        result = replace(result, command=words.write_command(recipe, recomputed=recomputed))
    _show(report, result, options)


def _check_output(out: str, *, overwrite: bool) -> None:
    """Refuse an output that exists, before any work."""
    if Path(out).exists() and not overwrite:
        raise OutputError(f"{out} exists", "Pass `overwrite=True` to replace it.")


@dataclass(frozen=True)
class _Words:
    """Words of the command that makes the winner.

    Attributes:
        paths: Path of each checkpoint of the searched run.
        sources: Paths that give the whole searched run; empty to name checkpoints.
        key: The entry that holds the weights; None to find it.
        running: Model and training data.
        out: Path of the output.
    """

    paths: tuple[str, ...]
    sources: tuple[str, ...]
    key: str | None
    running: RunningOptions
    out: str

    def write_command(self, recipe: Recipe, *, recomputed: bool) -> str:
        """Write the command line of a recipe, which selects the last checkpoints by number."""
        count, size = len(self.paths), len(recipe.positions)
        command = ["ckptavg", "average"]
        is_tail = recipe.positions == tuple(range(count - size, count))
        if self.sources and is_tail:
            command += self.sources
        else:
            command += [self.paths[position] for position in recipe.positions]
        if self.key is not None:
            command += ["--key", self.key]
        if self.sources and is_tail and size < count:
            command += ["--last", str(size)]
        if recipe.weights is not None:
            command += ["--weights", ",".join(f"{weight:.17g}" for weight in recipe.weights)]
        elif recipe.scheme != "uniform":
            command += ["--scheme", recipe.scheme]
        command += ["-o", self.out]
        if recomputed:
            command += self._statistics()
        return " ".join(map(quote, command))

    def _statistics(self) -> list[str]:
        """Return the flags that recompute BatchNorm statistics as the search did."""
        running, loader = self.running, self.running.loader
        words: list[str] = []
        for flag, source in (("model", running.model), ("train-data", running.training)):
            if source.spec:
                words += [f"--{flag}", source.spec]
            for pair in source.pairs:
                words += [f"--{flag}-arg", pair]
        if running.statistics.samples is not None:
            count, is_stratified = running.statistics.samples
            words += ["--bn-samples", f"{count}:stratified" if is_stratified else str(count)]
        for pattern in running.statistics.exclude:
            words += ["--bn-exclude", pattern]
        if running.forward:
            words += ["--forward", running.forward]
        if running.task:
            words += ["--task", running.task]
        if loader.amp != "off":
            words += ["--amp", loader.amp]
        if loader.batch_size is not None:
            words += ["--batch-size", str(loader.batch_size)]
        if loader.seed:
            words += ["--seed", str(loader.seed)]
        return words


def _show(report: Report, result: SearchResult, options: SearchOptions) -> None:
    """Print ranking, verdict and command; exit with 3 if that was asked for."""
    report.draw(result.table())
    contributions = result.contribution_table()
    if contributions is not None:
        report.draw(contributions)
    report.line(result.verdict.text)
    if result.command:
        report.line(result.command)
    report.result(result.as_json())
    if result.verdict.outcome == "keep-last":
        if options.out is not None:
            report.remark(f"{options.out} is not written: the last checkpoint wins")
        if options.fail_if_worse:
            raise click.exceptions.Exit(_WORSE)
