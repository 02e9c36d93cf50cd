"""Rays in random directions, against losses that are quadratic by construction."""

import copy
import math

import pytest
import torch
from landscapes import Net, data_of, metrics_at, save_run, weights_at
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, evaluate, rays
from ckptavg.errors import UsageError
from ckptavg.landscape import points as points_module
from ckptavg.landscape.landscape import Landscape
from ckptavg.landscape.lines import radius as radius_module
from ckptavg.landscape.lines.radius import round_up
from ckptavg.landscape.lines.widths import (
    Width,
    compare_widths,
    describe_widths,
    find_crossing,
    mean_interval,
    student_quantile,
)
from ckptavg.models.perturbation import Direction, Perturbation

TRAIN, TEST = data_of(1, 96), data_of(2)
# The columns of X are orthogonal, so that the mean squared error is ‖w − w*‖².
X = 2 * torch.eye(4)
OPTIMUM = torch.tensor([1.0, -2.0, 0.5, 3.0])
QUADRATIC = TensorDataset(X, (X @ OPTIMUM)[:, None])
OFFSET = torch.tensor([0.5, 0.0, 0.0, 0.0])


def linear():
    return nn.Linear(4, 1, bias=False)


@pytest.fixture
def valley(tmp_path):
    """A run whose average is the optimum; its last checkpoint is 0.5 away from it."""
    directory = tmp_path / "valley"
    directory.mkdir()
    for index, offset in enumerate((-OFFSET, OFFSET)):
        torch.save({"weight": (OPTIMUM + offset)[None]}, directory / f"epoch_{index}.pt")
    return ckptavg.open_run(directory)


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


def direction(number, seed=0, model=None):
    """A direction as a vector, from a module of zeros."""
    zero = copy.deepcopy(model or linear()).double()
    with torch.no_grad():
        for parameter in zero.parameters():
            parameter.zero_()
        Perturbation(Direction(seed, number), 1.0).apply(zero)
    return torch.cat([p.detach().flatten() for p in zero.parameters()])


def quadratic_rays(valley, **options):
    options = {"radius": 2.0, "points": 5, "directions": 3, "rise": 1.0} | options
    return rays(valley, linear(), QUADRATIC, task="regression", **options)


def ray_of(landscape, series):
    return {point.x: point for point in landscape.points if point.series == series}


def test_rays_of_a_quadratic_loss_are_parabolas(valley):
    landscape = quadratic_rays(valley)
    for number in range(3):
        d = direction(number)
        average = ray_of(landscape, f"average, direction {number + 1}")
        last = ray_of(landscape, f"last, direction {number + 1}")
        assert list(average) == list(last) == [0, 0.5, 1, 1.5, 2]
        for t in average:
            assert average[t].data["mse"] == pytest.approx(t**2, abs=1e-5)
            wanted = float((OFFSET.double() + t * d).square().sum())
            assert last[t].data["mse"] == pytest.approx(wanted, abs=1e-5)


def crossing_by_hand(d, rise):
    """Where ‖δ + t·d‖² has risen, on straight lines between the points of the grid."""
    grid = [0, 0.5, 1, 1.5, 2]
    losses = [float((OFFSET.double() + t * d).square().sum()) for t in grid]
    for a, b, low, high in zip(grid, grid[1:], losses, losses[1:], strict=False):
        if high >= losses[0] + rise:
            return a + (losses[0] + rise - low) / (high - low) * (b - a)
    raise AssertionError


def test_widths_of_a_quadratic_loss_by_hand(valley):
    facts = quadratic_rays(valley).facts
    average, last = facts["widths"]
    assert average["each"] == pytest.approx([1, 1, 1], abs=1e-4)
    wanted = [crossing_by_hand(direction(number), 1.0) for number in range(3)]
    assert last["each"] == pytest.approx(wanted, abs=1e-4)
    mean = sum(wanted) / 3
    deviation = math.sqrt(sum((w - mean) ** 2 for w in wanted) / 2)
    reach = 4.302652729911275 * deviation / math.sqrt(3)
    assert (last["mean"], last["low"], last["high"]) == pytest.approx(
        (mean, mean - reach, mean + reach), abs=1e-4
    )
    (difference,) = facts["differences"]
    assert difference["mean"] == pytest.approx(1 - mean, abs=1e-4)
    assert facts["distances"] == pytest.approx([0, 0.5])
    last_norm = float((OPTIMUM + OFFSET).norm())
    assert facts["norms"] == pytest.approx([float(OPTIMUM.norm()), last_norm])
    assert facts["rise"] == {
        "metric": "mse", "unit": "", "data": "evaluation data", "value": 1.0,
    }  # fmt: skip


def test_mean_curve_is_the_mean_over_directions(valley):
    landscape = quadratic_rays(valley)
    mean = ray_of(landscape, "last")
    each = [ray_of(landscape, f"last, direction {number}") for number in (1, 2, 3)]
    for t, point in mean.items():
        values = [ray[t].data["mse"] for ray in each]
        assert point.data["mse"] == pytest.approx(sum(values) / 3)
        if t:
            low, high = point.interval["mse"]
            assert (low + high) / 2 == pytest.approx(point.data["mse"])
            assert mean_interval(values).low == pytest.approx(low)
    assert mean[0].interval == {}


def test_rays_recompute_statistics_at_every_point(run):
    landscape = rays(
        run, Net(), TEST, train_data=TRAIN, directions=2, points=3, radius=3.0, batch_size=32
    )
    centers = {"average": (0.2,) * 5, "last": (0, 0, 0, 0, 1)}
    for name, coefficients in centers.items():
        for number in range(2):
            ray = ray_of(landscape, f"{name}, direction {number + 1}")
            for t in (0, 1.5, 3):
                net = Net()
                net.load_state_dict(weights_at(run, coefficients))
                with torch.no_grad():
                    Perturbation(Direction(0, number), t).apply(net)
                    inputs = net.body(TRAIN.tensors[0]).double()
                net.norm.running_mean.copy_(inputs.mean(0))
                net.norm.running_var.copy_(inputs.var(0))
                net.eval()
                for scores, data in ((ray[t].data, TEST), (ray[t].train, TRAIN)):
                    wanted = metrics_at(net, data)
                    assert scores["nll"] == pytest.approx(wanted["nll"], abs=1e-5)


def test_rays_move_by_their_distance(run):
    """The direction has length 1 over all parameters."""
    vector = direction(0, model=Net())
    assert len(vector) == sum(p.numel() for p in Net().parameters())
    assert float(vector.norm()) == pytest.approx(1, abs=1e-6)


def test_ray_centers_are_those_of_evaluate(run):
    landscape = rays(run, Net(), TEST, train_data=TRAIN, directions=1, points=2, radius=1.0)
    scored = evaluate(
        [
            Candidate.of_average(run, recompute=True),
            Candidate.of_checkpoint(run[-1], recompute=True),
            Candidate.of_checkpoint(run[-1], recompute=False),
        ],
        Net(), TEST, train_loader=TRAIN,
    )  # fmt: skip
    assert ray_of(landscape, "average, direction 1")[0].data == scored[0].metrics
    assert ray_of(landscape, "last, direction 1")[0].data == scored[1].metrics
    assert landscape.averages[0].data == scored[0].metrics
    assert landscape.checkpoints[0].data == scored[2].metrics


class Steep(nn.Module):
    """A linear layer whose outputs overflow away from its optimum."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x):
        return x @ self.weight.T + (1e3 * (self.weight[0] - OPTIMUM)).square().sum().exp() - 1


def test_rays_have_holes_where_outputs_are_not_finite(valley):
    landscape = rays(
        valley, Steep(), QUADRATIC, task="regression", radius=2.0, points=3, directions=2,
        rise=1.0, centers=("average",),
    )  # fmt: skip
    for series in ("average", "average, direction 1"):
        ray = ray_of(landscape, series)
        assert ray[0].data["mse"] == pytest.approx(0, abs=1e-6)
        assert math.isnan(ray[1].data["mse"])
    # The last finite point is the center: a width is never too large.
    assert landscape.facts["widths"][0]["each"] == [0, 0]


def test_rays_note_statistics_that_do_not_fit(run, valley):
    options = {"directions": 1, "points": 2, "radius": 1.0}
    note = "along rays are those of their centers"
    assert any(note in text for text in rays(run, Net(), TEST, **options).notes)
    trained = rays(run, Net(), TEST, train_data=TRAIN, **options)
    assert not any(note in text for text in trained.notes)
    assert not any(note in text for text in quadratic_rays(valley).notes)


def test_rays_are_the_same_for_any_passes_and_settings(run, monkeypatch):
    options = {"directions": 2, "points": 2, "radius": 2.0, "train_data": TRAIN, "batch_size": 32}
    together = rays(run, Net(), TEST, **options)
    monkeypatch.setattr(points_module, "count_models_that_fit", lambda *_: 1)
    alone = rays(run, Net(), TEST, **options)
    assert together.points == alone.points
    fewer = rays(run, Net(), TEST, **{**options, "directions": 1})
    assert ray_of(fewer, "last, direction 1") == ray_of(together, "last, direction 1")
    other = rays(run, Net(), TEST, **options, seed=1)
    first, second = (ray_of(x, "last, direction 1")[2.0] for x in (together, other))
    assert first.data["nll"] != second.data["nll"]


def test_rays_resume(run, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    options = {"directions": 2, "points": 3, "train_data": TRAIN, "results": path}
    first = rays(run, Net(), TEST, **options)
    calls = []
    forward = Net.forward

    def counted(self, x):
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    again = rays(run, Net(), TEST, **options, resume=True)
    assert again.points == first.points
    assert again.facts == first.facts
    assert Landscape.load(path).points == first.points
    assert not calls
    # One more direction: the first ones are kept, their length too.
    more = rays(run, Net(), TEST, **{**options, "directions": 3}, resume=True)
    assert more.facts["radius"] == first.facts["radius"]
    assert ray_of(more, "last, direction 2") == ray_of(first, "last, direction 2")
    calls_of_one_point = 1 + 2
    assert len(calls) == 2 * 2 * calls_of_one_point


def test_radius_is_a_multiple_of_the_distance_at_which_the_loss_rises(valley):
    # The distance of the centers is 0.5. The margin is half the rise.
    landscape = quadratic_rays(valley, radius=None, directions=4)

    def least_rise(radius):
        moved = [OFFSET.double() + radius * direction(number) for number in range(3)]
        return min(radius**2, *(float(w.square().sum()) - 0.25 for w in moved))

    wanted = next(radius for radius in (0.25, 0.5, 1, 2, 4, 8) if least_rise(radius) >= 1.5)
    assert landscape.facts["radius"] == wanted
    assert any("times the distance between the centers" in note for note in landscape.notes)


def test_radius_ends_where_the_loss_rises_little(valley):
    landscape = quadratic_rays(valley, radius=None, rise=1e6)
    assert landscape.facts["radius"] == 8
    assert landscape.facts["widths"][0]["beyond"] == 3
    assert landscape.facts["widths"][0]["mean"] is None
    assert landscape.facts["differences"] == [
        {"center": "last", "mean": None, "low": None, "high": None, "wider": None}
    ]
    assert "is reached nowhere within 8 from average" in landscape.facts["text"]


@pytest.mark.parametrize(
    ("value", "rounded"), [(1.0, 1.0), (13.0, 13.0), (12.01, 13.0), (0.0451, 0.046), (995, 1000)]
)
def test_radius_is_rounded_up_to_two_digits(value, rounded):
    assert round_up(value) == rounded


def test_default_rise_is_a_tenth_of_nats_or_of_the_loss(valley, run):
    landscape = quadratic_rays(valley, rise=None, centers=("last", "average"))
    assert landscape.facts["rise"]["value"] == pytest.approx(0.1 * 0.25, abs=1e-6)
    landscape = rays(run, Net(), TEST, train_data=TRAIN, directions=1, points=2, radius=1.0)
    assert landscape.facts["rise"] == {
        "metric": "nll", "unit": "nats", "data": "training data", "value": 0.1,
    }  # fmt: skip


def test_ray_of_one_center_needs_a_radius(valley):
    with pytest.raises(UsageError, match="a single center has no distance to go by"):
        quadratic_rays(valley, centers=("average",), radius=None)
    landscape = quadratic_rays(valley, centers=("average",))
    assert "is reached at t = 1 (1 to 1) from average" in landscape.facts["text"]


def test_rays_of_one_checkpoint(valley):
    landscape = quadratic_rays(valley.last(1), centers=("last",))
    assert landscape.facts["distances"] == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"centers": ("last", "last")}, "two centers of rays are the same"),
        ({"centers": ("last", "epoch_1")}, "two centers of rays are the same"),
        ({"centers": ("last", "epoch_7")}, "no point is called 'epoch_7'"),
        ({"centers": "last"}, "`centers` is expected to be a list"),
        ({"centers": ()}, "`centers` is expected to be a list"),
        ({"directions": 0}, "`directions` of rays is expected"),
        ({"points": 1}, "`points` of rays is expected"),
        ({"radius": -1.0}, "`radius` is expected to be a number above 0"),
        ({"radius": 0}, "`radius` is expected"),
        ({"radius": math.inf}, "`radius` is expected"),
        ({"rise": 0}, "`rise` is expected to be a number above 0"),
        ({"resume": True}, "`resume` needs a `results` file"),
    ],
)
def test_rays_refuse_before_work(valley, monkeypatch, arguments, message):
    monkeypatch.setattr(radius_module, "choose_radius", None)
    monkeypatch.setattr(nn.Linear, "forward", None)
    with pytest.raises(UsageError, match=message):
        quadratic_rays(valley, **arguments)


@pytest.mark.parametrize(
    ("losses", "threshold", "wanted"),
    [
        ([0, 1, 4, 9], 2.5, 1.5),
        ([0, 1, 4, 9], 1, 1),
        ([0, 1, 4, 9], 9.5, None),
        ([1, 0, 3, 2], 2, 1 + 2 / 3),
        ([0, 1, math.nan, 9], 2, 1),
        ([0, math.inf, 4, 9], 2, 0),
    ],
)
def test_crossing_is_the_first(losses, threshold, wanted):
    assert find_crossing([0, 1, 2, 3], losses, threshold) == wanted


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    # Tables of Student's t: 97.5 %.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (99, 1.984)],
)  # fmt: skip
def test_student_quantile_is_that_of_tables(freedom, wanted):
    assert student_quantile(freedom) == pytest.approx(wanted, abs=1e-3)


RISE = "a rise of 0.1 nats in NLL on training data"


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((5.0, 5.1, 5.2), (3.0, 3.1, 3.3), "average is wider than last: "),
        ((3.0, 3.1, 3.3), (5.0, 5.1, 5.2), "average is not wider than last but narrower: "),
        ((5.0, 4.0, 6.0), (5.1, 3.8, 6.1), "average and last cannot be told apart in width: "),
    ],
)
def test_widths_in_a_sentence(first, second, verdict):
    text = describe_widths([Width("average", first), Width("last", second)], RISE, 8.0)
    assert text.startswith(verdict + RISE)
    assert text.endswith("(mean and 95 % interval over 3 directions)")


def test_widths_that_are_not_reached_are_compared_by_signs():
    none = (None,) * 2
    wide, narrow = Width("average", (7.0,) * 4 + none), Width("last", (3.0,) * 6)
    # 6 of 6 by chance: 2 / 64.
    assert compare_widths(wide, narrow).wider == "average"
    assert compare_widths(narrow, wide).wider == "average"
    text = describe_widths([wide, narrow], RISE, 8.0)
    assert text == (
        f"average is wider than last: {RISE} is reached in 4 of 6 within 8 from average and at "
        "t = 3 (3 to 3) from last (mean and 95 % interval over 6 directions); a larger `radius` "
        "tells more"
    )
    text = describe_widths([Width("average", none)], RISE, 8.0)
    assert text == f"{RISE} is reached nowhere within 8 from average; a larger `radius` tells more"
    # 5 of 5 by chance: 2 / 32, more than 5 %. Directions that neither reaches tell nothing.
    five = Width("average", (7.0,) * 4 + none), Width("last", (3.0,) * 5 + (None,))
    assert compare_widths(*five).wider is None


def test_widths_of_one_direction_have_no_verdict():
    text = describe_widths([Width("a", (5.0,)), Width("b", (1.0,))], RISE, 8.0)
    assert text == (
        f"a and b cannot be told apart in width: {RISE} is reached at t = 5 from a and at t = 1 "
        "from b (in one direction)"
    )
