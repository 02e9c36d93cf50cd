"""Bundles of rays: points from several centers in the same random directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ckptavg.errors import UsageError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.inspection.geometry import Geometry
from ckptavg.landscape.lines.line_points import candidate_of, mark_name
from ckptavg.landscape.named_points import NamedPoint, NamedPoints
from ckptavg.landscape.plane import length
from ckptavg.landscape.points import PointLike, PointScore
from ckptavg.landscape.store import Key, Scores
from ckptavg.models.perturbation import Direction, Perturbation


@dataclass(frozen=True)
class RaySettings:
    """Numbers that define rays.

    Attributes:
        directions: Number of directions.
        points: Number of points per ray, the center included.
        seed: Seed of the directions.
        rise: Rise of the loss that defines the width; None for the default.

    Raises:
        UsageError: A number cannot be meant.
    """

    directions: int
    points: int
    seed: int
    rise: float | None

    def __post_init__(self) -> None:
        for name, least in (("directions", 1), ("points", 2)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(
                    f"`{name}` of rays is expected to be a whole number from {least} on but is "
                    f"{value!r}"
                )
        check_rise(self.rise)


def check_rise(rise: float | None) -> None:
    """Refuse a rise of the loss that cannot be meant.

    Raises:
        UsageError: It is no number above 0.
    """
    if rise is not None and not (isinstance(rise, (int, float)) and 0 < rise < math.inf):
        raise UsageError(f"`rise` is expected to be a number above 0 but is {rise!r}")


@dataclass(frozen=True)
class RayBundle:
    """Rays from several centers in the same directions.

    Attributes:
        named: The centers, and the run that their coefficients are over.
        geometry: Inner products of the run; None for a single checkpoint.
        settings: Numbers of directions and points.
        recompute: True if there are statistics to recompute, and data to recompute these from.
        radius: Greatest t.
    """

    named: NamedPoints
    geometry: Geometry | None
    settings: RaySettings
    recompute: bool
    radius: float = 0.0

    @property
    def centers(self) -> tuple[NamedPoint, ...]:
        """The centers."""
        return self.named.points

    @property
    def grid(self) -> tuple[float, ...]:
        """Distances t of the points of a ray, from 0 to the radius."""
        last = self.settings.points - 1
        return tuple(self.radius * number / last for number in range(last + 1))

    @property
    def distances(self) -> tuple[float, ...]:
        """Distance of each center to the first, in weight space."""
        if self.geometry is None:
            return (0.0,) * len(self.centers)
        distances: list[float] = []
        points = [torch.tensor(c.coefficients, dtype=torch.float64) for c in self.centers]
        for point in points:
            distances.append(length(self.geometry.differences, point - points[0]))
        return tuple(distances)

    @property
    def norms(self) -> tuple[float, ...]:
        """Norm of each center's weights; empty for a run of a single checkpoint."""
        if self.geometry is None:
            return ()
        norms: list[float] = []
        for center in self.centers:
            coefficients = torch.tensor(center.coefficients, dtype=torch.float64)
            norms.append(length(self.geometry.gram, coefficients))
        return tuple(norms)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values that decide scores beside the names of points."""
        return {"rays": self.settings.seed}

    @cached_property
    def center_candidates(self) -> dict[Key, Candidate]:
        """The centers with statistics as along the rays, by their keys."""
        # Made once: points of one object share the read of the checkpoints.
        candidates: dict[Key, Candidate] = {}
        for center in self.centers:
            candidate = candidate_of(self.named.run, center, recompute=self.recompute)
            candidates[key_of_center(center)] = candidate
        return candidates

    def list_moved(self, number: int, distances: Sequence[float]) -> dict[Key, Candidate]:
        """List points in one direction from all centers, by their keys.

        Args:
            number: Number of the direction.
            distances: t of each point.
        """
        direction = Direction(self.settings.seed, number)
        listed: dict[Key, Candidate] = {}
        for distance in distances:
            step = Perturbation(direction, distance)
            for center in self.centers:
                candidate = self.center_candidates[key_of_center(center)]
                listed[series_of(center, number), distance] = replace(candidate, perturbation=step)
        return listed

    def to_score(self) -> dict[Key, PointLike]:
        """List all points to score by their keys, one direction after another.

        A center that is a checkpoint is listed twice: by name with statistics of its own, and at
        t = 0 with statistics that are recomputed as along the rays.
        """
        listed: dict[Key, PointLike] = {}
        for center in self.centers:
            if center.position is not None and self.recompute:
                listed[mark_name(center, recompute=True)] = center.coefficients
        listed |= self.center_candidates
        for number in range(self.settings.directions):
            listed |= self.list_moved(number, self.grid[1:])
        return listed

    def score_at(
        self, center: NamedPoint, number: int, t: float, scores: Scores
    ) -> PointScore | None:
        """Return the score of a point; None where there is none yet.

        Args:
            center: The center.
            number: Number of the direction.
            t: Distance from the center.
            scores: Scores by the keys of ``to_score``.
        """
        if not t:
            return scores.get(key_of_center(center))
        return scores.get((series_of(center, number), t))


def series_of(center: NamedPoint, number: int) -> str:
    """Return the name of a ray.

    Args:
        center: The center.
        number: Number of the direction, from 0.
    """
    return f"{center.name}, direction {number + 1}"


def key_of_center(center: NamedPoint) -> Key:
    """Return the key of a center with statistics as along the rays: the start of its first ray."""
    return series_of(center, 0), 0.0
