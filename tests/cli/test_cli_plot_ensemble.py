"""``ckptavg plot ensemble``: table, verdict, files and errors."""

import json

import pytest
from command_line import ckptavg, one_line_error

SCORED = ("--model", "net.py:model", "--data", "net.py:data")


def test_plot_ensemble_prints_numbers_scores_and_gaps(home):
    result = ckptavg("plot", "ensemble", "run", *SCORED, "--train-data", "net.py:data")
    assert result.exit_code == 0, result.output
    head, _, *rows = result.stdout.splitlines()[:6]
    for title in ("number of checkpoints", "average, top-1 %", "ensemble", "gap of outputs"):
        assert title in head
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    assert "the ensemble of 4" in result.stdout
    assert "the average costs one forward pass, the ensemble 4" in result.stdout


def test_plot_ensemble_takes_the_first_checkpoints(home):
    result = ckptavg("plot", "ensemble", "run", *SCORED, "--order", "first", "--json")
    plain = json.loads(result.stdout)
    assert (plain["kind"], plain["facts"]["order"]) == ("ensemble", "first")
    assert [mark["x"] for mark in plain["checkpoints"]] == [1, 2, 3, 4]


def test_plot_ensemble_resumes(home):
    arguments = ("plot", "ensemble", "run", *SCORED, "--results", "e.json")
    assert ckptavg(*arguments).exit_code == 0
    result = ckptavg(*arguments, "--resume")
    assert "7 of 7 points are in e.json" in result.stderr
    assert "the ensemble of 4" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--model", "net.py:model"], "Missing option '--data'"),
        (["run/epoch_1.pt", *SCORED], "needs two checkpoints"),
        (["run", *SCORED, "--resume"], "--resume needs --results"),
    ],
    ids=["data", "single", "resume"],
)
def test_plot_ensemble_refuses_in_a_line(home, arguments, message):
    assert message in one_line_error(ckptavg("plot", "ensemble", *arguments), 2)
