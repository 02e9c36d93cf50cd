"""Scores of points in a landscape's file, written pass by pass and continued by a later call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers, find_peers
from ckptavg.errors import OutputError, UsageError
from ckptavg.evaluation.resume import digest_of
from ckptavg.landscape.landscape import Kind, Landmark, Landscape, Point, check_suffix
from ckptavg.landscape.points import PointLike, PointScore, PointScorer, require_finite

log = logging.getLogger("ckptavg")

Key: TypeAlias = Hashable
"""Coefficients of a point as a tuple; the series and x of a point without coefficients."""
Scores: TypeAlias = Mapping[Key, PointScore]
"""Scores so far, by the keys of points."""
# Fact of a stored landscape: the digest of all that decides the scores beside the points.
IDENTITY = "identity"
# Decimals by which the coefficients of points are told apart.
_DIGITS = 9
_ELSEWHERE = "Name another file for the results, or move that one away."


def check_results(
    results: str | os.PathLike[str] | None, kind: Kind, *, resume: bool = False
) -> None:
    """Refuse a file of results that cannot be meant, before any work.

    Args:
        results: ``.json`` or ``.npz`` file of a landscape; None for none.
        kind: Kind of the landscape: the file is not replaced if it holds anything else.
        resume: True to continue the file.

    Raises:
        UsageError: The file has another suffix, or cannot be continued.
        OutputError: The directory does not exist, or the file holds something else.
    """
    if resume and (results is None or Path(results).suffix != ".json"):
        raise UsageError("`resume` needs a `results` file that ends in .json")
    if results is None:
        return
    path = Path(results)
    check_suffix(path)
    if not path.parent.is_dir():
        raise OutputError(f"the directory {path.parent} does not exist", "Create it first.")
    if path.suffix != ".json" or not path.exists() or not path.stat().st_size:
        return
    try:
        stored = Landscape.load(path)
    except OutputError as error:
        raise OutputError(f"{path} is not replaced: it holds no landscape", _ELSEWHERE) from error
    if stored.kind != kind:
        raise OutputError(
            f"{path} is not replaced: it holds a landscape of kind {stored.kind}", _ELSEWHERE
        )


def score_landscape(
    scorer: PointScorer,
    points: Mapping[Key, PointLike],
    build: Callable[[Scores], Landscape],
    *,
    results: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: PhaseProgress | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Landscape:
    """Score points, and store the landscape of the points so far after each pass.

    Call ``check_results`` first. If the landscape cannot be stored, a warning says so, since
    scoring again would take long.

    Args:
        scorer: Scores the points.
        points: The points by their keys, the first ones first in time: coefficients under
            themselves, any other weights under the series and x of their ``Point``.
        build: Makes the landscape of the points that have scores.
        results: ``.json`` or ``.npz`` file of the landscape; None to store nothing.
        resume: True to take the scores that the file holds for the same points, weights, model,
            data and options.
        progress: Called with phase, done and total, in samples times points.
        settings: Further plain values that decide scores, such as the seed of directions.
        notes: Remarks on the points, which may grow meanwhile, as those of ``collect_notes`` do.

    Returns:
        The landscape of all points, with the notes.

    Raises:
        EvaluationError: No point has finite outputs.
        CkptavgError: As for ``evaluate``.
    """
    peers = find_peers()
    if results is None:
        scores = dict(zip(points, scorer.score([*points.values()], progress), strict=True))
        require_finite([*scores.values()])
        return replace(build(scores), notes=tuple(notes))
    store = _Store(
        Path(results), digest_of({"scorer": scorer.identify(), **(settings or {})}), peers
    )
    known: dict[Key, PointScore] = {}
    if resume:
        known = store.read(points)
    missing = [key for key in points if key not in known]

    def save(scored: Sequence[PointScore]) -> Landscape:
        """Store the landscape of the known and the new scores."""
        so_far = known | dict(zip(missing, scored, strict=False))
        return store.save(replace(build(so_far), notes=tuple(notes)))

    scored = scorer.score([points[key] for key in missing], progress, save)
    require_finite([*known.values(), *scored])
    return save(scored)


class _Store:
    """File of a landscape.

    Args:
        path: The file.
        identity: Digest of all that decides the scores beside the points.
        peers: Processes that score the same points; the first reads and writes the file.
    """

    def __init__(self, path: Path, identity: str, peers: Peers) -> None:
        self._path = path
        self._identity = identity
        self._peers = peers

    def read(self, points: Mapping[Key, object]) -> dict[Key, PointScore]:
        """Read the scores of some points, as far as the file holds them."""
        known: dict[Key, PointScore] = {}
        if self._peers.rank == 0 and self._path.exists() and self._path.stat().st_size:
            stored = Landscape.load(self._path)
            if stored.facts.get(IDENTITY) == self._identity:
                known = _scores_of(stored)
            else:
                log.info(
                    "%s holds points of other weights, data or options: all points are scored",
                    self._path,
                )
        # Hosts may see other files and times, so the first process decides.
        entries: list[Any] = []
        stored_scores = {_rounded(key): score for key, score in known.items()}
        for position, key in enumerate(points):
            # A checkpoint, with statistics of its own, may be that close to a point of the grid.
            score = known.get(key, stored_scores.get(_rounded(key)))
            if score is not None:
                interval = {name: list(ends) for name, ends in score.interval.items()}
                entries.append([position, dict(score.data), score.train, interval])
        entries = self._peers.gather(entries)[0]
        keys = [*points]
        shared: dict[Key, PointScore] = {}
        for position, data, train, interval in entries:
            ends = {name: (low, high) for name, (low, high) in interval.items()}
            shared[keys[position]] = PointScore(data, train, interval=ends)
        log.info("%d of %d points are in %s", len(shared), len(points), self._path)
        return shared

    def save(self, landscape: Landscape) -> Landscape:
        """Store a landscape with the identity of its scores, and return it."""
        facts = {**landscape.facts, IDENTITY: self._identity}
        landscape = replace(landscape, facts=facts)
        if self._peers.rank == 0:
            try:
                landscape.save(self._path)
            except OutputError as error:
                log.warning("%s", error)
        return landscape


def _scores_of(landscape: Landscape) -> dict[Key, PointScore]:
    """Return the scores of all points and landmarks, by key."""
    scores: dict[Key, PointScore] = {}
    entries: list[Point | Landmark] = [*landscape.checkpoints, *landscape.averages]
    entries += landscape.points
    for entry in entries:
        if not entry.data:
            continue
        interval: Mapping[str, tuple[float, float]] = {}
        if isinstance(entry, Point):
            interval = entry.interval
        scores[key_of(entry)] = PointScore(entry.data, entry.train, interval=interval)
    return scores


def key_of(entry: Point | Landmark) -> Key:
    """Return the key of a point."""
    if entry.coefficients is not None:
        return entry.coefficients
    if isinstance(entry, Point):
        return entry.series, entry.x
    return entry.name


def _rounded(key: Key) -> Key:
    """Round the numbers of a key.

    Another number of threads, or another processor, gives the inner products that coefficients are
    computed from in other last digits.
    """
    if not isinstance(key, tuple):
        return key
    return tuple(round(part, _DIGITS) if isinstance(part, float) else part for part in key)
