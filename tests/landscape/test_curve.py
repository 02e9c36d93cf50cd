"""Curves over training against evaluations of single candidates and hand computation."""

import json
import math

import pytest
import torch
from helpers import save, save_weight
from landscapes import Net, data_of, metrics_at, network_at, save_run, state_of
from scipy import stats
from torch.utils.data import TensorDataset

from ckptavg import Candidate, curve, evaluate, open_run
from ckptavg.errors import RunError, UsageError
from ckptavg.landscape.landscape import Landscape

DATA, TRAIN = data_of(seed=1), data_of(seed=2)


def values(landscape, series, key="nll", *, train=False):
    """Values of a line by x."""
    line = {}
    for point in landscape.points:
        if point.series == series:
            line[point.x] = (point.train if train else point.data)[key]
    return line


def test_curve_of_checkpoints_and_running_averages_is_that_of_evaluate(tmp_path):
    run = save_run(tmp_path / "run")
    drawn = curve(run, Net(), DATA, train_data=TRAIN)
    assert (drawn.kind, drawn.axes) == ("curve", ("step", ""))
    candidates = [Candidate.of_checkpoint(checkpoint) for checkpoint in run]
    candidates += [Candidate.of_average(run[:k], recompute=True) for k in range(2, 6)]
    results = evaluate(candidates, Net(), DATA, train_loader=TRAIN)
    on_training = evaluate(candidates, Net(), TRAIN, train_loader=TRAIN)
    expected = {"checkpoints": [0, 1, 2, 3, 4], "running average": [0, 5, 6, 7, 8]}
    for series, positions in expected.items():
        points = [point for point in drawn.points if point.series == series]
        assert [point.x for point in points] == [1, 2, 3, 4, 5]
        for point, position in zip(points, positions, strict=True):
            assert point.data == pytest.approx(dict(results[position].metrics))
            assert point.train == pytest.approx(dict(on_training[position].metrics))
            assert point.interval.keys() == {"top1", "nll"}


def test_curve_is_that_of_networks_by_hand(tmp_path):
    run = save_run(tmp_path / "run", 4)
    drawn = curve(run, Net(), DATA, train_data=TRAIN, window=2)
    for series, start in (("running average", 0), ("average of the last 2", 2)):
        line = [point for point in drawn.points if point.series == series]
        for point in line[1:]:
            stop = int(point.x)
            first = 0 if start == 0 else stop - 2
            coefficients = [0.0] * 4
            coefficients[first:stop] = [1 / (stop - first)] * (stop - first)
            assert point.coefficients == pytest.approx(coefficients)
            net = network_at(run, coefficients, TRAIN)
            for key, value in metrics_at(net, DATA).items():
                assert point.data[key] == pytest.approx(value, rel=1e-5)
    assert list(values(drawn, "average of the last 2")) == [2, 3, 4]


def test_curve_has_intervals_of_wilson_and_of_the_mean(tmp_path):
    run = save_run(tmp_path / "run", 2)
    drawn = curve(run, Net(), DATA)
    net = network_at(run, (0.0, 1.0), None)
    x, y = DATA.tensors
    logs = net(x).detach().double().log_softmax(1)
    right = int((logs.argmax(1) == y).sum())
    wilson = stats.binomtest(right, len(y)).proportion_ci(method="wilson")
    nll = -logs[torch.arange(len(y)), y].numpy()
    interval = drawn.points[1].interval
    assert interval["top1"] == pytest.approx((100 * wilson.low, 100 * wilson.high))
    expected = stats.norm.interval(0.95, nll.mean(), stats.sem(nll))
    assert interval["nll"] == pytest.approx(expected, rel=1e-5)


def test_curve_selection_decides_where_the_average_starts(tmp_path):
    run = save_run(tmp_path / "run", 4)
    late = curve(run.steps(3), Net(), DATA, train_data=TRAIN)
    assert list(values(late, "running average")) == [3, 4]
    expected = metrics_at(network_at(run, (0, 0, 0.5, 0.5), TRAIN), DATA)["nll"]
    assert values(late, "running average")[4] == pytest.approx(expected, rel=1e-5)


def test_curve_keeps_step_rate_and_scores_of_checkpoints(tmp_path):
    drawn = curve(save_run(tmp_path / "run", 3), Net(), DATA, train_data=TRAIN)
    for number, landmark in enumerate(drawn.checkpoints, 1):
        assert (landmark.name, landmark.step, landmark.x) == (f"step_{number}.pt", number, number)
        assert landmark.lr == pytest.approx(0.1 / number)
        assert landmark.data["nll"] == values(drawn, "checkpoints")[number]
        assert landmark.train["nll"] == values(drawn, "checkpoints", train=True)[number]
    (average,) = drawn.averages
    assert average.data["nll"] == values(drawn, "running average")[3]


def test_curves_of_several_runs_share_a_picture(tmp_path):
    first = save_run(tmp_path / "constant", 3)
    states = [state_of(seed) for seed in (11, 12)]
    for step, state in enumerate(states, 2):
        save(tmp_path / "cyclical" / f"step_{step}.pt", state, step=step)
    second = open_run(tmp_path / "cyclical")
    drawn = curve([first, second], Net(), DATA, train_data=TRAIN)
    alone = curve(second, Net(), DATA, train_data=TRAIN)
    series = dict.fromkeys(point.series for point in drawn.points)
    assert list(series) == [
        "constant: checkpoints", "constant: running average",
        "cyclical: checkpoints", "cyclical: running average",
    ]  # fmt: skip
    assert values(drawn, "cyclical: running average") == pytest.approx(
        values(alone, "running average")
    )
    assert all(len(point.coefficients) == 5 for point in drawn.points)
    assert drawn.facts["comparisons"][1] == {**alone.facts["comparisons"][0], "run": "cyclical"}
    assert [landmark.x for landmark in drawn.checkpoints] == [1, 2, 3, 2, 3]
    named = curve({"a": tmp_path / "constant", "b": second}, Net(), DATA)
    assert {point.series.partition(":")[0] for point in named.points} == {"a", "b"}


@pytest.mark.parametrize("form", ["paths", "mixed", "generator"])
def test_curve_takes_runs_in_any_form(tmp_path, form):
    paths = [tmp_path / "a", tmp_path / "b"]
    runs = [save_run(path, 2) for path in paths]
    forms = {"paths": paths, "mixed": [runs[0], paths[1]], "generator": iter(runs)}
    drawn = curve(forms[form], Net(), DATA)
    assert {point.series.partition(":")[0] for point in drawn.points} == {"a", "b"}


def test_curve_refuses_a_name_for_two_runs(tmp_path):
    save_run(tmp_path / "a", 2)
    save_run(tmp_path / "b", 2)
    with pytest.raises(UsageError, match="both stands for 2 trainings"):
        curve({"both": open_run(tmp_path / "a", tmp_path / "b")}, Net(), DATA)


def test_curve_of_a_path_with_two_runs_has_a_line_for_each(tmp_path):
    save_run(tmp_path / "x" / "run", 2)
    save_run(tmp_path / "y" / "run", 2)
    drawn = curve(open_run(tmp_path / "x" / "run", tmp_path / "y" / "run"), Net(), DATA)
    assert {point.series for point in drawn.points} == {
        "x/run: checkpoints", "x/run: running average",
        "y/run: checkpoints", "y/run: running average",
    }  # fmt: skip


def test_curve_compares_the_ends_on_the_same_samples(tmp_path):
    run = save_run(tmp_path / "run", 3)
    drawn = curve(run, Net(), DATA, train_data=TRAIN)
    last = Candidate.of_checkpoint(run[-1], last=True)
    average = Candidate.of_average(run, recompute=True)
    versus = evaluate([last, average], Net(), DATA, train_loader=TRAIN)[1].versus
    (comparison,) = drawn.facts["comparisons"]
    assert comparison["metric"] == "top1"
    for key, value in (
        ("difference", versus.difference.value), ("low", versus.difference.low),
        ("high", versus.difference.high), ("p", versus.difference.p),
    ):  # fmt: skip
        assert comparison[key] == pytest.approx(value)
    assert "average of all 3" in drawn.facts["text"]


class Biased(torch.nn.Module):
    """Puts out its two weights for every sample."""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def save_biases(directory, biases):
    for step, bias in enumerate(biases, 1):
        save(directory / f"step_{step}.pt", {"logits": torch.tensor([0.0, bias])}, step=step)
    return open_run(directory)


def biased_data(ones, count=100):
    labels = torch.zeros(count, dtype=torch.int64)
    labels[:ones] = 1
    return TensorDataset(torch.zeros(count, 1), labels)


@pytest.mark.parametrize(
    ("biases", "sentence"),
    [
        (
            [3.0, 3.0, -1.0],
            "all 3 is better than the last checkpoint: top-1 80.00 % against 20.00 %",
        ),
        ([-4.0, 1.0, 1.0], "is worse than the last checkpoint: top-1 20.00 % against 80.00 %"),
        ([1.0, 2.0, 3.0], "do not differ beyond chance: top-1 80.00 % against 80.00 %"),
    ],
    ids=["better", "worse", "same"],
)
def test_curve_verdict_says_which_end_is_better(tmp_path, biases, sentence):
    drawn = curve(save_biases(tmp_path / "run", biases), Biased(), biased_data(80))
    assert sentence in drawn.facts["text"]


@pytest.mark.parametrize(
    ("biases", "ones", "sentence"),
    [
        ([0.0, 1.0, 4.0], 60, "grows from 0.0000 nats to 1.6000 nats, and evaluation gets worse"),
        ([1.0, 1.0, 1.02], 60, "stays about the same (0.4000 nats, then 0.4080 nats)"),
        ([4.0, 1.0, 0.0], 60, "shrinks from 1.6000 nats to 0.0000 nats"),
    ],
    ids=["grows", "stays", "shrinks"],
)
def test_curve_verdict_tells_whether_the_gap_grows(tmp_path, biases, ones, sentence):
    """The NLL of label 1 is less than that of label 0 by the bias, so the gap is bias · 0.4."""
    run = save_biases(tmp_path / "run", biases)
    drawn = curve(run, Biased(), biased_data(ones), train_data=biased_data(100))
    (gap,) = drawn.facts["gaps"]
    assert gap["early"] == pytest.approx(0.4 * biases[0], abs=1e-6)
    assert gap["late"] == pytest.approx(0.4 * biases[2], abs=1e-6)
    assert gap["average"] == pytest.approx(0.4 * sum(biases) / 3, abs=1e-6)
    assert sentence in drawn.facts["text"]


@pytest.mark.parametrize(
    ("trained", "word"), [(100, "a sign of overfitting"), (50, "and both get worse")],
    ids=["fitted", "spoiled"],
)  # fmt: skip
def test_curve_verdict_calls_it_overfitting_only_where_training_gets_better(
    tmp_path, trained, word
):
    """The NLL of label 1 falls with the bias, that of label 0 rises."""
    run = save_biases(tmp_path / "run", [0.0, 1.0, 5.0])
    drawn = curve(run, Biased(), biased_data(20), train_data=biased_data(trained))
    assert word in drawn.facts["text"]


def test_curve_verdict_compares_the_sliding_average_too(tmp_path):
    run = save_biases(tmp_path / "run", [-9.0, 3.0, -1.0])
    drawn = curve(run, Biased(), biased_data(80), window=2)
    assert "the average of all 3 and the last checkpoint do not differ" in drawn.facts["text"]
    assert "the average of the last 2 is better than the last checkpoint" in drawn.facts["text"]
    counts = [comparison["count"] for comparison in drawn.facts["comparisons"]]
    assert counts == [3, 2]
    nll = [drawn.facts["comparisons"][1][key] for key in ("average", "last")]
    assert nll == [80, 20]
    assert (
        f"; NLL {values(drawn, 'average of the last 2')[3]:.4f} nats against"
        in (drawn.facts["text"])
    )


@pytest.mark.parametrize(
    ("biases", "advised"), [([-9.0, 1.0, 2.0], True), ([2.0, -9.0, 1.0], False)],
    ids=["improving", "worsening"],
)  # fmt: skip
def test_curve_verdict_advises_a_later_start_in_a_run_that_improves(tmp_path, biases, advised):
    drawn = curve(save_biases(tmp_path / "run", biases), Biased(), biased_data(80))
    assert "is worse than the last checkpoint" in drawn.facts["text"]
    assert ("select fewer, later ones" in drawn.facts["text"]) == advised


def test_curve_x_is_the_position_where_two_checkpoints_share_an_epoch(tmp_path):
    for number, epoch in enumerate((1, 1, 2)):
        save(tmp_path / "run" / f"c{number}.pt", state_of(number), epoch=epoch)
    drawn = curve(tmp_path / "run", Net(), DATA)
    assert drawn.axes[0] == "position in the run"
    assert list(values(drawn, "checkpoints")) == [1, 2, 3]


def test_curve_x_is_the_epoch_where_no_step_is_recorded(tmp_path):
    for epoch in (3, 7):
        save(tmp_path / "run" / f"e{epoch}.pt", state_of(epoch), epoch=epoch)
    drawn = curve(tmp_path / "run", Net(), DATA)
    assert drawn.axes[0] == "epoch"
    assert list(values(drawn, "checkpoints")) == [3, 7]
    assert any("no checkpoint records its learning rate" in note for note in drawn.notes)


def test_curve_x_is_the_position_where_steps_are_not_known_of_all(tmp_path):
    save(tmp_path / "run" / "epoch_10.pt", state_of(1), step=1000)
    save(tmp_path / "run" / "epoch_20.pt", state_of(2))
    drawn = curve([tmp_path / "run" / "epoch_10.pt", tmp_path / "run" / "epoch_20.pt"], Net(), DATA)
    assert drawn.axes[0] == "position in the run"
    assert list(values(drawn, "checkpoints")) == [1, 2]
    assert any("x is the position" in note for note in drawn.notes)


def test_curve_without_a_model_has_the_recorded_metrics(tmp_path):
    for step, accuracy in enumerate((70.0, 75.0, 74.0), 1):
        save_weight(
            tmp_path / "run" / f"s{step}.pt", step=step, lr=0.1, val_acc=accuracy, val_loss=1 / step
        )
    drawn = curve(tmp_path / "run")
    assert [metric.key for metric in drawn.metrics] == ["val_acc", "val_loss"]
    assert [metric.higher for metric in drawn.metrics] == [True, False]
    assert values(drawn, "checkpoints", "val_acc") == {1: 70, 2: 75, 3: 74}
    assert [landmark.lr for landmark in drawn.checkpoints] == [0.1, 0.1, 0.1]
    assert any("averages are not scored" in note for note in drawn.notes)


def test_curve_results_are_resumed(tmp_path):
    run = save_run(tmp_path / "run", 4)
    path = tmp_path / "curve.json"
    whole = curve(run, Net(), DATA, train_data=TRAIN, window=3, results=path)
    plain = json.loads(path.read_text())
    # A value that nothing would compute shows whether a stored point is taken.
    plain["points"][1]["data"]["nll"] = 0.125
    path.write_text(json.dumps(plain))
    resumed = curve(run, Net(), DATA, train_data=TRAIN, window=3, results=path, resume=True)
    assert resumed.points[1].data["nll"] == 0.125
    assert resumed.points[2:] == whole.points[2:]
    assert resumed.facts["comparisons"] == whole.facts["comparisons"]
    assert Landscape.load(path).points == resumed.points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 6}, "`window=6` is more than the 5 checkpoints of run"),
        ({"window": 1}, "from 2 on"),
        ({"model": None}, "`data` needs `model`"),
        ({"data": None}, "`model` needs `data`"),
        ({"model": None, "data": None, "window": 2}, "`window` needs `model`"),
        ({"resume": True}, "`resume` needs"),
        ({"results": "x.csv"}, r"\.json or \.npz"),
    ],
    ids=["window", "small-window", "no-model", "no-data", "window-alone", "resume", "suffix"],
)
def test_curve_refuses_arguments_before_work(tmp_path, change, message):
    run = save_run(tmp_path / "run")
    with pytest.raises(UsageError, match=message):
        curve(run, **({"model": Net(), "data": DATA} | change))


def test_curve_refuses_a_single_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="needs two checkpoints, and run has a single one"):
        curve(save_run(tmp_path / "run").last(1), Net(), DATA)


def test_curve_without_a_model_needs_a_recorded_metric(tmp_path):
    with pytest.raises(RunError, match="record no metric"):
        curve(save_run(tmp_path / "run"))


def test_curve_keeps_a_checkpoint_that_diverged_as_a_hole(tmp_path):
    save_run(tmp_path / "run", 3)
    state = state_of(2)
    state["head.weight"][0, 0] = math.inf
    save(tmp_path / "run" / "step_2.pt", state, step=2)
    drawn = curve(tmp_path / "run", Net(), DATA)
    line = values(drawn, "checkpoints")
    assert math.isnan(line[2])
    assert math.isfinite(line[3])
    assert "the average of all 3 gives outputs that are not finite" in drawn.facts["text"]
