"""Planes and directions in weight space, as coefficients over a run's checkpoints.

A point is a vector of n coefficients with sum 1, one per checkpoint; a direction one with sum 0.
All lengths follow from the inner products of the checkpoints, which one read gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptavg.errors import UsageError
from ckptavg.inspection.geometry import Geometry

# A direction that is this much shorter than the plane's side is made of rounding errors.
_COLLINEAR = 1e-6


@dataclass(frozen=True)
class Projection:
    """A point seen from a plane. All lengths are Euclidean distances in weight space.

    Attributes:
        x: Coordinate along the first axis.
        y: Coordinate along the second axis.
        distance: Distance to the plane.
    """

    x: float
    y: float
    distance: float


@dataclass(frozen=True)
class Plane:
    """A plane in weight space with orthonormal axes.

    All tensors are float64 on the CPU, (n,) unless said otherwise.

    Attributes:
        differences: Inner products ⟨wᵢ − r, wⱼ − r⟩ of the checkpoints' differences to any common
            point r, (n, n).
        origin: Coefficients of the point at (0, 0).
        u: Coefficients of the first axis, a direction of length 1.
        v: Coefficients of the second axis.
        explained: Share of the checkpoints' variance along each axis, between 0 and 1; None for a
            plane through given points.
    """

    differences: torch.Tensor
    origin: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    explained: tuple[float, float] | None = None

    def coefficients(self, x: float, y: float) -> torch.Tensor:
        """Return the coefficients of the point at (x, y), with sum 1."""
        return self.origin + x * self.u + y * self.v

    def project(self, coefficients: torch.Tensor) -> Projection:
        """Project a point on the plane.

        Args:
            coefficients: The point, (n,), with sum 1.
        """
        offset = coefficients - self.origin
        x = inner_product(self.differences, offset, self.u)
        y = inner_product(self.differences, offset, self.v)
        rest = offset - x * self.u - y * self.v
        return Projection(x, y, length(self.differences, rest))


def inner_product(differences: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the inner product of two directions.

    Args:
        differences: Inner products of the checkpoints' differences, (n, n).
        a: Coefficients of a direction, (n,), with sum 0.
        b: Coefficients of another direction.
    """
    return float(a @ differences @ b)


def length(differences: torch.Tensor, direction: torch.Tensor) -> float:
    """Return the length of a direction, see ``inner_product``."""
    return math.sqrt(max(inner_product(differences, direction, direction), 0.0))


def plane_through(geometry: Geometry, points: Sequence[torch.Tensor]) -> Plane:
    """Lay a plane through three points: û along the first two, v̂ towards the third.

    û = (w₂ − w₁)/‖w₂ − w₁‖, v = (w₃ − w₁) − ⟨w₃ − w₁, û⟩ û, v̂ = v/‖v‖ (Garipov et al. 2018,
    Izmailov et al. 2018, figure 3).

    Args:
        geometry: The checkpoints' inner products.
        points: Coefficients of the three points, each (n,) with sum 1.

    Raises:
        UsageError: The points are on a line, or two of them are the same.
    """
    first, second, third = points
    differences = geometry.differences
    side = second - first
    width = length(differences, side)
    other = third - first
    reach = max(width, length(differences, other))
    if width <= _COLLINEAR * reach:
        raise UsageError("two of the three points of the plane are the same", _CHOOSE_OTHERS)
    u = side / width
    upward = other - inner_product(differences, other, u) * u
    height = length(differences, upward)
    if height <= _COLLINEAR * reach:
        raise UsageError("the three points of the plane are on a line", _CHOOSE_OTHERS)
    return Plane(differences, first, u, upward / height)


def principal_plane(geometry: Geometry) -> Plane:
    """Lay a plane through the mean of all checkpoints along their two directions of most variance.

    Args:
        geometry: The checkpoints' inner products.

    Raises:
        UsageError: The checkpoints are on a line, so that there is only one direction.
    """
    differences = geometry.differences
    count = len(differences)
    mean = torch.full((count,), 1 / count, dtype=torch.float64)
    # The products of the centered checkpoints; their eigenvectors are the principal components.
    centered = torch.eye(count, dtype=torch.float64) - 1 / count
    values, vectors = torch.linalg.eigh(centered @ differences @ centered)
    total = float(values.clamp(min=0).sum())
    if count < 3 or float(values[-2]) <= _COLLINEAR**2 * float(values[-1]):
        raise UsageError("the checkpoints are on a line: there is no plane", _CHOOSE_OTHERS)
    axes: list[torch.Tensor] = []
    for index in (-1, -2):
        direction = centered @ vectors[:, index]
        # The sign of an eigenvector is arbitrary: the last checkpoint gets positive coordinates.
        sign = 1.0 if float(vectors[-1, index]) >= 0 else -1.0
        axes.append(sign * direction / float(values[index]) ** 0.5)
    explained = (float(values[-1]) / total, float(values[-2]) / total)
    return Plane(differences, mean, axes[0], axes[1], explained)


_CHOOSE_OTHERS = "Choose three checkpoints that differ."
