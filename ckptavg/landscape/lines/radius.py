"""Length of rays, chosen so that the loss rises enough along them."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors import OutputError
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.lines.bundle import RayBundle, key_of_center, series_of
from ckptavg.landscape.lines.loss import RayLoss
from ckptavg.landscape.points import PointLike, PointScorer
from ckptavg.landscape.store import Key, Scores

log = logging.getLogger("ckptavg")
# Lengths that are tried, in distances between the centers.
_FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Directions that are tried. Large networks have so many weights that all random directions are much
# alike, small ones differ.
_DIRECTIONS = 3
# In the tried directions the loss has to rise by more, so that it rises enough in the others.
_MARGIN = 1.5


def choose_radius(
    bundle: RayBundle,
    scorer: PointScorer,
    loss: RayLoss | None,
    progress: PhaseProgress | None = None,
) -> float:
    """Choose the length of rays by scores in the first directions.

    Args:
        bundle: Rays from at least two centers.
        scorer: Scores points.
        loss: The loss that has to rise; the distance between the centers is the length where None.
        progress: As for ``PointScorer.score``.

    Returns:
        The smallest of some multiples of the greatest distance between centers at which the loss
        has risen enough from all centers, with two digits; the largest where it rises less.
    """
    distance = max(bundle.distances)
    lengths = [round_up(factor * distance) for factor in _FACTORS]
    if loss is None:
        return round_up(distance)
    points: dict[Key, PointLike] = dict(bundle.center_candidates)
    for number in range(_tried(bundle)):
        points |= bundle.list_moved(number, lengths)
    scores = dict(zip(points, scorer.score([*points.values()], progress), strict=True))
    for factor, radius in zip(_FACTORS, lengths, strict=True):
        if _rises_enough(bundle, loss, radius, scores):
            log.info(
                "the rays are %.4g long, %g times the distance between the centers: the loss rises "
                "enough there", radius, factor,
            )  # fmt: skip
            return radius
    log.info("the loss rises little even at %.4g, where the rays end", lengths[-1])
    return lengths[-1]


def round_up(value: float) -> float:
    """Round a positive number up to two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    # Through text, since 130 × 0.1 is not 13.
    return float(f"{math.ceil(round(value / unit, 9)) * unit:.2g}")


def _rises_enough(bundle: RayBundle, loss: RayLoss, radius: float, scores: Scores) -> bool:
    """Return True if the loss has risen enough at a distance from all centers.

    That is by 1.5 times the rise that tells the width, in each tried direction.

    Args:
        bundle: The rays.
        loss: The loss.
        radius: The distance.
        scores: Scores by the keys of ``RayBundle.list_moved``.
    """
    first = scores[key_of_center(bundle.centers[0])]
    rise = loss.choose_rise(first, bundle.settings.rise)
    for center in bundle.centers:
        start = loss.of(scores[key_of_center(center)])
        for number in range(_tried(bundle)):
            moved = loss.of(scores[series_of(center, number), radius])
            # A loss that is not finite has risen.
            if moved < start + _MARGIN * rise:
                return False
    return True


def _tried(bundle: RayBundle) -> int:
    """Return the number of directions to try."""
    return min(_DIRECTIONS, bundle.settings.directions)


def read_radius(results: str | os.PathLike[str] | None, bundle: RayBundle) -> float | None:
    """Read the length of rays that a file of results goes on with.

    Args:
        results: ``.json`` file of a landscape; None for none.
        bundle: The rays.

    Returns:
        The length; None where the file has no rays from the same centers in the same directions.
    """
    radius: float | None = None
    peers = find_peers()
    # Hosts may see other files, so the first process decides.
    if peers.rank == 0 and results is not None and Path(results).exists():
        radius = _stored_radius(Path(results), bundle)
    shared: list[float | None] = peers.gather(radius)
    return shared[0]


def _stored_radius(path: Path, bundle: RayBundle) -> float | None:
    try:
        facts = Landscape.load(path).facts
    except OutputError:
        return None
    names = [center.name for center in bundle.centers]
    is_same = facts.get("centers") == names and facts.get("seed") == bundle.settings.seed
    radius = facts.get("radius")
    if is_same and facts.get("distances") == list(bundle.distances) and radius:
        return float(radius)
    return None
