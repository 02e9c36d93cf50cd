"""Figures of a report: which points they need, and what they show once these are scored."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from ckptavg.errors import CkptavgError, UsageError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Result, Results
from ckptavg.inspection.geometry import Geometry, geometry
from ckptavg.landscape.curves.named_runs import NamedRun, choose_steps, name_runs
from ckptavg.landscape.curves.scored_curve import ScoredCurve
from ckptavg.landscape.curves.series import (
    Stretch,
    candidates_by_coefficients,
    check_window,
)
from ckptavg.landscape.curves.verdict import PairComparison, compare_ends
from ckptavg.landscape.geometry import lay_out_geometry
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.lines.line_points import has_statistics_to_recompute
from ckptavg.landscape.lines.segment import SegmentPoints, space_evenly
from ckptavg.landscape.named_points import (
    AVERAGE,
    LAST,
    NamedPoint,
    NamedPoints,
    find_points,
)
from ckptavg.landscape.points import PointLike, PointScore, PointScorer
from ckptavg.landscape.reliability import check_classifier, lay_out_reliability
from ckptavg.landscape.store import Key, Scores
from ckptavg.plots.report.subject import Subject
from ckptavg.plots.report.verdict import find_average

log = logging.getLogger("ckptavg")

FigureKind = Literal["curve", "geometry", "segment", "reliability"]
FIGURES: tuple[FigureKind, ...] = get_args(FigureKind)
# Points from end to end of the segment.
_SEGMENT_POINTS = 11

ResultsByKey: TypeAlias = Mapping[Key, Result]


@dataclass(frozen=True)
class PlannedFigure:
    """A figure before its points are scored.

    Attributes:
        kind: Kind of the figure.
        lay_out: Makes the landscape of the results of points by key, and of the table's results.
        points: The points to score by their keys; empty for a figure of weights alone.
        compared: Keys of points that are compared, each with the key of its baseline.
    """

    kind: FigureKind
    lay_out: Callable[[ResultsByKey, Results], Landscape]
    points: Mapping[Key, Candidate] = field(default_factory=dict)
    compared: Mapping[Key, Key] = field(default_factory=dict)


def check_figures(kinds: object) -> tuple[FigureKind, ...]:
    """Return kinds of figures, in the order of the page.

    Raises:
        UsageError: A kind is unknown, or there is no list of kinds.
    """
    expected = f"`figures` is expected to list some of {', '.join(FIGURES)} but got {kinds!r}"
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise UsageError(expected)
    if not {*kinds} <= {*FIGURES}:
        raise UsageError(expected)
    return tuple(kind for kind in FIGURES if kind in kinds)


def plan_figures(
    subject: Subject,
    scorer: PointScorer,
    kinds: Sequence[FigureKind],
    measured: Geometry | None,
) -> list[PlannedFigure]:
    """Plan figures; one that cannot be made is left out, with a note.

    Args:
        subject: The run and its averages.
        scorer: Model, data and settings.
        kinds: The figures to make, in order.
        measured: Distances of the selected checkpoints; None where they could not be measured.
    """
    planned: list[PlannedFigure] = []
    for kind in kinds:
        try:
            if kind == "curve":
                planned.append(_plan_curve(subject, scorer))
            elif kind == "segment":
                planned.append(_plan_segment(subject, scorer, measured))
            elif kind == "reliability":
                planned.append(_plan_reliability(subject, scorer))
            elif measured is not None:
                planned.append(_plan_geometry(measured))
        except CkptavgError as error:
            log.info("no %s is shown: %s", kind, error)
    return planned


def _plan_curve(subject: Subject, scorer: PointScorer) -> PlannedFigure:
    """Plan the curve of the selected checkpoints, and of the average so far.

    Raises:
        UsageError: A training has a single checkpoint, or tensors are chosen by rules.
    """
    _refuse_rules(subject)
    runs = name_runs(subject.selection)
    check_window(runs, None)
    axis = choose_steps(runs)
    total = len(axis.steps)
    curve = ScoredCurve(runs, axis, None, scorer)
    points = candidates_by_coefficients(
        curve.stretches, total, recompute=scorer.training is not None
    )
    ends = {run.name: _ends_of(run, total) for run in runs}

    def lay_out(results: ResultsByKey, _: Results) -> Landscape:
        """Lay out the curve, with the comparison of each run's ends."""
        comparisons: list[list[PairComparison]] = []
        for run in runs:
            average, last = (results[key] for key in ends[run.name])
            comparisons.append([compare_ends(len(run), average, last, scorer.task)])
        return curve.lay_out(_scores_of(results), comparisons)

    return PlannedFigure("curve", lay_out, _as_candidates(points, scorer), dict(ends.values()))


def _ends_of(run: NamedRun, total: int) -> tuple[Key, Key]:
    """Return the keys of the average of a run, and of its last checkpoint."""
    count = len(run)
    return (
        Stretch("", run, 0, count).coefficients(total),
        Stretch("", run, count - 1, count).coefficients(total),
    )


def _plan_segment(
    subject: Subject, scorer: PointScorer, measured: Geometry | None
) -> PlannedFigure:
    """Plan the segment from the average to the last checkpoint.

    Raises:
        UsageError: The two are the same, or tensors are chosen by rules.
    """
    _refuse_rules(subject)
    if len(subject.selection) == 1:
        raise UsageError("the average of one checkpoint is the checkpoint")
    named = find_points(subject.selection, [subject.run.last(1).checkpoints[-1]])
    own = subject.average.plan.coefficients
    total = math.fsum(own)
    shares = [coefficient / total for coefficient in own]
    shares += [0.0] * (len(named.run) - len(own))
    average = NamedPoint(AVERAGE, tuple(shares))
    last = replace(named.points[0], name=LAST)
    # The last checkpoint of the run may be outside the selection.
    if measured is None or named.run is not subject.selection:
        measured = geometry(named.run)
    scorer = replace(scorer, run=named.run)
    segment = SegmentPoints(
        NamedPoints(named.run, named.own, (average, last)),
        scorer.task,
        measured,
        space_evenly(_SEGMENT_POINTS, 0),
        has_statistics_to_recompute(scorer),
    )
    points = _as_candidates(segment.to_score(), scorer)
    return PlannedFigure("segment", lambda results, _: segment.lay_out(_scores_of(results)), points)


def _plan_geometry(measured: Geometry) -> PlannedFigure:
    return PlannedFigure("geometry", lambda *_: lay_out_geometry(measured))


def _plan_reliability(subject: Subject, scorer: PointScorer) -> PlannedFigure:
    """Plan the reliability of the last checkpoint, of the average and of the ensemble.

    Raises:
        UsageError: The task has no bins of confidence.
    """
    check_classifier(scorer.task)

    def lay_out(_: ResultsByKey, results: Results) -> Landscape:
        """Lay out the bins of the candidates that a decision is between."""
        average = find_average(results, subject.average)
        shown: list[Result] = []
        for result in results:
            is_ensemble = result.candidate.kind == "ensemble"
            if result.candidate.last or result is average or is_ensemble:
                shown.append(result)
        return lay_out_reliability(Results(shown, scorer.task))

    return PlannedFigure("reliability", lay_out)


def _refuse_rules(subject: Subject) -> None:
    """Refuse points of averages whose tensors are chosen by rules, which points know nothing of.

    Raises:
        UsageError: There are such rules.
    """
    if subject.has_rules:
        raise UsageError("some tensors are not averaged, or get another type")


def _as_candidates(points: Mapping[Key, PointLike], scorer: PointScorer) -> dict[Key, Candidate]:
    """Return the candidates of points.

    Args:
        points: Candidates, or coefficients over the scorer's run.
        scorer: Model, data and settings.
    """
    candidates: dict[Key, Candidate] = {}
    for key, point in points.items():
        if not isinstance(point, Candidate):
            point = scorer.candidate_at(point)  # noqa: PLW2901
        candidates[key] = point
    return candidates


def _scores_of(results: ResultsByKey) -> Scores:
    """Return the scores of points on the evaluation data."""
    scores: dict[Key, PointScore] = {}
    for key, result in results.items():
        scores[key] = PointScore(result.metrics, None, result.bn, result.interval)
    return scores
