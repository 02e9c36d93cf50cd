"""Contents of a report: what was computed, arranged in the order of a decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptavg.display.tables import Column, Table, rows_of_texts
from ckptavg.errors import first_few
from ckptavg.errors.printable import size_text
from ckptavg.evaluation.results import Result, Results
from ckptavg.evaluation.score_table import tabulate_scores
from ckptavg.inspection.geometry import Geometry
from ckptavg.inspection.geometry_table import (
    describe_groups,
    describe_motion,
    tabulate_geometry,
)
from ckptavg.plots.report import run_facts
from ckptavg.plots.report.drawings import describe
from ckptavg.plots.report.figures import FigureKind
from ckptavg.plots.report.page import (
    Block,
    Code,
    Drawing,
    Facts,
    Listing,
    Page,
    Paragraph,
    Section,
    Tabulated,
)
from ckptavg.plots.report.recipe import Invocation, Recipe
from ckptavg.plots.report.scoring import Scored
from ckptavg.plots.report.subject import Subject
from ckptavg.plots.report.verdict import Verdict


@dataclass(frozen=True)
class Computed:
    """Everything that the page of a report shows.

    Attributes:
        subject: The run and its averages.
        invocation: Arguments of the report.
        scored: Scores of the table's candidates, and figures.
        verdict: The verdict on the average.
        recipe: How the average is made; None where there is nothing to average.
        geometry: Distances of the averaged checkpoints; None where they could not be measured.
        drawings: Figures by kind.
        settings: Device, precision and seeds, in words by name.
        notes: Remarks on how all this came about.
        date: Date of the report as given; None for none.
    """

    subject: Subject
    invocation: Invocation
    scored: Scored
    verdict: Verdict
    recipe: Recipe | None
    geometry: Geometry | None
    drawings: Mapping[FigureKind, Drawing]
    settings: Mapping[str, str]
    notes: tuple[str, ...] = ()
    date: str | None = None

    @property
    def results(self) -> Results:
        """Scores of the table's candidates."""
        return self.scored.results

    @property
    def title(self) -> str:
        """Heading of the page."""
        return f"Does averaging help? {self.run_name}"

    @property
    def run_name(self) -> str:
        """Paths of the run, or the directory of its checkpoints, or their number."""
        paths = self.invocation.paths
        if paths:
            return first_few(list(paths), 2)
        parents = {str(checkpoint.path.parent) for checkpoint in self.subject.run.opened}
        if len(parents) == 1:
            return parents.pop()
        return f"{len(self.subject.run.opened)} checkpoints"


def lay_out_page(computed: Computed) -> Page:
    """Arrange what was computed: the verdict, and the sections in the order of a decision."""
    sections = [
        _describe_run(computed),
        _show_candidates(computed),
        _show_curve(computed),
        _show_geometry(computed),
        _show_segment(computed),
        _show_reliability(computed),
        _tell_how(computed),
        _list_notes(computed),
        _tell_origin(computed),
    ]
    verdict = computed.verdict
    return Page(
        title=computed.title,
        subtitle=_subtitle(computed),
        outcome=verdict.outcome,
        heading=verdict.heading,
        verdict=verdict.text,
        advice=verdict.advice,
        sections=tuple(section for section in sections if section is not None),
    )


def _subtitle(computed: Computed) -> str:
    run = computed.subject.run
    text = f"{_count(len(run.opened), 'checkpoint')}, scored on {computed.invocation.data}"
    if computed.date:
        text += f" · {computed.date}"
    return text


def _describe_run(computed: Computed) -> Section:
    """Tell what the run is, and what was left out of it."""
    subject, invocation = computed.subject, computed.invocation
    run, selection = subject.run, subject.selection
    samples = f"{computed.verdict.last.metrics['n']:.0f} {computed.results.task.counts}"
    checkpoints = str(len(run.opened))
    if len(run.trainings) > 1:
        checkpoints += f" of {len(run.trainings)} trainings"
    averaged = "all"
    if len(selection) < len(run.opened):
        averaged = f"{len(selection)}, at steps {run_facts.steps_text(selection.checkpoints)}"
    rows: list[tuple[str, str]] = [
        ("Run", ", ".join(invocation.paths) or computed.run_name),
        ("Checkpoints", checkpoints),
        ("Steps", run_facts.steps_text(run.opened)),
        ("Learning rate", run_facts.rates_text(run.opened)),
        ("Averaged", averaged),
        ("Scheme", subject.average.scheme.text),
        ("Model", invocation.model),
        ("Evaluation data", f"{invocation.data} ({samples})"),
        ("Training data", invocation.training or "not given: no statistics are recomputed"),
    ]
    blocks: list[Block] = [Facts(tuple(rows))]
    left_out = run_facts.tabulate_left_out(selection)
    if left_out is not None:
        blocks.append(Tabulated(left_out, "Found and not taken"))
    return Section("run", "The run", tuple(blocks))


def _show_candidates(computed: Computed) -> Section:
    """Show the scores of all candidates, and the intervals of their differences."""
    table = tabulate_scores(computed.results, computed.results.task)
    intro = Paragraph(
        "All candidates are scored on the same samples, and each is compared with the last "
        "checkpoint sample by sample. An interval that excludes 0 is more than the noise of a "
        "finite data set. It does not tell how another training would turn out. The verdict is on "
        "the one average that was asked for, so its p needs no correction for a choice, unless it "
        "was chosen by scores on the same data."
    )
    return Section(
        "candidates", "Candidates", (intro, Tabulated(table, f"Scores on {table.title}"))
    )


def _show_curve(computed: Computed) -> Section | None:
    """Show the scores over training."""
    drawing = computed.drawings.get("curve")
    if drawing is None:
        return None
    return Section("curve", "Over training", (drawing,))


def _show_segment(computed: Computed) -> Section | None:
    """Show the way from the average to the last checkpoint."""
    drawing = computed.drawings.get("segment")
    if drawing is None:
        return None
    sentence = Paragraph(describe(computed.scored.figures["segment"]))
    return Section("segment", "From the average to the last checkpoint", (sentence, drawing))


def _show_reliability(computed: Computed) -> Section | None:
    """Show how far confidences can be trusted."""
    drawing = computed.drawings.get("reliability")
    if drawing is None:
        return None
    sentence = Paragraph(describe(computed.scored.figures["reliability"]))
    return Section("reliability", "Reliability of confidences", (sentence, drawing))


def _show_geometry(computed: Computed) -> Section | None:
    """Show the distances of the checkpoints in weight space."""
    geometry = computed.geometry
    if geometry is None:
        return None
    remarks: list[str] = []
    for text in (describe_motion(geometry), describe_groups(geometry)):
        if text is not None:
            remarks.append(f"{text[0].upper()}{text[1:]}")
    table = tabulate_geometry(geometry)
    caption = "Euclidean distances in weight space; step: from the checkpoint before"
    blocks: list[Block] = [Listing(tuple(remarks))]
    if "geometry" in computed.drawings:
        blocks.append(computed.drawings["geometry"])
    blocks.append(Tabulated(table, caption))
    return Section("geometry", "Distances between the checkpoints", tuple(blocks))


def _tell_how(computed: Computed) -> Section | None:
    """Tell how the average is made, and what it costs."""
    recipe = computed.recipe
    if recipe is None:
        return None
    blocks: list[Block] = []
    if computed.verdict.outcome == "worse":
        path = computed.verdict.last.candidate.checkpoints[0].path
        blocks.append(
            Paragraph(
                f"The better of the two is {path}. The average, if it is wanted all the same:"
            )
        )
    if recipe.command is not None:
        blocks.append(
            Paragraph(
                "From the directory in which this report was made. The suffix of the output "
                "chooses its format."
            )
        )
        blocks.append(Code(recipe.command, "Command line"))
    blocks.append(Code(recipe.python, "Python"))
    if recipe.recomputes:
        blocks.append(
            Paragraph(
                "In Python, model is the network, with any weights, and train_data the training "
                "data of this report, as a Dataset."
            )
        )
    blocks.append(Tabulated(_tabulate_costs(computed), "Costs"))
    return Section("make", "How to make the average", tuple(blocks))


def _tabulate_costs(computed: Computed) -> Table:
    """Make the table of what each kind of candidate costs, to make and in use."""
    selection = computed.subject.selection
    read = size_text(sum(checkpoint.size for checkpoint in selection.checkpoints))
    recipe = computed.recipe
    making = f"one read of {read}"
    if recipe is not None and recipe.recomputes:
        making += ", and one forward pass over the training data"
    rows = [
        ["the last checkpoint", "nothing", "1"],
        ["the average", making, "1"],
    ]
    for result in computed.results:
        if result.candidate.kind == "ensemble":
            rows.append([result.candidate.name, "nothing", _passes_text(result)])
    columns = (
        Column("candidate", "name"),
        Column("to make", "prose"),
        Column("forward passes per sample in use", "number"),
    )
    return Table("", columns, rows_of_texts(rows))


def _passes_text(result: Result) -> str:
    return str(result.forwards)


def _list_notes(computed: Computed) -> Section | None:
    if not computed.notes:
        return None
    return Section("notes", "Notes", (Listing(computed.notes),))


def _tell_origin(computed: Computed) -> Section:
    """Tell which versions, settings and files the report was made with."""
    subject = computed.subject
    rows = [
        ("Versions", run_facts.versions_text()),
        ("Scored", _effort_text(computed.scored)),
        ("Files last changed (UTC)", run_facts.date_text(*subject.run.opened)),
        *computed.settings.items(),
        *computed.invocation.options.items(),
    ]
    files = run_facts.tabulate_files(
        subject.run, subject.selection, subject.average.plan.coefficients
    )
    blocks = (Facts(tuple(rows)), Tabulated(files, "The run's checkpoints"))
    return Section("origin", "Origin of this report", blocks)


def _effort_text(scored: Scored) -> str:
    """Word how much was scored."""
    text = _count(len(scored.results), "candidate")
    if scored.points:
        text += f", and {_count(scored.points, 'point')} of figures besides"
    return text


def _count(count: int, noun: str) -> str:
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"
