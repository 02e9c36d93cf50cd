"""Planes through checkpoints, against worked values and against vectors in full."""

import math

import pytest
import torch

from ckptavg import geometry
from ckptavg.errors import UsageError
from ckptavg.landscape.plane import plane_through, principal_plane


def geometry_of(directory, vectors):
    """Save vectors as checkpoints, and measure these."""
    directory.mkdir()
    for index, vector in enumerate(vectors):
        torch.save({"w": vector.double()}, directory / f"epoch_{index}.pt")
    return geometry(directory)


def unit(count, *entries):
    return torch.eye(count, dtype=torch.float64)[list(entries)]


def test_plane_has_the_worked_axes_and_coordinates(tmp_path):
    vectors = torch.tensor([[0.0, 0, 0], [4, 0, 0], [1, 2, 2]], dtype=torch.float64)
    plane = plane_through(geometry_of(tmp_path / "run", vectors), unit(3, 0, 1, 2))
    half = math.sqrt(0.5)
    torch.testing.assert_close(plane.u @ vectors, torch.tensor([1.0, 0, 0]).double())
    torch.testing.assert_close(plane.v @ vectors, torch.tensor([0, half, half]).double())
    third = plane.project(unit(3, 2)[0])
    assert (third.x, third.y) == pytest.approx((1, 2.8284271))
    assert third.distance == pytest.approx(0, abs=1e-12)
    mean = plane.project(torch.full((3,), 1 / 3, dtype=torch.float64))
    assert (mean.x, mean.y) == pytest.approx((1.6666667, 0.9428090))


def test_plane_projects_other_points_as_whole_vectors_do(tmp_path):
    vectors = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).double()
    plane = plane_through(geometry_of(tmp_path / "run", vectors), unit(6, 1, 4, 5))
    u = vectors[4] - vectors[1]
    u /= u.norm()
    v = vectors[5] - vectors[1]
    v -= (v @ u) * u
    v /= v.norm()
    for index, vector in enumerate(vectors):
        seen = plane.project(unit(6, index)[0])
        offset = vector - vectors[1]
        away = (offset - (offset @ u) * u - (offset @ v) * v).norm()
        assert (seen.x, seen.y) == pytest.approx((float(offset @ u), float(offset @ v)))
        assert seen.distance == pytest.approx(float(away), abs=1e-9)


def test_plane_gives_coefficients_of_the_point_at_its_coordinates(tmp_path):
    vectors = torch.randn(4, 7, generator=torch.Generator().manual_seed(1)).double()
    plane = plane_through(geometry_of(tmp_path / "run", vectors), unit(4, 0, 1, 3))
    coefficients = plane.coefficients(0.3, -1.7)
    assert float(coefficients.sum()) == pytest.approx(1)
    expected = vectors[0] + 0.3 * (plane.u @ vectors) - 1.7 * (plane.v @ vectors)
    torch.testing.assert_close(coefficients @ vectors, expected)


@pytest.mark.parametrize(
    ("points", "reason"), [((0, 1, 2), "on a line"), ((0, 0, 2), "the same"), ((0, 2, 0), "line")]
)
def test_plane_refuses_points_without_one(tmp_path, points, reason):
    line = torch.tensor([[1.0, 1.0], [2.0, 3.0], [4.0, 7.0]])
    with pytest.raises(UsageError, match=reason):
        plane_through(geometry_of(tmp_path / "run", line), unit(3, *points))


def test_principal_plane_is_that_of_the_singular_value_decomposition(tmp_path):
    vectors = torch.randn(8, 30, generator=torch.Generator().manual_seed(2)).double()
    plane = principal_plane(geometry_of(tmp_path / "run", vectors))
    centered = vectors - vectors.mean(0)
    _, singular, rows = torch.linalg.svd(centered, full_matrices=False)
    shares = singular**2 / (singular**2).sum()
    assert plane.explained == pytest.approx((float(shares[0]), float(shares[1])))
    for axis, row in ((plane.u, rows[0]), (plane.v, rows[1])):
        direction = axis @ vectors
        assert abs(float(direction @ row)) == pytest.approx(1)
        assert float(direction @ centered[-1]) > 0


def test_principal_plane_needs_two_directions(tmp_path):
    line = torch.tensor([[1.0, 1.0], [2.0, 3.0], [4.0, 7.0]])
    with pytest.raises(UsageError, match="on a line"):
        principal_plane(geometry_of(tmp_path / "run", line))
