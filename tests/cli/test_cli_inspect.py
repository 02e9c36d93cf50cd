"""``ckptavg inspect``: what a person sees and what a program gets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import save, save_states

from ckptavg.cli import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five checkpoints along a line, a unit apart."""
    monkeypatch.chdir(tmp_path)
    save_states(tmp_path / "run", [{"w": torch.tensor([3.0, float(i)])} for i in range(5)])
    return tmp_path / "run"


def inspect(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def test_geometry_table_has_row_per_checkpoint(run: Path) -> None:
    result = inspect("run", "--geometry")
    assert result.exit_code == 0, result.output
    title = "geometry of the weights"
    listing, _, measured = result.stdout.partition(title)
    assert "epoch_1.pt" in listing
    cells = [line.split() for line in measured.splitlines() if line.startswith("epoch_")]
    assert cells[0] == ["epoch_1.pt", "3.000", "–", "2.000", "1.000", "4.000"]
    assert cells[4] == ["epoch_5.pt", "5.000", "1.000", "2.000", "1.000", "4.000"]
    assert "mean cosine 1.00" in measured
    assert "no checkpoint stands apart" in measured
    assert max(map(len, measured.splitlines())) <= 80


def test_geometry_points_at_an_outlier(run: Path) -> None:
    torch.save({"w": torch.tensor([203.0, 1.0])}, run / "epoch_2.pt")
    line = inspect("run", "--geometry").stdout.splitlines()[-1]
    assert line == (
        "epoch_2.pt stands apart: 200 to the nearest of the others; "
        "each of the others has a neighbour within 2"
    )


def test_geometry_names_two_outliers(run: Path) -> None:
    more = [{"w": torch.tensor([3.0, float(i)])} for i in range(8)]
    odd = [{"w": torch.tensor([303.0, float(i)])} for i in range(2)]
    save_states(run, [*more, *odd])
    line = inspect("run", "--geometry").stdout.splitlines()[-1]
    assert line.startswith("epoch_9.pt, epoch_10.pt stand apart: 300 to")


def test_geometry_json_extends_that_of_inspect(run: Path) -> None:
    listed = json.loads(inspect("run", "--json").stdout)
    both = json.loads(inspect("run", "--json", "--geometry").stdout)
    geometry = both.pop("geometry")
    assert both == listed
    assert geometry["gram"][1] == [9, 10, 11, 12, 13]
    assert geometry["distances"][1] == [1, 0, 1, 2, 3]
    assert geometry["norms"][4] == 5
    assert geometry["steps"] == [1, 1, 1, 1]
    assert geometry["turns"] == [1, 1, 1]
    assert geometry["to_mean"] == [2, 1, 0, 1, 2]
    assert math.isclose(geometry["cosines"][0][4], 3 / 5)
    assert geometry["odd"] is None
    torch.save({"w": torch.tensor([3.0, 201.0])}, run / "epoch_2.pt")
    odd = json.loads(inspect("run", "--json", "--geometry").stdout)["geometry"]["odd"]
    assert odd == {"checkpoints": ["run/epoch_2.pt"], "distance": 197, "usual": 2}


def test_geometry_seeks_no_outlier_among_few(run: Path) -> None:
    result = inspect("run", "--geometry", "--glob", "*_[135].pt")
    assert result.stdout.splitlines()[-1] == "too few checkpoints to tell whether one stands apart"


def test_geometry_of_equal_checkpoints_has_no_cosines(run: Path) -> None:
    save_states(run, [{"w": torch.zeros(2)}] * 5)
    result = inspect("run", "--geometry")
    assert result.exit_code == 0, result.output
    assert "successive steps" not in result.stdout
    cosines = json.loads(inspect("run", "--geometry", "--json").stdout)["geometry"]["cosines"]
    assert cosines == [[None] * 5] * 5


@pytest.mark.parametrize("args", [["run/epoch_1.pt"], ["run", "--glob", "epoch_1.pt"]])
def test_geometry_needs_several_checkpoints(run: Path, args: list[str]) -> None:
    result = inspect(*args, "--geometry")
    assert result.exit_code == 2
    assert "is one" in result.stderr.splitlines()[-1]


def test_geometry_refuses_weights_not_finite(run: Path) -> None:
    torch.save({"w": torch.tensor([math.nan, 1.0])}, run / "epoch_2.pt")
    result = inspect("run", "--geometry")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(
        "Error: NaN, infinite or huge weights in run/epoch_2.pt."
    )


def test_inspect_shows_large_steps_in_full(run: Path) -> None:
    for name, step in (("a", 1234567), ("b", 1234568), ("c", 1234568)):
        weights = {"w": torch.tensor([float(ord(name))])}
        torch.save({"model": weights, "global_step": step}, run / f"{name}.pt")
    shown = inspect("run", "--glob", "[abc].pt")
    assert shown.stdout.count("1234568") == 3  # twice in the table, once in a note
    assert "1234567" in shown.stdout
    assert "e+0" not in shown.stdout
    planned = CliRunner().invoke(main, ["average", "run", "--glob", "[ab].pt", "--dry-run"])
    assert "1234567" in planned.stdout
    missed = CliRunner().invoke(
        main, ["average", "run", "--glob", "[ab].pt", "--from", "2234567", "--dry-run"]
    )
    assert "steps 2234567 to inf" in missed.stderr


@pytest.fixture
def own_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six epochs of somebody's own training loop, with a cycle of two epochs."""
    monkeypatch.chdir(tmp_path)
    for i in range(1, 7):
        rate = 0.1 if i % 2 else 0.01
        beside = {"ep": i, "it": 40 * i, "current_lr": rate, "rng": torch.get_rng_state()}
        metrics = {"tr_norm": i / 7, "train_loss": 1 / i, "val_acc": 0.5 + i / 20, "width": 8}
        optim = {"state": {}, "param_groups": [{"lr": rate}]}
        weights = {"w": torch.tensor([float(i)])}
        save(tmp_path / "own" / f"cnn-{i}.pth", weights, optim=optim, **beside, **metrics)
    return tmp_path / "own"


def test_inspect_shows_metrics_and_no_counters(own_loop: Path) -> None:
    shown = inspect(own_loop).stdout.splitlines()
    columns = shown[1].split()
    assert columns[:7] == ["checkpoint", "step", "epoch", "LR", "val_acc", "train_loss", "tr_norm"]
    assert shown[3].split()[:6] == ["cnn-1.pth", "1", "1", "0.1", "0.55", "1"]
    assert "the same in all: width 8" in shown
    (line,) = (s for s in inspect(own_loop / "cnn-1.pth").stdout.splitlines() if "recorded" in s)
    assert line == "recorded: val_acc 0.55, train_loss 1, tr_norm 0.142857, width 8"


def test_inspect_shows_no_metrics_of_inputs_for_an_average(own_loop: Path) -> None:
    made = CliRunner().invoke(main, ["average", "own", "-o", "swa.pth"])
    told = "measured on the last checkpoint, so not taken over: tr_norm, train_loss, val_acc"
    assert told in made.stderr
    found = json.loads(inspect("swa.pth", "--json").stdout)
    assert found["metrics"].keys() == {"width"}


def test_inspect_names_the_directory_of_inputs_once(own_loop: Path) -> None:
    CliRunner().invoke(main, ["average", str(own_loop), "-o", "swa.pth"])
    shown = inspect("swa.pth").stdout.splitlines()
    (title,) = (i for i, line in enumerate(shown) if line.startswith("made by ckptavg"))
    assert shown[title].endswith(f", from {own_loop}")
    rows = [line.split() for line in shown[title + 3 : title + 9]]
    assert [row[:2] for row in rows] == [[f"cnn-{i}.pth", str(i)] for i in range(1, 7)]


@pytest.mark.parametrize(
    "which",
    [
        ["--last", "2"],
        ["--every", "4"],
        ["--from", "2", "--to", "5"],
        ["--best", "3", "--metric", "train_loss", "--mode", "max"],
        ["--at-lr-min"],
        ["--at-lr-min", "--last", "1"],
        ["--cycle", "3:1"],
        ["--sample", "3:7"],
        ["--glob", "cnn-[345].pth"],
        ["--skip", "cnn-6.pth", "--last", "2"],
    ],
)
def test_inspect_selects_as_average_does(own_loop: Path, which: list[str]) -> None:
    planned = CliRunner().invoke(main, ["average", "own", "--dry-run", "--json", *which])
    taken = [Path(c["path"]).name for c in json.loads(planned.stdout)["checkpoints"]]
    assert 0 < len(taken) < 6
    shown = json.loads(inspect(own_loop, "--json", *which).stdout)
    assert [Path(c["path"]).name for c in shown["checkpoints"]] == taken
    lines = inspect(own_loop, *which).stdout.splitlines()
    assert [line.split()[0] for line in lines[3 : 3 + len(taken)]] == taken


def test_inspect_notes_a_selection(own_loop: Path) -> None:
    shown = inspect(own_loop, "--last", "50")
    assert "6 of 6 checkpoints in order" in shown.stdout
    assert "note: the last 50 are asked for, and there are only 6" in shown.stdout
    assert "the learning rate is cyclical" in shown.stderr
    assert "one checkpoint is selected" not in inspect(own_loop, "--last", "1").stderr


def test_inspect_refuses_empty_or_partial_selections(own_loop: Path) -> None:
    missed = CliRunner().invoke(main, ["inspect", "own", "--from", "40"])
    assert (missed.exit_code, missed.stdout) == (1, "")
    assert CliRunner().invoke(main, ["inspect", "own", "--metric", "val_acc"]).exit_code == 2
