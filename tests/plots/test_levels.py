"""Levels of contours against the code that Garipov et al. published."""

import math
import random

import numpy as np
import pytest

from ckptavg.plots.figures.levels import choose_levels, log_levels


def published_levels(values, vmax, log_alpha, count=7):
    """The levels of plane_plot.py in timgaripov/dnn-mode-connectivity."""
    clipped = np.minimum(values, vmax)
    log_gamma = (np.log(clipped.max() - clipped.min()) - log_alpha) / count
    levels = clipped.min() + np.exp(log_alpha + log_gamma * np.arange(count + 1))
    levels[0] = clipped.min()
    return levels


@pytest.mark.parametrize(("vmax", "log_alpha"), [(5.0, -5.0), (40.0, -1.0)])
def test_log_levels_are_those_of_the_published_code(vmax, log_alpha):
    values = np.random.default_rng(0).uniform(0.02, 90, 400)
    expected = published_levels(values, vmax, log_alpha)
    low = float(values.min())
    assert log_levels(low, vmax, log_alpha) == pytest.approx(expected.tolist(), rel=1e-12)


def test_levels_resolve_the_marked_points():
    values = [5 + (number / 10) ** 2 for number in range(300)]
    levels = choose_levels(values, [5.5, 6.0, 9.0])
    assert levels.values[0] == 5
    # The lower quartile of the values is above three times the height of the marks.
    assert levels.values[-1] == values[75]
    assert levels.capped
    assert (np.diff(np.diff(levels.values)) > -1e-9).all()
    assert sum(level < 9 for level in levels.values) >= 4


def test_levels_are_capped_above_the_marks():
    values = [float(number) for number in range(100)]
    assert choose_levels(values, [20.0]).values[-1] == pytest.approx(60)
    assert choose_levels(values, [40.0]) == choose_levels(values, [])


def test_levels_are_no_closer_than_values_can_be():
    # Errors on 800 samples, of which many points share the lowest.
    values = [3.5] * 20 + [3.5 + 0.125 * number for number in range(80)]
    assert choose_levels(values, []).values[1] < 3.55
    assert choose_levels(values, [], resolution=0.125).values[1] == pytest.approx(3.625)


def test_levels_without_marks_reach_the_maximum():
    levels = choose_levels([1.0, 2.0, 5.0], [])
    assert (levels.values[0], levels.values[-1], levels.capped) == (1.0, 5.0, False)


def test_levels_of_a_flat_surface_are_one():
    assert choose_levels([0.1 + 0.2, 0.3], [0.3]).values == (0.3,)
    assert choose_levels([7.0], []).values == (7.0,)


def test_levels_rise_whatever_the_values():
    noise = random.Random(0)
    for _ in range(200):
        scale = 10 ** noise.uniform(-30, 30)
        values = [scale * noise.gauss(0, 1) ** 3 for _ in range(noise.randint(2, 40))]
        marks = [scale * noise.gauss(0, 1) for _ in range(noise.randint(0, 3))]
        levels = choose_levels(values, marks).values
        assert all(math.isfinite(level) for level in levels)
        assert list(levels) == sorted({*levels})
        assert len(levels) > 1
