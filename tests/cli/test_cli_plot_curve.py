"""``ckptavg plot curve``: table, verdict, files and errors."""

import json

import pytest
from command_line import ckptavg, one_line_error

import ckptavg as package

SCORED = ("--model", "net.py:model", "--data", "net.py:data")
TRAINED = (*SCORED, "--train-data", "net.py:data", "--train-data-arg", "seed=1")


def test_plot_curve_prints_steps_rates_metrics_and_a_verdict(home):
    result = ckptavg("plot", "curve", "run", *TRAINED, "--window", 2)
    assert result.exit_code == 0, result.output
    head, rule, *rows = result.stdout.splitlines()[1:7]
    assert set(rule) <= {"─", "-"}
    for title in ("epoch", "LR", "checkpoints, top-1 %", "[95 %]", "running average",
                  "average of the last 2", "on training data"):  # fmt: skip
        assert title in head
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    assert [row.split()[1] for row in rows][:2] == ["0.1", "0.05"]
    assert "the average of all 4" in result.stdout
    assert "the gap in NLL between training and evaluation data" in result.stdout


def test_plot_curve_json_is_that_of_the_library(home):
    result = ckptavg("plot", "curve", "run", *TRAINED, "--json")
    plain = json.loads(result.stdout)
    assert plain["kind"] == "curve"
    assert {point["series"] for point in plain["points"]} == {"checkpoints", "running average"}
    assert {"path", "step", "lr", "x", "y", "distance", "data"} <= plain["checkpoints"][0].keys()
    network = {}
    exec((home / "net.py").read_text(), network)
    drawn = package.curve("run", network["model"](), network["data"](),
                          train_data=network["data"](seed=1))  # fmt: skip
    for mine, theirs in zip(plain["points"], drawn.points, strict=True):
        assert mine["data"]["nll"] == pytest.approx(theirs.data["nll"], rel=1e-5)
        assert mine["coefficients"] == pytest.approx(theirs.coefficients)


def test_plot_curve_selects_where_the_average_starts(home):
    result = ckptavg("plot", "curve", "run", *SCORED, "--from", 3, "--json")
    assert [point["x"] for point in json.loads(result.stdout)["points"]] == [3, 4, 3, 4]


def test_plot_curve_of_two_runs_prints_a_table_for_each(home):
    (home / "other").mkdir()
    for epoch in (2, 3):
        contents = (home / "run" / f"epoch_{epoch}.pt").read_bytes()
        (home / "other" / f"epoch_{epoch}.pt").write_bytes(contents)
    result = ckptavg("plot", "curve", "run", "other", *SCORED)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "run" in lines
    assert "other" in lines
    assert any(line.startswith("other: the average of all 2") for line in lines)


def test_plot_curve_without_data_shows_recorded_metrics(home):
    result = ckptavg("plot", "curve", "run")
    assert result.exit_code == 0
    assert "val_acc" in result.stdout
    assert "pass --model and --data" in result.stderr


def test_plot_curve_resumes_and_draws(home):
    arguments = ("plot", "curve", "run", *SCORED, "--results", "c.json")
    assert ckptavg(*arguments).exit_code == 0
    result = ckptavg(*arguments, "--resume", "-o", "c.svg")
    assert result.exit_code == 0, result.output
    assert "7 of 7 points are in c.json" in result.stderr
    assert "wrote c.svg" in result.stderr
    assert (home / "c.svg").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *SCORED, "--window", "9"], "--window 9 is more than the 4 checkpoints of run"),
        (["run/epoch_1.pt", *SCORED], "needs two checkpoints"),
        (["run", "--model", "net.py:model"], "--model needs --data"),
        (["run", "--window", "2"], "--window needs --model"),
        (["run", "--data", "net.py:data"], "Missing option '--model'"),
        (["run", *SCORED, "--resume"], "--resume needs --results"),
        (["run", *SCORED, "-o", "c.txt"], "c.txt"),
        (["run", *SCORED, "--bn-samples", "4"], "--bn-samples needs --train-data"),
    ],
    ids=["window", "single", "data", "alone", "model", "resume", "suffix", "statistics"],
)
def test_plot_curve_refuses_in_a_line(home, arguments, message):
    assert message in one_line_error(ckptavg("plot", "curve", *arguments), 2)
