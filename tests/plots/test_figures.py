"""Figures: their panels, labels, legends, and the data on them."""

import math
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from sample_landscapes import (
    SAMPLES,
    curve,
    ensemble,
    geometry,
    mark,
    plane,
    rays,
    reliability,
    segment,
    two_runs,
)

from ckptavg.errors import EvaluationError, SpecError, UsageError
from ckptavg.tasks import Metric

LINES = ("checkpoints", "running average", "average of the last 5")


def legend_texts(figure):
    """The entries of the only legend, and its title."""
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()


def line_on(panel, x, y):
    """The line on a panel that has exactly these data."""
    wanted = np.array([x, y], dtype=float)
    for line in panel.lines:
        data = np.array([line.get_xdata(), line.get_ydata()], dtype=float)
        if data.shape == wanted.shape and np.allclose(data, wanted, rtol=1e-12, equal_nan=True):
            return line
    raise AssertionError("no line has these data")


def settings():
    """All settings of matplotlib but the backend, which reading it chooses."""
    return {name: mpl.rcParams[name] for name in mpl.rcParams if name != "backend"}


def bar_labels(figure, panel):
    figure.draw_without_rendering()
    return [text.get_text() for text in panel.child_axes[0].get_yticklabels()]


def test_plane_shows_training_loss_and_evaluation_error():
    landscape = plane()
    figure, (loss, error) = landscape.plot()
    assert loss.get_title(loc="left") == "loss with L2 term (nats), training data"
    assert error.get_title(loc="left") == "top-1 error (%), evaluation data"
    for panel in (loss, error):
        assert panel.get_xlabel().replace("\n", " ") == landscape.axes[0]
        assert panel.get_aspect() == 1.0
    assert loss.get_ylabel().replace("\n", " ") == landscape.axes[1]
    texts, title = legend_texts(figure)
    assert title.startswith("Exact values: loss with L2 term (nats), training data; top-1 error")
    average = landscape.averages[0]
    expected = f"{average.train['l2_loss']:.4f} nats; {100 - average.data['top1']:.2f} %"
    assert f"average: {expected}" in texts
    assert sum("epoch" in text for text in texts) == 3


def test_plane_corners_bear_the_words_that_name_them():
    landscape = plane()
    facts = {**landscape.facts, "through": ["first", "epoch_185.pt", "last"]}
    figure, _ = replace(landscape, facts=facts).plot()
    names = [text.partition(":")[0] for text in legend_texts(figure)[0]]
    assert names[:4] == ["first (epoch_160.pt)", "epoch_185.pt", "last (epoch_210.pt)", "average"]


def test_plane_marks_stand_at_their_coordinates():
    landscape = plane()
    _, (_, error) = landscape.plot()
    for corner in (*(m for m in landscape.checkpoints if m.distance == 0), *landscape.averages):
        line_on(error, [corner.x], [corner.y])
    line_on(error, [m.x for m in landscape.checkpoints], [m.y for m in landscape.checkpoints])


def test_plane_dots_shrink_with_the_distance_off_the_plane():
    landscape = plane()
    _, (_, error) = landscape.plot()
    others = [other for other in landscape.checkpoints if other.distance > 0]
    places = [(other.x, other.y) for other in others]
    (dots,) = [c for c in error.collections if np.array_equal(c.get_offsets(), places)]
    distances = [other.distance for other in others]
    assert (np.argsort(distances) == np.argsort(-dots.get_sizes())).all()


def test_plane_colour_bar_says_where_it_is_capped():
    landscape = plane()
    figure, (_, error) = landscape.plot()
    lowest = min(100 - point.data["top1"] for point in landscape.points)
    labels = bar_labels(figure, error)
    assert float(labels[0]) == pytest.approx(lowest, rel=1e-2)
    assert not labels[-1].startswith(">")
    marks = tuple(replace(other, data={"top1": 92.0}) for other in landscape.checkpoints)
    figure, (_, error) = replace(landscape, checkpoints=marks, averages=()).plot()
    ordered = sorted(100 - point.data["top1"] for point in landscape.points)
    cap = max(lowest + 3 * (8 - lowest), ordered[len(ordered) // 4])
    assert bar_labels(figure, error)[-1] == f"> {cap:.3g}"


def test_plane_without_training_data_shows_the_evaluation_loss():
    _, (loss, _) = plane(train=False).plot()
    assert loss.get_title(loc="left") == "NLL (nats), evaluation data"


def test_plane_holes_are_hatched_and_counted():
    figure, (loss, error) = plane(holes=[(3, 4), (3, 5)]).plot()
    for panel in (loss, error):
        assert [patch.get_hatch() for patch in panel.patches] == ["////"]
    assert "no finite value (2 points)" in legend_texts(figure)[0]
    _, (loss, _) = plane().plot()
    assert not loss.patches


@pytest.mark.parametrize("count", [1, 2, 5, 14])
def test_plane_unfinished_grid_draws(count):
    figure, _ = plane(unfinished=count).plot()
    figure.draw_without_rendering()


def test_plane_of_holes_alone_draws():
    holes = [(row, column) for row in range(4) for column in range(4)]
    figure, _ = plane(size=4, holes=holes).plot()
    assert "no finite value (16 points)" in legend_texts(figure)[0]


@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e250])
def test_plane_draws_equal_and_huge_values(factor):
    landscape = plane(size=5)
    points = []
    for point in landscape.points:
        loss = 1 + factor * point.train["l2_loss"]
        points.append(replace(point, data={"top1": 50.0}, train={"l2_loss": loss}))
    figure, (_, error) = replace(landscape, points=tuple(points)).plot()
    figure.draw_without_rendering()
    assert error.get_title(loc="right") == "50.00 % everywhere"


def test_curve_lines_are_the_points():
    landscape = curve()
    figure, (error, loss, rate) = landscape.plot()
    assert (error.get_ylabel(), loss.get_ylabel()) == ("top-1 error (%)", "NLL (nats)")
    assert (rate.get_ylabel(), rate.get_xlabel()) == ("learning rate", "step")
    for name in LINES:
        points = [point for point in landscape.points if point.series == name]
        x = [point.x for point in points]
        line = line_on(error, x, [100 - point.data["top1"] for point in points])
        dashed = line_on(error, x, [100 - point.train["top1"] for point in points])
        line_on(loss, x, [point.data["nll"] for point in points])
        assert line.get_color() == dashed.get_color()
        assert dashed.get_linestyle() == "--"
    line_on(rate, [m.x for m in landscape.checkpoints], [m.lr for m in landscape.checkpoints])
    texts, _ = legend_texts(figure)
    assert texts == [*LINES, "95 % intervals", "on training data"]


def test_curve_bands_are_the_intervals():
    landscape = curve(3)
    _, (error, *_) = landscape.plot()
    point = next(p for p in landscape.points if p.series == "checkpoints")
    low, high = point.interval["top1"]
    band = error.collections[0].get_paths()[0].vertices
    at_first = band[band[:, 0] == point.x, 1]
    assert (at_first.min(), at_first.max()) == pytest.approx((100 - high, 100 - low))


def test_curve_of_several_runs_has_a_colour_per_run_and_dashes_per_line():
    landscape = two_runs()
    figure, (error, _, _) = landscape.plot()
    looks = {}
    for series in {point.series for point in landscape.points}:
        points = [point for point in landscape.points if point.series == series]
        line = line_on(error, [p.x for p in points], [100 - p.data["top1"] for p in points])
        run, _, kind = series.partition(": ")
        looks[run, kind] = (line.get_color(), line.get_marker(), line._unscaled_dash_pattern)
    for kind in LINES:
        assert looks["constant", kind][2] == looks["cyclical", kind][2]
        assert looks["constant", kind][0] != looks["cyclical", kind][0]
        assert looks["constant", kind][1] != looks["cyclical", kind][1]
    assert looks["constant", LINES[0]][2] != looks["constant", LINES[1]][2]
    assert legend_texts(figure)[0][:5] == ["constant", "cyclical", *LINES]


def test_segment_barrier_is_above_the_straight_line():
    figure, (loss, error) = segment().plot()
    # Both sines are 1 in the middle of the straight line between the ends.
    assert loss.get_title(loc="right") == "barrier 0.2000 nats"
    assert error.get_title(loc="right") == "barrier 6.00 percentage points"
    assert loss.get_xlabel() == "t, from last (0) to average (1)"
    (height,) = error.texts
    assert (*height.xyann, *height.xy) == pytest.approx((0.5, (9 + 5) / 2, 0.5, 13))
    assert error.get_ylabel() == "top-1 error (%), evaluation data"
    texts, _ = legend_texts(figure)
    assert texts == ["epoch_200.pt: 0.1500 nats; 9.00 %", "average: 0.1800 nats; 5.00 %"]


def test_segment_mark_off_the_line_is_explained():
    landscape = segment()
    (other, first) = landscape.checkpoints
    moved = replace(first, data={"top1": first.data["top1"] - 0.5})
    note = "off the line: a checkpoint with BatchNorm statistics of its own"
    figure, _ = landscape.plot()
    assert note not in legend_texts(figure)[0]
    figure, _ = replace(landscape, checkpoints=(other, moved)).plot()
    assert note in legend_texts(figure)[0]


def test_segment_without_barrier_says_so():
    _, (loss, error) = segment(barrier=False, beyond=4).plot()
    assert loss.get_title(loc="right") == error.get_title(loc="right") == "no barrier"


def test_segment_holes_are_hatched():
    _, (loss, error) = segment(holes=(4,)).plot()
    assert loss.get_title(loc="right") == error.get_title(loc="right") == "barrier: not finite"
    (hole,) = error.patches
    assert hole.get_hatch() == "////"
    assert (hole.get_x(), hole.get_width()) == pytest.approx((0.175, 0.05))


def test_rays_show_widths_at_the_risen_loss():
    landscape = rays()
    figure, (loss, error) = landscape.plot()
    assert loss.get_ylabel() == "NLL (nats), training data"
    assert error.get_ylabel() == "top-1 error (%), evaluation data"
    for width in landscape.facts["widths"]:
        center = [point for point in landscape.points if point.series == width["center"]]
        line_on(loss, [width["mean"]], [center[0].train["nll"] + 0.1])
        mean = line_on(loss, [p.x for p in center], [p.train["nll"] for p in center])
        ray = [p for p in landscape.points if p.series == f"{width['center']}, direction 3"]
        thin = line_on(loss, [p.x for p in ray], [p.train["nll"] for p in ray])
        assert thin.get_color() == mean.get_color()
        assert thin.get_linewidth() < mean.get_linewidth()
    width = landscape.facts["widths"][0]
    texts, _ = legend_texts(figure)
    ends = f"{width['low']:.3g} to {width['high']:.3g}"
    assert texts[0] == f"average, mean of 10 directions; width {width['mean']:.3g} ({ends})"
    assert "width: loss risen by 0.1 nats" in texts


def test_rays_without_widths_draw():
    landscape = rays()
    facts = {**landscape.facts, "rise": None, "widths": []}
    figure, _ = replace(landscape, facts=facts).plot()
    assert "average, mean of 10 directions" in legend_texts(figure)[0]


def test_ensemble_panels_have_scores_and_distances_of_outputs():
    landscape = ensemble()
    figure, (error, loss, outputs) = landscape.plot()
    assert outputs.get_ylabel().replace("\n", " ") == "mean L2 distance of outputs"
    assert error.get_xlabel() == "number of checkpoints"
    for series in ("average", "ensemble"):
        points = [point for point in landscape.points if point.series == series]
        line_on(error, [p.x for p in points], [100 - p.data["top1"] for p in points])
        line_on(loss, [p.x for p in points], [p.data["nll"] for p in points])
    gaps = [point.data.get("output_gap", math.nan) for point in points]
    line_on(outputs, [p.x for p in points], gaps)
    assert outputs.get_ylim()[1] > 0.35
    assert "single checkpoint's outputs to the average's" in legend_texts(figure)[0]


def test_reliability_bars_are_the_counts():
    landscape = reliability()
    figure, (diagram, counts) = landscape.plot()
    assert (diagram.get_ylabel(), counts.get_xlabel()) == ("share that is right", "confidence")
    points = [point for point in landscape.points if point.series == "average"]
    line_on(diagram, [point.x for point in points], [point.y for point in points])
    line_on(diagram, [1 / 15, 1], [1 / 15, 1])
    bars = counts.containers[1]
    assert [bar.get_height() for bar in bars] == [point.data["n"] for point in points]
    for bar, point in zip(bars, points, strict=True):
        # Each bar stands within its bin of 15.
        assert int(bar.get_x() * 15) == int((bar.get_x() + bar.get_width()) * 15)
        assert int(bar.get_x() * 15) == int(point.x * 15)
    assert "average: ECE 0.0200" in legend_texts(figure)[0]


def test_geometry_panels_have_the_series():
    landscape = geometry()
    _, panels = landscape.plot()
    labels = [panel.get_ylabel() for panel in panels]
    assert labels == ["distance in weight space", "norm of the weights",
                      "cosine of successive steps", "checkpoint"]  # fmt: skip
    for panel, name in zip(panels, ("to mean", "norm", "cosine"), strict=False):
        points = [point for point in landscape.points if point.series == name]
        line_on(panel, [point.x for point in points], [point.y for point in points])
    matrix = np.array(landscape.facts["distances"])
    shown = panels[3].images[0].get_array()
    off_diagonal = ~np.eye(len(matrix), dtype=bool)
    assert (shown[off_diagonal] == matrix[off_diagonal]).all()


@pytest.mark.parametrize("name", SAMPLES)
def test_figure_is_labelled(name):
    _, panels = SAMPLES[name]().plot()
    if not isinstance(panels, tuple):
        panels = (panels,)
    assert all(panel.get_ylabel() or panel.get_title(loc="left") for panel in panels)
    assert panels[-1].get_xlabel()


def test_figure_draws_on_given_axes():
    figure = Figure()
    axes = figure.subplots(1, 2)
    returned, panels = plane(size=4).plot(axes)
    assert (returned, panels) == (figure, tuple(axes))
    assert axes[1].get_legend() is not None
    assert not figure.legends
    figure.draw_without_rendering()
    # The legend covers no panel.
    legend = axes[1].get_legend().get_window_extent()
    assert not any(legend.overlaps(panel.get_window_extent()) for panel in axes)


def test_figure_refuses_other_axes():
    axes = Figure().subplots()
    with pytest.raises(UsageError, match="has 2 panels here, but 1 axes"):
        plane(size=4).plot(axes)
    with pytest.raises(UsageError, match="axes of matplotlib"):
        plane(size=4).plot("axes")
    with pytest.raises(EvaluationError, match="no point"):
        replace(plane(), points=()).plot()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$x_{", "$x_{: "),
        ("_hidden.pt", " _hidden.pt: "),
        ("a\nb\x1b[31m", r"a b\x1b[31m: "),
        ("\udcff", r"\udcff: "),
        ("µ" * 300, "µµµ"),
        ("", ": "),
    ],
    ids=["mathtext", "underscore", "control", "surrogate", "long", "empty"],
)
def test_figure_takes_names_as_text(name, shown):
    landscape = plane(size=4)
    scores = {"top1": 90.0}, {"l2_loss": 1.0}
    average = mark(name, 1.0, 1.0, 0.0, scores)
    figure, _ = replace(landscape, checkpoints=(), averages=(average,)).plot()
    figure.draw_without_rendering()
    texts, _ = legend_texts(figure)
    assert len(texts) == 1
    assert texts[0].startswith(shown)
    assert len(texts[0]) < 60


def test_figure_takes_titles_and_units_of_metrics_as_text():
    odd = Metric("x", "100 $", ".1f", None, "$_{")
    points = []
    for point in segment().points:
        points.append(replace(point, data={"x": point.x}, train=None, interval={}))
    barrier = {"metric": "x", "unit": "$_{", "data": "evaluation data", "height": 1.0, "at": 0.5}
    landscape = replace(segment(), metrics=(odd,), points=tuple(points), checkpoints=())
    figure, panel = replace(landscape, facts={"barriers": [barrier]}, averages=()).plot()
    figure.draw_without_rendering()
    assert panel.get_ylabel() == "100 $ ($_{), evaluation data"
    assert panel.get_title(loc="right") == "barrier 1.0 $_{"


def test_figure_leaves_nothing_behind(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    with mpl.rc_context({"font.size": 33, "axes.facecolor": "black", "text.usetex": True}):
        before = settings()
        figure, _ = curve(4).plot()
        assert settings() == before
    assert figure.axes[0].get_facecolor() == (1, 1, 1, 1)
    assert "matplotlib.pyplot" not in sys.modules


def test_figure_without_matplotlib_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ckptavg.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SpecError, match=r'pip install "ckptavg\[plot\]"') as caught:
        plane(size=4).plot()
    assert "\n" not in str(caught.value)
    assert plane(size=4)._repr_png_() is None


def test_figure_says_what_was_not_scored():
    landscape = plane(size=4)
    average = replace(landscape.averages[0], data={}, train={"l2_loss": math.inf})
    figure, _ = replace(landscape, averages=(average,)).plot()
    assert "average: not finite; not scored" in legend_texts(figure)[0]


def test_figure_draws_in_a_part_of_a_figure():
    figure = Figure()
    part = figure.subfigures(1, 2)[0]
    returned, panels = segment().plot(part.subplots(1, 2))
    assert returned is figure
    assert panels[0].figure is part
