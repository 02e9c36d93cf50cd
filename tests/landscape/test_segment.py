"""Segments between two points, against networks and losses by hand."""

import math

import pytest
import torch
from landscapes import Net, data_of, metrics_at, network_at, norm_of, save_run
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, evaluate, segment
from ckptavg.errors import UsageError
from ckptavg.landscape.landscape import Landscape, Point
from ckptavg.landscape.lines.barrier import measure_barriers
from ckptavg.tasks import Metric

TRAIN, TEST = data_of(1, 96), data_of(2)
AVERAGE = (0.2,) * 5
LAST = (0.0, 0.0, 0.0, 0.0, 1.0)


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


def by_t(landscape):
    return {round(point.x, 9): point for point in landscape.points}


def test_segment_points_are_networks_by_hand(run):
    landscape = segment(run, Net(), TEST, train_data=TRAIN, points=5, batch_size=32)
    points = by_t(landscape)
    assert list(points) == [-0.25, 0, 0.25, 0.5, 0.75, 1, 1.25]
    for t in (-0.25, 0.5, 1.25):
        weights = tuple((1 - t) * a + t * b for a, b in zip(AVERAGE, LAST, strict=True))
        assert points[t].coefficients == pytest.approx(weights)
        net = network_at(run, weights, TRAIN)
        for scores, data in ((points[t].data, TEST), (points[t].train, TRAIN)):
            for key, value in metrics_at(net, data).items():
                assert scores[key] == pytest.approx(value, abs=1e-5)


def test_segment_ends_are_those_of_evaluate(run):
    landscape = segment(run, Net(), TEST, train_data=TRAIN, points=2, beyond=0)
    recomputed = evaluate(
        [
            Candidate.of_average(run, recompute=True),
            Candidate.of_checkpoint(run[-1], recompute=True),
            Candidate.of_checkpoint(run[-1], recompute=False),
        ],
        Net(), TEST, train_loader=TRAIN,
    )  # fmt: skip
    points = by_t(landscape)
    assert points[0].data == recomputed[0].metrics
    assert points[1].data == recomputed[1].metrics
    (average,) = landscape.averages
    assert (average.name, average.x, average.data) == ("average", 0, recomputed[0].metrics)
    last = landscape.checkpoints[-1]
    # A checkpoint's own statistics are those of its training.
    assert (last.name, last.data) == ("last, its own statistics", recomputed[2].metrics)
    assert last.x == pytest.approx(1)
    assert points[1].data["nll"] != last.data["nll"]


def test_segment_without_training_data_keeps_statistics(run):
    landscape = segment(run, Net(), TEST, ends=("first", "last"), points=2, beyond=0)
    scored = evaluate([run[0], run[-1]], Net(), TEST)
    assert [point.data for point in landscape.points] == [r.metrics for r in scored]
    assert all(point.train is None for point in landscape.points)


def test_segment_has_distances_in_weight_space(run):
    landscape = segment(run, Net(), TEST, points=2, beyond=0)
    names = [name for name, _ in Net().named_parameters()]
    vectors = []
    for checkpoint in run:
        state = torch.load(checkpoint.path, weights_only=True)["state_dict"]
        vectors.append(torch.cat([state[name].double().flatten() for name in names]))
    mean = torch.stack(vectors).mean(0)
    step = vectors[-1] - mean
    assert landscape.facts["distance"] == pytest.approx(float(step.norm()))
    for mark, vector in zip(landscape.checkpoints, vectors, strict=True):
        t = float((vector - mean) @ step / step.square().sum())
        assert mark.x == pytest.approx(t, abs=1e-9)
        off = float((vector - mean - t * step).norm())
        assert mark.distance == pytest.approx(off, abs=1e-6)


def test_segment_loss_with_weight_decay_has_the_l2_term(run):
    landscape = segment(run, Net(), TEST, train_data=TRAIN, points=3, beyond=0, weight_decay=0.5)
    middle = by_t(landscape)[0.5]
    norm = norm_of(network_at(run, middle.coefficients, None))
    assert middle.train["l2_loss"] - middle.train["nll"] == pytest.approx(0.25 * norm)
    assert "l2_loss" in {barrier["metric"] for barrier in landscape.facts["barriers"]}


class Well(nn.Module):
    """w² x, whose mean squared error against x is the double well mean(x²) (w² − 1)²."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        return x * self.w.square()


def well(directory, values):
    directory.mkdir()
    for index, value in enumerate(values):
        torch.save({"w": torch.full((1, 1), value)}, directory / f"epoch_{index}.pt")
    return directory


X = torch.tensor([[1.0], [2.0], [3.0]])
WELL_DATA = TensorDataset(X, X)
SQUARE = 14 / 3


def test_segment_barrier_of_a_double_well_by_hand(tmp_path):
    run = well(tmp_path / "run", [-1.0, 1.0])
    landscape = segment(
        run, Well(), WELL_DATA, ends=("first", "last"), points=5, beyond=0.5, task="regression"
    )
    points = by_t(landscape)
    for t, point in points.items():
        w = 2 * t - 1
        assert point.data["mse"] == pytest.approx(SQUARE * (w**2 - 1) ** 2, abs=1e-5)
    barriers = {barrier["metric"]: barrier for barrier in landscape.facts["barriers"]}
    assert barriers["mse"]["height"] == pytest.approx(SQUARE)
    assert barriers["mse"]["at"] == 0.5
    assert barriers["mse"]["data"] == "evaluation data"
    assert landscape.facts["distance"] == pytest.approx(2)
    assert landscape.facts["text"] == (
        "first and last are 2 apart; between them a barrier of 2.16 in RMSE on evaluation data at "
        "t = 0.50 and a barrier of 4.67 in MSE on evaluation data at t = 0.50"
    )


def test_segment_between_unequal_ends_has_the_barrier_above_their_line(tmp_path):
    run = well(tmp_path / "run", [-2.0, 1.0])
    landscape = segment(
        run, Well(), WELL_DATA, ends=("first", "last"), points=4, beyond=0, task="regression"
    )
    losses = [SQUARE * (w**2 - 1) ** 2 for w in (-2.0, -1.0, 0.0, 1.0)]
    assert [p.data["mse"] for p in landscape.points] == pytest.approx(losses, abs=1e-4)
    heights = [loss - losses[0] * (3 - i) / 3 for i, loss in enumerate(losses)]
    barriers = {barrier["metric"]: barrier for barrier in landscape.facts["barriers"]}
    # Above the mean of the ends, it would be 0 as well: (9 + 0)/2 > 1.
    assert max(heights) == 0
    assert (barriers["mse"]["height"], barriers["mse"]["at"]) == (0, 0)


def test_segment_joins_the_ends_of_two_runs(tmp_path):
    first = well(tmp_path / "a", [5.0, -1.0])
    second = well(tmp_path / "b", [7.0, 1.0])
    landscape = segment(
        first, Well(), WELL_DATA, ends=("last", second), points=3, beyond=0, task="regression"
    )
    assert [point.coefficients for point in landscape.points] == [
        (0, 1, 0), (0, 0.5, 0.5), (0, 0, 1),
    ]  # fmt: skip
    assert landscape.points[1].data["mse"] == pytest.approx(SQUARE)
    assert landscape.facts["ends"] == ["last", "b/epoch_1.pt"]
    # The average is that of the first run alone: w = 2.
    (average,) = landscape.averages
    assert average.x == pytest.approx(1.5)


def points_of(errors, train=None):
    count = len(errors) - 1
    return [
        Point(i / count, None, None, {"top1": 100 - e, "nll": e / 10}) for i, e in enumerate(errors)
    ]


METRICS = [Metric("top1", "top-1 %", ".2f", True, "%"), Metric("nll", "NLL", ".4f", False, "nats")]


def test_barrier_is_an_error_above_the_line_of_the_ends():
    # Ends 4 and 8: the line is 4 5 6 7 8, the errors above it 0 1 −1 2 0.
    barriers = measure_barriers(points_of([4, 6, 5, 9, 8]), METRICS)
    assert [(b.metric, b.unit, b.at) for b in barriers] == [
        ("top1", "%", 0.75), ("nll", "nats", 0.75),
    ]  # fmt: skip
    assert [b.height for b in barriers] == pytest.approx([2, 0.2])
    assert barriers[0].describe() == (
        "a barrier of 2 percentage points in top-1 on evaluation data at t = 0.75"
    )


def test_barrier_is_0_below_the_line():
    (barrier, _) = measure_barriers(points_of([4, 1, 8]), METRICS)
    assert (barrier.height, barrier.at) == (0, 0)
    assert barrier.describe() == "no barrier in top-1 on evaluation data"


def test_barrier_is_infinite_at_a_hole_and_unknown_at_an_end():
    (barrier, _) = measure_barriers(points_of([4, math.nan, 8]), METRICS)
    assert math.isinf(barrier.height)
    assert barrier.as_json()["height"] is None
    assert "not finite at t = 0.50" in barrier.describe()
    (barrier, _) = measure_barriers(points_of([4, 5, math.nan]), METRICS)
    assert math.isnan(barrier.height)
    assert "an end is not finite" in barrier.describe()


def test_segment_resumes(run, tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    first = segment(run, Net(), TEST, train_data=TRAIN, points=3, results=path)
    plain = Landscape.load(path)
    assert plain.points == first.points
    calls = []
    forward = Net.forward

    def counted(self, x):
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    again = segment(run, Net(), TEST, train_data=TRAIN, points=3, results=path, resume=True)
    assert again.points == first.points
    assert again.averages == first.averages
    assert again.checkpoints == first.checkpoints
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ends": ("last", "last")}, "the two ends of the segment are the same: last and last"),
        ({"ends": ("last", "step_5")}, "are the same"),
        ({"ends": ("last", "step_6.pt")}, r"no point is called 'step_6.pt'"),
        ({"ends": ("avrage", "last")}, r"no point is called 'avrage'"),
        ({"ends": "last"}, "a segment has two ends"),
        ({"ends": ("a", "b", "c")}, "a segment has two ends"),
        ({"ends": ("last", 3)}, "a point is expected to be a name"),
        ({"points": 1}, "`points` of a segment is expected"),
        ({"points": 2.5}, "`points` of a segment is expected"),
        ({"beyond": -0.1}, "`beyond` is expected"),
        ({"beyond": math.nan}, "`beyond` is expected"),
        ({"resume": True}, "`resume` needs a `results` file"),
    ],
)
def test_segment_refuses_before_work(run, monkeypatch, arguments, message):
    monkeypatch.setattr(Net, "forward", None)
    with pytest.raises(UsageError, match=message):
        segment(run, Net(), TEST, **arguments)


def test_segment_suggests_a_name(run):
    with pytest.raises(UsageError) as caught:
        segment(run, Net(), TEST, ends=("avrage", "last"))
    assert "Did you mean average?" in str(caught.value)


def test_segment_of_one_checkpoint_is_refused(run):
    with pytest.raises(UsageError, match="the two ends of the segment are the same"):
        segment(run.last(1), Net(), TEST)


def test_segment_between_equal_weights_is_refused(tmp_path):
    run = well(tmp_path / "run", [1.0, 2.0, 1.0])
    with pytest.raises(UsageError, match="have the same weights: first and last"):
        segment(run, Well(), WELL_DATA, ends=("first", "last"), task="regression")


def test_segment_is_public():
    assert ckptavg.segment is segment
