"""``--forward``: a function of the user's runs the model, wherever a command runs one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from helpers import save_states
from torch import nn

from ckptavg.cli import main

MODULE = """
import random

import numpy as np
import torch
from torch import nn
from ckptavg import Task

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, image, scale):
        return self.head(self.norm(image * scale))

def data():
    g = torch.Generator().manual_seed(1)
    images, targets = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
    scales = 1 + torch.rand(30, generator=g)
    keys = "picture", "gain", "label"
    return [dict(zip(keys, sample)) for sample in zip(images, scales, targets)]

def loader():
    return torch.utils.data.DataLoader(data(), 7)

class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.samples = data()

    def __len__(self):
        return 30

    def __getitem__(self, index):
        noise = torch.rand(4) + np.random.rand() + random.random()
        return {**self.samples[index], "picture": self.samples[index]["picture"] + noise}

def noisy_loader():
    return torch.utils.data.DataLoader(Noisy(), 7, num_workers=1)

def call(model, batch):
    return model(batch["picture"], batch["gain"][:, None])

class Calling(Task):
    def split(self, batch):
        return (batch["picture"], batch["gain"][:, None]), batch["label"]

    def forward(self, model, inputs):
        return model(*inputs)

class Nested:
    run = staticmethod(call)

def alone(model):
    return model

def keywords(model, *, batch):
    return model
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of three checkpoints of a model that takes two inputs."""
    (tmp_path / "scaled_images.py").write_text(MODULE)
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "head": nn.Linear(4, 3)})
        states.append(layers.state_dict())
    save_states(tmp_path / "run", states)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = (
    "--model", "scaled_images.py:Scaled", "--device", "cpu",
    "--train-data", "scaled_images.py:loader",
)  # fmt: skip
EVAL = (*TRAIN, "--data", "scaled_images.py:loader")


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """What the layer sees, and the labels; made as the module makes them."""
    g = torch.Generator().manual_seed(1)
    images, targets = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
    return (images * (1 + torch.rand(30, generator=g))[:, None]).double(), targets


def ckptavg(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def assert_right(path: str) -> None:
    state = torch.load(path)
    state = state.get("state_dict", state)
    seen = samples()[0]
    assert torch.allclose(state["norm.running_mean"].double(), seen.mean(0), atol=1e-6)
    assert torch.allclose(state["norm.running_var"].double(), seen.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--forward", "scaled_images.py:call"],
        ["--forward", "scaled_images:call"],
        ["--forward", "scaled_images.py:Nested.run"],
        ["--task", "scaled_images.py:Calling"],
    ],
    ids=["file", "module", "nested", "task"],
)
@pytest.mark.parametrize("command", [["update-bn", "run/epoch_1.pt"], ["average", "run"]])
@pytest.mark.usefixtures("home")
def test_forward_option_recomputes_statistics(command: list[str], flags: list[str]) -> None:
    """A task that only calls the model does as well: without scores it needs no metrics."""
    result = ckptavg(*command, *TRAIN, *flags, "-o", "out.pt")
    assert result.exit_code == 0, result.output
    assert_right("out.pt")


def scores(*flags: str) -> list[dict[str, Any]]:
    result = ckptavg("eval", "--run", "run", *EVAL, *flags, "--json")
    assert result.exit_code == 0, result.output
    return [candidate["metrics"] for candidate in json.loads(result.stdout)["candidates"]]


@pytest.mark.usefixtures("home")
def test_forward_option_scores_candidates() -> None:
    found = scores("--forward", "scaled_images.py:call")
    seen, targets = samples()
    states = [torch.load(f"run/epoch_{i}.pt") for i in (1, 2, 3)]
    weight, bias = (
        torch.stack([s[n] for s in states]).double().mean(0) for n in ("head.weight", "head.bias")
    )
    normal = (seen - seen.mean(0)) / (seen.var(0) + 1e-5).sqrt()
    expected = nn.functional.cross_entropy(normal @ weight.T + bias, targets)
    assert found[-1]["nll"] == pytest.approx(float(expected), rel=1e-6)
    assert {metrics["n"] for metrics in found} == {30}


@pytest.mark.usefixtures("home")
def test_forward_option_changes_keys_of_results() -> None:
    flags = ("--results", "r.json", "--resume")
    scores("--forward", "scaled_images.py:call", *flags)
    again = ckptavg("eval", "--run", "run", *EVAL, *flags, "--forward", "scaled_images.py:call")
    other = ckptavg("eval", "--run", "run", *EVAL, *flags, "--forward", "scaled_images:call")
    assert "3 of 3 candidates are in r.json" in again.stderr
    assert "0 of 3 candidates are in r.json" in other.stderr


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("call", 2, "expected path/file.py:function or package.module:function but got 'call'"),
        ("scaled_images.py:cal", 1, "Did you mean call"),
        ("scaled_images.py:alone", 1, r"a function of a model and a batch but takes \(model\)"),
        ("scaled_images.py:keywords", 1, r"but takes \(model, batch\)"),
        ("scaled_images.py:Calling", 1, "a function of a model and a batch"),
    ],
)
@pytest.mark.parametrize("command", [["update-bn", "run/epoch_1.pt"], ["average", "run"], ["eval"]])
@pytest.mark.usefixtures("home")
def test_forward_option_refuses_unsuitable_functions(
    command: list[str], spec: str, code: int, words: str
) -> None:
    flags = ["--run", "run", *EVAL] if command == ["eval"] else [*TRAIN, "-o", "out.pt"]
    result = ckptavg(*command, *flags, "--forward", spec)
    assert result.exit_code == code, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert re.search(words, line), line
    assert not Path("out.pt").exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("data", ["Noisy", "noisy_loader"])
def test_eval_repeats_scores_under_augmentation(data: str) -> None:
    """Random changes of samples, from torch's, numpy's and Python's generators, are seeded."""
    flags = [*TRAIN[:4], "--data", f"scaled_images.py:{data}", "--train-data",
             f"scaled_images.py:{data}", "--forward", "scaled_images.py:call"]  # fmt: skip
    calls = []
    for seed in (0, 0, 0, 1):
        result = ckptavg("eval", "--run", "run", *flags, "--seed", seed, "--json")
        assert result.exit_code == 0, result.output
        calls.append([c["metrics"]["nll"] for c in json.loads(result.stdout)["candidates"]])
    assert calls[0] == calls[1] == calls[2] != calls[3]
