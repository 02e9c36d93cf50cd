"""``--bn-exclude`` on the command line, and what commands say of statistics that stay."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers import same_bits, save

from ckptavg import open_checkpoint
from ckptavg.averaging.compute import read_state_dict
from ckptavg.cli import main

NET = """
import torch
from torch import nn

def model(norm="batch"):
    stem = nn.BatchNorm1d(4) if norm == "batch" else nn.Identity()
    head = nn.BatchNorm1d(4) if norm == "batch" else nn.LayerNorm(4)
    parts = {"stem": nn.Sequential(nn.Linear(8, 4), stem), "norm": head, "head": nn.Linear(4, 3)}
    net = nn.Sequential()
    for name, part in parts.items():
        net.add_module(name, part)
    return net

def data():
    g = torch.Generator().manual_seed(0)
    x = 3 + torch.randn(40, 8, generator=g)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (40,), generator=g))
"""
WITH = ["--model", "layered.py:model", "--train-data", "layered.py:data"]


@pytest.fixture
def ckptavg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layered.py").write_text(NET)

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, result.output
        return result

    return run


def make_run(tmp_path, norm="batch", frozen=()):
    spaces = {}
    exec(NET, spaces)
    torch.manual_seed(0)
    model = spaces["model"](norm)
    for i in (1, 2, 3):
        state = {}
        for name, value in model.state_dict().items():
            kept = name.startswith(tuple(frozen)) and "running" in name
            offset = 0.5 if kept else 0.1 * i
            state[name] = value + offset if value.is_floating_point() else value + i
        save(tmp_path / f"run/epoch_{i}.pt", state)


def statistics(path):
    found = read_state_dict(open_checkpoint(path))
    return {name: value for name, value in found.items() if "running" in name}


def test_bn_exclude_keeps_layers_in_average_and_update_bn(tmp_path, ckptavg):
    make_run(tmp_path)
    ckptavg("average", "run", "-o", "plain.pt")
    ckptavg("average", "run", "-o", "a.pt", *WITH, "--bn-exclude", "stem.*")
    ckptavg("update-bn", "plain.pt", "-o", "b.pt", *WITH, "--bn-exclude", "stem.?")
    plain, averaged, updated = (statistics(f"{name}.pt") for name in ("plain", "a", "b"))
    for name, value in plain.items():
        assert same_bits(averaged[name], updated[name])
        assert same_bits(averaged[name], value) is name.startswith("stem"), name
    shown = ckptavg("inspect", "a.pt").stdout
    assert "BatchNorm statistics recomputed" in shown
    assert "BatchNorm excluded: stem.1" in shown


def test_bn_exclude_keeps_layers_in_eval(tmp_path, ckptavg):
    make_run(tmp_path)
    arguments = ["eval", "--run", "run", *WITH, "--data", "layered.py:data", "--json"]
    found = json.loads(ckptavg(*arguments, "--bn-exclude", "stem.*").stdout)["candidates"]
    assert [(c["bn"], c.get("bn_layers")) for c in found] == [
        ("own", None), ("stale", None), ("recomputed", {"excluded": ["stem.1"]}),
    ]  # fmt: skip
    everything = json.loads(ckptavg(*arguments).stdout)["candidates"]
    assert everything[2]["metrics"] != found[2]["metrics"]
    assert everything[2]["key"] != found[2]["key"]
    assert everything[1]["key"] == found[1]["key"]


def test_bn_exclude_of_all_layers_scores_averages_once(tmp_path, ckptavg):
    make_run(tmp_path)
    ckptavg("average", "run", "-o", "a.pt")
    scored = ["eval", "a.pt", "--run", "run", "--also", "two=uniform@last=2"]
    scored += [*WITH, "--data", "layered.py:data", "--bn-exclude", "*"]
    found = json.loads(ckptavg(*scored, "--json").stdout)["candidates"]
    assert [c["bn"] for c in found] == ["stale", "own", "stale", "stale"]
    assert len({c["name"] for c in found}) == 4
    assert ckptavg(*scored).stdout.count("stale") == 3
    (alone,) = json.loads(ckptavg(*scored[:2], *scored[6:], "--no-stale", "--json").stdout)[
        "candidates"
    ]
    assert alone["metrics"] == found[0]["metrics"]
    stored = [*scored, "--results", "r.json", "--json"]
    assert json.loads(ckptavg(*stored).stdout)["candidates"] == found
    again = ckptavg(*stored, "--resume")
    assert "7 of 7 candidates" in again.stderr
    assert json.loads(again.stdout)["candidates"] == found


@pytest.mark.parametrize(
    "command",
    [
        ["average", "run", "-o", "a.pt", *WITH],
        ["update-bn", "run/epoch_1.pt", "-o", "a.pt", *WITH],
        ["eval", "--run", "run", *WITH, "--data", "layered.py:data"],
    ],
    ids=lambda command: command[0],
)
def test_bn_exclude_must_match_a_layer(tmp_path, ckptavg, command):
    make_run(tmp_path)
    result = ckptavg(*command, "--bn-exclude", "stme.*", code=2)
    assert "'stme.*' matches no BatchNorm layer" in result.stderr
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("command", ["average", "eval"])
def test_bn_exclude_needs_training_data(tmp_path, ckptavg, command):
    make_run(tmp_path)
    paths = ["run", "--dry-run"] if command == "average" else [
        "--run", "run", "--model", "layered.py:model", "--data", "layered.py:data"
    ]  # fmt: skip
    assert "--train-data" in ckptavg(command, *paths, "--bn-exclude", "stem.*", code=2).stderr


def test_frozen_layers_are_noted_and_kept(tmp_path, ckptavg):
    make_run(tmp_path, frozen=["stem"])
    for arguments in (["average", "run", "-o", "a.pt"], ["average", "run", "-o", "b.pt", *WITH]):
        result = ckptavg(*arguments)
        assert "1 of 2 BatchNorm layers were frozen in training" in result.stderr
        assert "stem.1" in result.stderr
    ckptavg("update-bn", "a.pt", *WITH, "-o", "c.pt")
    for name in ("a", "b", "c"):
        assert statistics(f"{name}.pt")["stem.1.running_mean"].tolist() == [0.5] * 4
    assert "BatchNorm frozen: stem.1" in ckptavg("inspect", "c.pt").stdout


def test_frozen_layers_alone_leave_nothing_to_recompute(tmp_path, ckptavg):
    make_run(tmp_path, frozen=["stem", "norm"])
    result = ckptavg("eval", "--run", "run", *WITH, "--data", "layered.py:data", "--json")
    assert [c["bn"] for c in json.loads(result.stdout)["candidates"]] == ["own", "frozen"]
    assert "nothing to recompute" in result.stderr
    result = ckptavg("average", "run", *WITH, "-o", "a.pt")
    assert "BatchNorm statistics: frozen" in result.stdout
    assert "stale" not in result.output
    result = ckptavg("update-bn", "a.pt", *WITH, "-o", "b.pt")
    assert result.stderr == (
        "note: nothing to recompute, as all BatchNorm layers are frozen (norm, stem.1): their "
        "statistics fit as they are\n"
    )
    assert result.stdout == "wrote b.pt (its statistics unchanged: frozen)\n"
    for name, value in statistics("a.pt").items():
        assert same_bits(value, statistics("b.pt")[name])


def test_training_data_without_batchnorm_are_noted(tmp_path, ckptavg):
    make_run(tmp_path, norm="layer")
    layer = ["--model-arg", "norm=layer"]
    result = ckptavg("average", "run", *WITH, *layer, "-o", "a.pt")
    assert "nothing to recompute" in result.stderr
    result = ckptavg("eval", "--run", "run", *WITH, *layer, "--data", "layered.py:data",
                     "--fail-if-worse", "--json")  # fmt: skip
    assert [c["bn"] for c in json.loads(result.stdout)["candidates"]] == ["none", "none"]
    assert "nothing to recompute" in result.stderr
    result = ckptavg("update-bn", "a.pt", *WITH, *layer, "-o", "b.pt")
    assert "no BatchNorm layers: nothing to recompute" in result.stderr
    assert result.stdout == "wrote b.pt (no BatchNorm statistics)\n"


@pytest.mark.parametrize(
    ("frozen", "words"),
    [((), "excluded (norm, stem.1)"), (["stem"], "frozen (stem.1) or excluded (norm)")],
)
def test_bn_exclude_of_all_layers_is_noted(tmp_path, ckptavg, frozen, words):
    make_run(tmp_path, frozen=frozen)
    ckptavg("average", "run", "-o", "a.pt")
    result = ckptavg("update-bn", "a.pt", *WITH, "--bn-exclude", "*", "-o", "b.pt")
    assert result.stderr == (
        f"note: nothing to recompute, as all BatchNorm layers are {words}: exclude fewer to change "
        "that\n"
    )
    assert result.stdout == "wrote b.pt (its statistics unchanged: stale)\n"
    for name, value in statistics("a.pt").items():
        assert same_bits(value, statistics("b.pt")[name])
