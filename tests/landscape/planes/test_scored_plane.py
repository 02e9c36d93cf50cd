"""Scored planes, against ``evaluate`` and against networks that are built by hand."""

import math

import pytest
import torch
from landscapes import Net, data_of, metrics_at, network_at, norm_of, save_run, state_of, weights_at

import ckptavg
from ckptavg import Candidate, evaluate, open_run
from ckptavg.errors import CkptavgError, UsageError
from ckptavg.landscape import points as points_module
from ckptavg.landscape.landscape import Landscape

TRAIN, TEST = data_of(1, 96), data_of(2)
DECAY = 0.1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("plane") / "run")


@pytest.fixture(scope="module")
def landscape(run):
    return ckptavg.plane(run, Net(), TEST, train_data=TRAIN, points=4, weight_decay=DECAY)


def test_plane_has_the_exact_scores_of_all_checkpoints(run, landscape):
    for data, name in ((TEST, "data"), (TRAIN, "train")):
        wanted = evaluate(run, Net(), data)
        for mark, result in zip(landscape.checkpoints, wanted, strict=True):
            metrics = dict(getattr(mark, name))
            metrics.pop("l2_loss", None)
            assert metrics == result.metrics
    facts = [(mark.path, mark.step, mark.lr) for mark in landscape.checkpoints]
    assert facts == [(str(c.path), c.step, pytest.approx(0.1 / c.step)) for c in run]


def test_plane_has_the_average_with_recomputed_statistics(run, landscape):
    average = Candidate.of_average(run, recompute=True)
    (wanted,) = evaluate([average], Net(), TEST, train_loader=TRAIN)
    assert landscape.averages[0].data == pytest.approx(dict(wanted.metrics))


def test_plane_has_corners_on_it_and_others_off_it(run, landscape):
    first, second, third, fourth, fifth = landscape.checkpoints
    assert [mark.distance for mark in (first, third, fifth)] == [0, 0, 0]
    assert (first.x, first.y, third.y) == (0, 0, 0)
    assert fifth.y > 0
    # The distance off the plane by least squares on whole vectors.
    vectors = []
    for checkpoint in run:
        state = torch.load(checkpoint.path, weights_only=True)["state_dict"]
        weights = [value for name, value in state.items() if "running" not in name]
        vectors.append(torch.cat([w.double().flatten() for w in weights if w.is_floating_point()]))
    plane = torch.stack((vectors[2] - vectors[0], vectors[4] - vectors[0]), 1)
    for mark, vector in ((second, vectors[1]), (fourth, vectors[3])):
        solution = torch.linalg.lstsq(plane, (vector - vectors[0])[:, None]).solution
        rest = vector - vectors[0] - (plane @ solution)[:, 0]
        assert mark.distance == pytest.approx(float(rest.norm()))


def test_plane_holds_all_marks_within_its_grid(landscape):
    for axis in ("x", "y"):
        marks = [getattr(mark, axis) for mark in (*landscape.checkpoints, *landscape.averages)]
        grid = sorted({getattr(point, axis) for point in landscape.points})
        extent = max(marks) - min(marks)
        assert grid[0] == pytest.approx(min(marks) - 0.2 * extent)
        assert grid[-1] == pytest.approx(max(marks) + 0.2 * extent)
        assert len(grid) == 4
    assert [(p.y, p.x) for p in landscape.points] == sorted((p.y, p.x) for p in landscape.points)
    assert landscape.facts["shape"] == [4, 4]


def test_plane_points_are_scored_with_weights_and_statistics_of_their_own(run, landscape):
    for point in landscape.points[::5]:
        net = network_at(run, point.coefficients, TRAIN)
        for key, value in metrics_at(net, TEST).items():
            assert point.data[key] == pytest.approx(value, abs=1e-4)
        loss = metrics_at(net, TRAIN)["nll"] + DECAY / 2 * norm_of(net)
        assert point.train["l2_loss"] == pytest.approx(loss, abs=1e-4)
        low, high = point.interval["top1"]
        assert low < point.data["top1"] < high


def test_plane_axes_are_lengths_in_weight_space(run, landscape):
    """Points of the grid are as far from each other as their weights are."""
    vectors = []
    for point in (landscape.points[0], landscape.points[-1]):
        parameters = network_at(run, point.coefficients, None).parameters()
        vectors.append(torch.cat([p.detach().double().flatten() for p in parameters]))
    first, last = landscape.points[0], landscape.points[-1]
    wanted = math.hypot(last.x - first.x, last.y - first.y)
    assert float((vectors[1] - vectors[0]).norm()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("through", "names", "on_plane"),
    [
        (("step_2", "step_3.pt", "average"), ["step_2.pt", "step_3.pt", "average"], {2, 3}),
        ((0, -1, "middle"), ["step_1.pt", "step_5.pt", "middle"], {1, 3, 5}),
    ],
    ids=["average", "positions"],
)
def test_plane_goes_through_points_by_name(run, through, names, on_plane):
    landscape = ckptavg.plane(run, Net(), TEST, train_data=TRAIN, points=2, through=through)
    assert landscape.facts["through"] == names
    steps = {mark.step for mark in landscape.checkpoints if mark.distance == 0}
    assert steps == on_plane
    assert (landscape.averages[0].distance == 0) == ("average" in through)


def test_plane_goes_through_another_run(run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for step in (1, 2):
        torch.save({"state_dict": state_of(90 + step), "step": step}, other / f"s_{step}.pt")
    through = ("first", "last", str(other))
    landscape = ckptavg.plane(run, Net(), TEST, train_data=TRAIN, points=2, through=through)
    assert len(landscape.checkpoints) == 6
    assert landscape.checkpoints[-1].path.endswith("s_2.pt")
    wanted = evaluate([other / "s_2.pt"], Net(), TEST)[0]
    assert landscape.checkpoints[-1].data == wanted.metrics
    # The average is that of the run alone.
    assert landscape.averages[0].coefficients == (0.2,) * 5 + (0.0,)


def test_plane_that_is_interrupted_is_a_coarse_picture(run, tmp_path, monkeypatch):
    path = tmp_path / "plane.json"
    monkeypatch.setattr(points_module, "_FIRST_PASS", 13)
    save = Landscape.save

    def interrupt(self, path):
        save(self, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Landscape, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ckptavg.plane(run, Net(), TEST, train_data=TRAIN, points=5, results=path)
    coarse = Landscape.load(path)
    assert len(coarse.points) == 9
    assert coarse.averages[0].data
    whole = ckptavg.plane(run, Net(), TEST, train_data=TRAIN, points=5, results=path, resume=True)
    assert len(whole.points) == 25
    for axis in ("x", "y"):
        ends = [{getattr(p, axis) for p in each.points} for each in (coarse, whole)]
        assert (min(ends[0]), max(ends[0])) == (min(ends[1]), max(ends[1]))
    assert whole.notes == Landscape.load(path).notes
    assert "13 of 31 points are in" in "".join(whole.notes)


def test_plane_without_training_data_says_that_statistics_are_stale(run):
    landscape = ckptavg.plane(run, Net(), TEST, points=2)
    assert landscape.points[0].train is None
    assert any("stale" in note for note in landscape.notes)


class Limited(Net):
    """Gives NaN far from the origin."""

    def forward(self, x):
        outputs = super().forward(x)
        if self.head.weight.norm() > 2.5:
            return outputs + math.nan
        return outputs


def test_plane_has_holes_with_a_note(run):
    landscape = ckptavg.plane(run, Limited(), TEST, train_data=TRAIN, points=4)
    holes = [math.isnan(point.data["top1"]) for point in landscape.points]
    far = []
    for point in landscape.points:
        head = weights_at(run, point.coefficients)["head.weight"]
        far.append(float(head.norm()) > 2.5)
    assert holes == far
    assert 0 < sum(far) < 16
    assert any(note.startswith(f"{sum(far)} of 22 points are holes") for note in landscape.notes)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"through": ("frist", "middle", "last")}, "no point is called 'frist'"),
        ({"through": ("first", "last")}, "name three points but got"),
        ({"through": "first"}, "name three points but got"),
        ({"through": ("first", 0, "last")}, "first and step_1.pt"),
        ({"through": (0, 1, 9)}, "none at position 9"),
        ({"through": ("first", "last", None)}, "is expected to be a name"),
        ({"points": 1}, "points"),
        ({"margin": -1}, "margin"),
        ({"results": "r.csv"}, "json or .npz"),
        ({"results": "none/r.json"}, "the directory none does not exist"),
        ({"resume": True}, "needs a `results` file"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_plane_refuses_arguments_before_any_work(run, monkeypatch, arguments, reason):
    def measure(run):
        raise AssertionError("the weights are read")

    monkeypatch.setattr("ckptavg.landscape.planes.scored_plane.geometry", measure)
    with pytest.raises(CkptavgError, match=reason):
        ckptavg.plane(run, Net(), TEST, **({"train_data": TRAIN} | arguments))


@pytest.mark.parametrize("function", [ckptavg.plane, ckptavg.pca])
@pytest.mark.parametrize("count", [1, 2])
def test_plane_needs_three_checkpoints(run, function, count):
    with pytest.raises(UsageError, match=f"but the run has {count} checkpoint"):
        function(run.last(count), Net(), TEST)


def test_plane_refuses_a_line(tmp_path):
    (tmp_path / "line").mkdir()
    base, way = state_of(1), state_of(2)
    for step in range(3):
        state = {k: base[k] + step * way[k] for k in base if base[k].is_floating_point()}
        torch.save({"state_dict": state, "step": step}, tmp_path / "line" / f"s_{step}.pt")
    for function in (ckptavg.plane, ckptavg.pca):
        with pytest.raises(UsageError, match="on a line"):
            function(open_run(tmp_path / "line"), Net(), TEST)


def test_plane_is_printed_as_a_table_of_marked_points(landscape):
    assert repr(landscape) == (
        "<Landscape of kind plane: 16 points, 6 marked checkpoints and averages>"
    )
    title, columns, _, *rows = str(landscape).splitlines()
    assert title == "plane of 16 points; marked points"
    assert columns.split()[:5] == ["point", "step", "x", "y", "distance"]
    names = [f"step_{step}.pt" for step in range(1, 6)]
    assert [row.split()[0] for row in rows if row] == [*names, "average"]
    mark = landscape.checkpoints[2]
    assert rows[2].split()[-1] == f"{mark.train['l2_loss']:.4f}"


def test_pca_is_centred_at_the_average(run):
    landscape = ckptavg.pca(run, Net(), TEST, train_data=TRAIN, points=3)
    average = landscape.averages[0]
    assert (average.x, average.y) == pytest.approx((0, 0), abs=1e-9)
    first, second = landscape.facts["explained"]
    assert 0 < second < first < 1
    spread = [sum(getattr(m, axis) ** 2 for m in landscape.checkpoints) for axis in ("x", "y")]
    off = sum(mark.distance**2 for mark in landscape.checkpoints)
    assert spread[0] / (sum(spread) + off) == pytest.approx(first)
    assert landscape.kind == "pca"
