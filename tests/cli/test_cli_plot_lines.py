"""``ckptavg plot segment``, ``rays`` and ``reliability`` against Python, and errors before work."""

import json

import pytest
from click.testing import CliRunner
from helpers import listing
from landscapes import Net, data_of, save_run

import ckptavg
from ckptavg.cli import main

SOURCE = """
from landscapes import Net, data_of

def train():
    return data_of(1, 96)

def test():
    return data_of(2)

def broken():
    raise RuntimeError("work began")
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    save_run(tmp_path / "run")
    (tmp_path / "own.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH = ("--model", "own.py:Net", "--data", "own.py:test", "--train-data", "own.py:train")


def plot(kind, *arguments):
    return CliRunner().invoke(main, ["plot", kind, *map(str, arguments), "--device", "cpu"])


def printed(kind, *arguments):
    result = plot(kind, "run", *WITH, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_plot_segment_is_that_of_python(home):
    shown = printed("segment", "--points", 3, "--beyond", 0.5, "--weight-decay", 0.1)
    wanted = ckptavg.segment(
        "run", Net(), data_of(2), train_data=data_of(1, 96), points=3, beyond=0.5,
        weight_decay=0.1, device="cpu",
    )  # fmt: skip
    for name in ("points", "checkpoints", "averages"):
        assert shown[name] == json.loads(json.dumps(wanted.as_json()[name]))


def test_plot_segment_shows_barriers_and_stores_points(home):
    result = plot("segment", "run", *WITH, "--points", 2, "--beyond", 0, "--results", "s.json")
    assert result.exit_code == 0, result.output
    assert "average and last are" in result.stdout
    head = next(line for line in result.stdout.splitlines() if line.startswith("metric"))
    assert head.split() == ["metric", "data", "average", "last", "barrier", "at", "t"]
    stored = json.loads((home / "s.json").read_text())
    assert [point["x"] for point in stored["points"]] == [0, 1]


def test_plot_segment_reaches_another_run(home):
    save_run(home / "other", 2)
    shown = printed("segment", "--ends", "first,other", "--points", 2, "--beyond", 0)
    assert [len(point["coefficients"]) for point in shown["points"]] == [6, 6]
    assert shown["facts"]["ends"] == ["first", "other/step_2.pt"]


def test_plot_rays_is_that_of_python(home):
    shown = printed("rays", "--directions", 2, "--points", 3, "--radius", 2, "--seed", 7)
    wanted = ckptavg.rays(
        "run", Net(), data_of(2), train_data=data_of(1, 96), directions=2, points=3, radius=2.0,
        seed=7, device="cpu",
    )  # fmt: skip
    for name in ("points", "checkpoints", "averages"):
        assert shown[name] == json.loads(json.dumps(wanted.as_json()[name]))


def test_plot_rays_shows_widths_and_resumes(home):
    options = ("--directions", 2, "--points", 3, "--rise", 0.01, "--results", "r.json")
    result = plot("rays", "run", *WITH, *options)
    assert result.exit_code == 0, result.output
    assert "2 rays of length" in result.stdout
    assert "a rise of 0.01 nats in NLL on training data is reached at t = " in result.stdout
    again = plot("rays", "run", *WITH, *options, "--resume")
    assert again.exit_code == 0, again.output
    # The two centers, the own statistics of the last, and two points in each direction from both.
    assert "11 of 11 points are in r.json" in again.stderr
    assert again.stdout == result.stdout


def test_plot_reliability_is_that_of_python(home):
    shown = printed("reliability", "--last", 3)
    run = ckptavg.open_run("run")
    wanted = ckptavg.reliability(
        run, Net(), data_of(2), train_data=data_of(1, 96), selection=run.last(3), device="cpu"
    )
    assert shown["points"] == json.loads(json.dumps(wanted.as_json()["points"]))
    assert list(shown["facts"]["ece"]) == [
        "step_5.pt (last)", "average of 3 (uniform)", "FGE ensemble of 3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "arguments", "code", "message"),
    [
        ("segment", ["--ends", "last,lst"], 2, "no point is called 'lst'. Did you mean last?"),
        ("segment", ["--ends", "last"], 2, "a segment has two ends"),
        ("segment", ["--ends", "last,step_5"], 2, "the two ends of the segment are the same"),
        ("segment", ["--last", "1"], 2, "the two ends of the segment are the same"),
        ("segment", ["--points", "1"], 2, "1 is not in the range x>=2"),
        ("segment", ["--beyond", "-1"], 2, "-1.0 is not in the range x>=0"),
        ("segment", ["--resume"], 2, "--resume needs --results"),
        ("rays", ["--radius", "-1"], 2, "-1.0 is not in the range x>0"),
        ("rays", ["--radius", "nan"], 2, "--radius is expected to be a number above 0"),
        ("rays", ["--rise", "inf"], 2, "--rise is expected to be a number above 0"),
        ("rays", ["--centers", "average"], 2, "Give --radius."),
        ("rays", ["--centers", "last,step_5.pt"], 2, "two centers of rays are the same"),
        ("rays", ["--directions", "0"], 2, "expected a whole number from 1 on"),
        ("rays", ["--points", "1"], 2, "1 is not in the range x>=2"),
        ("rays", ["-o", "rays.gif"], 2, "figures end in"),
        ("rays", ["--results", "missing/r.json"], 1, "the directory missing does not exist"),
        ("reliability", ["--task", "regression"], 2, "Regression has no bins of confidence"),
        ("reliability", ["--resume"], 2, "--resume"),
    ],
)
def test_plot_refuses_before_work(home, kind, arguments, code, message):
    before = listing(home)
    with_broken = ["broken" if word == "own.py:Net" else word for word in WITH]
    with_broken[1] = "own.py:broken"
    result = plot(kind, "run", *with_broken, *arguments)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert "work began" not in result.output
    assert listing(home) == before
