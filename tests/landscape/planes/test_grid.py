"""Grids and the order of their points."""

import math
from itertools import pairwise

import pytest

from ckptavg.errors import UsageError
from ckptavg.landscape.planes.grid import Grid, check_grid


def test_grid_holds_its_positions_with_a_margin():
    grid = Grid.around([(0.0, -1.0), (4.0, 1.0), (1.0, 0.0)], 5, 0.25)
    assert grid.x == pytest.approx((-1.0, 0.5, 2.0, 3.5, 5.0))
    assert grid.y == pytest.approx((-1.5, -0.75, 0.0, 0.75, 1.5))


@pytest.mark.parametrize("points", [2, 3, 4, 9, 20, 21])
def test_grid_has_every_point_once_in_either_order(points):
    grid = Grid.around([(0.0, 0.0), (1.0, 2.0)], points, 0.0)
    by_rows, by_level = list(grid.by_rows()), list(grid.coarse_to_fine())
    assert len(by_level) == points**2
    assert sorted(by_level) == sorted(by_rows)
    assert by_rows[:2] == [(grid.x[0], grid.y[0]), (grid.x[1], grid.y[0])]


@pytest.mark.parametrize("points", [3, 9, 20, 21])
def test_grid_begins_with_a_coarse_picture_of_the_whole(points):
    grid = Grid.around([(0.0, 0.0), (1.0, 1.0)], points, 0.0)
    order = list(grid.coarse_to_fine())
    middle = grid.x[(points - 1) // 2]
    assert {x for x, _ in order[:9]} == {y for _, y in order[:9]} == {0.0, middle, 1.0}
    # 2ᵏ + 1 points a side, as long as the grid is finer.
    size = 5
    while size < points:
        columns = sorted({x for x, _ in order[: size**2]})
        assert len(columns) == size
        gaps = [b - a for a, b in pairwise(columns)]
        assert max(gaps) - min(gaps) <= 1 / (points - 1) + 1e-9
        size = 2 * size - 1


@pytest.mark.parametrize(
    ("points", "margin", "reason"),
    [
        (1, 0.2, "points"), (2.0, 0.2, "points"), (True, 0.2, "points"), (3, -0.1, "margin"),
        (3, math.nan, "margin"), (3, math.inf, "margin"), (3, "wide", "margin"),
    ],
)  # fmt: skip
def test_grid_refuses_numbers_that_make_none(points, margin, reason):
    with pytest.raises(UsageError, match=reason):
        check_grid(points, margin)
