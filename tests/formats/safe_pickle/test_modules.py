"""Modules that were pickled whole are read without their class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ckptavg.averaging.api import average
from ckptavg.averaging.compute import read_state_dict
from ckptavg.formats import open_checkpoint
from ckptavg.formats.safe_pickle import modules
from ckptavg.formats.safe_pickle.values import Global, Opaque
from ckptavg.runs.run import open_run


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(2, 3, bias=False)
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.absent = None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.shared = self.blocks[0].linear


def read(path) -> dict[str, torch.Tensor]:
    return read_state_dict(open_checkpoint(path))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda net: net, ""),
        (lambda net: {"model": net, "epoch": 3, "ema": None}, "model"),
        (lambda net: {"model": None, "ema": net, "updates": 5}, "ema"),
    ],
)
def test_pickled_module_gives_its_state_dict(tmp_path, wrap, key, legacy):
    net = Net()
    torch.save(wrap(net), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    expected = net.state_dict()
    found = read(tmp_path / "x.pt")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.key == key
    assert ["blocks.0.linear.weight", "shared.weight"] in checkpoint.ties()
    assert any("pickled module" in note for note in checkpoint.notes)


def test_pickled_module_can_be_chosen_by_key(tmp_path):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save({"model": one, "teacher": other}, tmp_path / "x.pt")
    found = read_state_dict(open_checkpoint(tmp_path / "x.pt", "teacher"))
    assert torch.equal(found["weight"], other.weight)


def test_pickled_modules_are_averaged(tmp_path):
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for i, net in enumerate(nets):
        torch.save({"model": net, "epoch": i}, tmp_path / f"epoch_{i}.pt")
    expected = (nets[0].weight.double() + nets[1].weight.double()) / 2
    assert torch.equal(average(open_run(tmp_path))["weight"], expected.float())


def test_state_dict_refuses_module_holding_itself():
    loop = Opaque(Global("x", "Net"))
    loop.state = {"_parameters": {}, "_buffers": {}, "_modules": {"me": loop}}
    with pytest.raises(modules.MalformedPickle, match="holds more others"):
        modules.state_dict(loop)


def test_pickled_module_holding_itself_is_one_error(tmp_path, refusal):
    net = nn.Linear(2, 2)
    net._modules["me"] = net
    torch.save(net, tmp_path / "x.pt")
    assert "holds more others" in refusal(tmp_path / "x.pt")


def test_state_dict_is_found_in_nested_trainer_state(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    torch.save({"state": {"model": state, "run_name": "x"}, "rng": []}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.key, list(checkpoint.tensors)) == ("state.model", ["weight", "bias"])
