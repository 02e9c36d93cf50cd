"""A report built from a run and a model: scored, judged, drawn and written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors import CkptavgError, UsageError
from ckptavg.errors.system import guard_writes
from ckptavg.evaluation.results import Results
from ckptavg.formats.running_statistics import RECOMPUTED
from ckptavg.inspection.geometry import Geometry
from ckptavg.inspection.geometry import geometry as measure
from ckptavg.io.atomic import Publication
from ckptavg.io.output_paths import check_target
from ckptavg.io.paths import Location
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.points import PointScorer
from ckptavg.optional import import_optional
from ckptavg.plots.report.contents import Computed, lay_out_page
from ckptavg.plots.report.drawings import draw_figures
from ckptavg.plots.report.figures import FIGURES, FigureKind, plan_figures
from ckptavg.plots.report.page import render
from ckptavg.plots.report.recipe import Invocation, Recipe, write_recipe
from ckptavg.plots.report.scoring import score_all
from ckptavg.plots.report.subject import Subject
from ckptavg.plots.report.verdict import Verdict, judge
from ckptavg.runs.run import Run

log = logging.getLogger("ckptavg")
SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Report:
    """A report and what it was drawn from.

    Attributes:
        verdict: The verdict on the average.
        results: Scores of all candidates.
        figures: What the figures were drawn from, by kind; ``figures["curve"].plot()`` draws one.
        recipe: How the average is made; None where there is nothing to average.
        notes: Remarks on how all this came about.
        html: The page.
    """

    verdict: Verdict
    results: Results
    figures: Mapping[FigureKind, Landscape]
    recipe: Recipe | None
    notes: tuple[str, ...]
    html: str

    def __repr__(self) -> str:
        return f"<Report: {self.verdict.heading}>"

    def __str__(self) -> str:
        return self.verdict.text

    def as_json(self) -> dict[str, Any]:
        """Return the verdict, the scores and the recipe as plain values for JSON."""
        plain = self.verdict.as_json()
        plain["candidates"] = [result.as_json() for result in self.results]
        plain["command"] = None
        plain["python"] = None
        if self.recipe is not None:
            plain["command"] = self.recipe.command
            plain["python"] = self.recipe.python
        plain["figures"] = {kind: figure.as_json() for kind, figure in self.figures.items()}
        plain["notes"] = list(self.notes)
        return plain


def require_packages() -> None:
    """Refuse to begin without what draws the page.

    Raises:
        SpecError: jinja2 or matplotlib is not installed.
    """
    import_optional("jinja2", "jinja2")
    import_optional("matplotlib", "matplotlib")


def check_output(path: Path, *, overwrite: bool, inputs: Sequence[Location] = ()) -> None:
    """Refuse a report that cannot be written, before any work.

    Args:
        path: The file of the report.
        overwrite: True to replace an existing file.
        inputs: Checkpoints that are being read.

    Raises:
        UsageError: The name does not end in ``.html``.
        OutputError: The file may not be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a report is expected in a file that ends in .html, but got {path}")
    # Checkpoints at a URL cannot be overwritten by a file.
    local = [location for location in inputs if isinstance(location, Path)]
    check_target(path, overwrite=overwrite, inputs=local)


def build_report(
    subject: Subject,
    scorer: PointScorer,
    invocation: Invocation,
    *,
    figures: Sequence[FigureKind] = FIGURES,
    notes: Sequence[str],
    wording: Callable[[str], str] = str,
    date: str | None = None,
    progress: PhaseProgress | None = None,
) -> Report:
    """Score, judge and draw.

    Args:
        subject: The run and its averages.
        scorer: Model, data and settings.
        invocation: Arguments of the report.
        figures: Kinds of figures, in order.
        notes: List that collects notes while this runs.
        wording: Rewords a note for whoever reads the page.
        date: Date of the report; the page has no other.
        progress: Called with phase, done and total.

    Raises:
        CkptavgError: As for ``evaluate``.
    """
    measured = _measure(subject.selection)
    scored = score_all(subject, scorer, plan_figures(subject, scorer, figures, measured), progress)
    verdict = judge(scored.results, scorer.task, subject.average)
    recipe = None
    if verdict.average is not None:
        recomputes = verdict.average.bn in RECOMPUTED
        recipe = write_recipe(invocation, subject.run, subject.selection, recomputes=recomputes)
    drawings = draw_figures(scored.figures)
    worded = tuple(map(wording, notes))
    computed = Computed(
        subject, invocation, scored, verdict, recipe, measured, drawings, _settings(scorer), worded,
        date,
    )  # fmt: skip
    html = render(lay_out_page(computed))
    return Report(verdict, scored.results, scored.figures, recipe, worded, html)


def write_report(report: Report, path: Path, *, overwrite: bool) -> None:
    """Write the page, whole or not at all; of several processes, the first writes.

    Args:
        report: The report.
        path: The file.
        overwrite: True to replace an existing file.

    Raises:
        OutputError: The file cannot be written, or exists and must not be replaced.
    """
    if find_peers().rank:
        return
    with (
        guard_writes(path),
        Publication(path, directory=False, overwrite=overwrite) as publication,
    ):
        publication.temporary.write_text(report.html, encoding="utf-8", newline="\n")
        publication.publish()


def _measure(selection: Run) -> Geometry | None:
    """Measure distances; None, with a note, where this cannot be done."""
    if len(selection) == 1:
        log.info("no distances are shown: one checkpoint has none")
        return None
    try:
        return measure(selection)
    except CkptavgError as error:
        log.info("no distances are shown: %s", error)
        return None


def _settings(scorer: PointScorer) -> dict[str, str]:
    """Word the settings that decide the scores, by name."""
    runtime = scorer.runtime
    return {
        "Task": type(scorer.task).__name__,
        "Device": str(runtime.device),
        "Precision": "as the weights" if runtime.amp == "off" else runtime.amp,
        "Batch size": f"{runtime.batch_size}, unless the data is a loader",
        "Seed": f"{runtime.seed}: order of the training data, augmentation, resampling",
    }
