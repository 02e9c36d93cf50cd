"""Scores of everything that a report shows, from as few passes over the data as memory allows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias

from ckptavg.averaging.plan import Average
from ckptavg.data.loaders import open_loader
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors import CkptavgError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.results import Result, Results, without_repeats
from ckptavg.evaluation.session import score_on
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.points import EVALUATION, PointScorer
from ckptavg.landscape.store import Key
from ckptavg.plots.report.figures import FigureKind, PlannedFigure
from ckptavg.plots.report.subject import Subject

log = logging.getLogger("ckptavg")
# Digits of coefficients by which averages are the same.
_DIGITS = 12

_Place: TypeAlias = "tuple[FigureKind, Key]"


@dataclass(frozen=True)
class Scored:
    """Scores of a report.

    Attributes:
        results: Scores of the table's candidates.
        figures: Figures by kind, in order.
        points: Number of weights that were scored for figures alone.
    """

    results: Results
    figures: Mapping[FigureKind, Landscape]
    points: int


def score_all(
    subject: Subject,
    scorer: PointScorer,
    planned: Sequence[PlannedFigure],
    progress: PhaseProgress | None = None,
) -> Scored:
    """Score the table's candidates and the points of figures in shared passes over the data.

    A figure whose points cannot be scored is left out, with a note.

    Args:
        subject: The run and its averages.
        scorer: Model, data and settings.
        planned: The figures.
        progress: Called with phase, done and total, in samples.

    Raises:
        CkptavgError: As for ``evaluate``, of the table's candidates.
    """
    table = subject.candidates(recompute=scorer.training is not None)
    scored = [figure for figure in planned if figure.points]
    found: dict[_Place, Result] = {}
    points = _candidates_of(scored, subject.average)
    if points:
        try:
            results, found = _score_together(table, points, scored, scorer, progress)
        except CkptavgError as error:
            kinds = " and ".join(figure.kind for figure in scored)
            log.info("no %s is shown: %s", kinds, error)
    if not found or any(_is_hole(result) for result in results):
        # By itself, a table says what is wrong with a candidate.
        results = _score(table, scorer, progress, keep_nonfinite=subject.keep_nonfinite)
    distinct = Results(without_repeats(results), scorer.task)
    figures: dict[FigureKind, Landscape] = {}
    for figure in planned:
        by_key = {key: result for (kind, key), result in found.items() if kind == figure.kind}
        if by_key or not figure.points:
            figures[figure.kind] = figure.lay_out(by_key, distinct)
    known = set(chain.from_iterable(map(_weights_of, table)))
    further = set(chain.from_iterable(map(_weights_of, points.values()))) - known
    return Scored(distinct, figures, len(further))


def _candidates_of(figures: Sequence[PlannedFigure], average: Average) -> dict[_Place, Candidate]:
    """Return the candidates of all points; the same average is one object, and scored once.

    Args:
        figures: Figures with points.
        average: The average of the table.
    """
    averages = {_shares_of(Candidate.of_average(average)): average}
    candidates: dict[_Place, Candidate] = {}
    for figure in figures:
        for key, candidate in figure.points.items():
            if candidate.average is not None:
                same = averages.setdefault(_shares_of(candidate), candidate.average)
                candidate = replace(candidate, average=same)  # noqa: PLW2901
            # Points whose outputs are not finite are told by their names.
            name = f"{figure.kind} point {len(candidates) + 1}"
            candidates[figure.kind, key] = replace(candidate, name=name)
    return candidates


def _shares_of(candidate: Candidate) -> tuple[tuple[str, float], ...]:
    """Return each checkpoint's share in an average, by which averages are the same."""
    total = math.fsum(candidate.coefficients)
    shares: list[tuple[str, float]] = []
    for checkpoint, coefficient in zip(candidate.checkpoints, candidate.coefficients, strict=True):
        if coefficient:
            shares.append((str(checkpoint.path), round(coefficient / total, _DIGITS)))
    return tuple(shares)


def _weights_of(candidate: Candidate) -> list[tuple[object, bool]]:
    """Return what tells the weights of a candidate from others, per member of an ensemble."""
    if candidate.kind == "average":
        return [(_shares_of(candidate), bool(candidate.recompute))]
    members: list[tuple[object, bool]] = []
    for checkpoint in candidate.checkpoints:
        members.append((str(checkpoint.path), bool(candidate.recompute)))
    return members


def _score_together(
    table: Sequence[Candidate],
    points: Mapping[_Place, Candidate],
    figures: Sequence[PlannedFigure],
    scorer: PointScorer,
    progress: PhaseProgress | None,
) -> tuple[list[Result], dict[_Place, Result]]:
    """Score the table's candidates, compared with the last checkpoint, and the points."""
    last = next(candidate for candidate in table if candidate.last)
    baselines = dict(points)
    for figure in figures:
        for key, baseline in figure.compared.items():
            baselines[figure.kind, key] = points[figure.kind, baseline]
    results = _score(
        [*table, *points.values()],
        scorer,
        progress,
        baselines=[*[last] * len(table), *baselines.values()],
    )
    return results[: len(table)], dict(zip(points, results[len(table) :], strict=True))


def _score(
    candidates: Sequence[Candidate],
    scorer: PointScorer,
    progress: PhaseProgress | None,
    *,
    baselines: Sequence[Candidate] | None = None,
    keep_nonfinite: bool = False,
) -> list[Result]:
    """Score candidates on the evaluation data; with baselines, holes are no error."""
    peers = find_peers()
    data = open_loader(scorer.data, scorer.runtime, shuffle=False, peers=peers)
    statistics = None
    if scorer.training is not None and any(candidate.recompute for candidate in candidates):
        statistics = open_loader(
            scorer.training, scorer.runtime, shuffle=True, subset=scorer.subset, peers=peers
        )
    (results,) = score_on(
        candidates,
        scorer.model,
        {EVALUATION: data},
        scorer.runtime,
        statistics,
        task=scorer.task,
        forward=scorer.forward,
        exclude=scorer.exclude,
        keep_nonfinite=keep_nonfinite,
        progress=progress,
        peers=peers,
        as_points=baselines is not None,
        baselines=baselines,
    )
    return results


def _is_hole(result: Result) -> bool:
    """Return True if the outputs of a candidate are not finite."""
    values = [value for key, value in result.metrics.items() if key != "n"]
    return all(not math.isfinite(value) for value in values)
