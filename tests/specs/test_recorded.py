"""Models that checkpoints record: what is taken of them, and what is not."""

import argparse

import pytest
import torch
from click.testing import CliRunner

from ckptavg.cli import main
from ckptavg.formats import open_checkpoint
from ckptavg.specs.recorded import complete_source

WEIGHTS = {"weight": torch.zeros(2, 2)}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def saved(**entries):
    torch.save({"state_dict": WEIGHTS, **entries}, "c.ckpt")
    return open_checkpoint("c.ckpt")


def timm_like(**changes):
    args = {"model": "resnet18", "num_classes": 10, "img_size": None} | changes
    return saved(version=2, arch="resnet", args=argparse.Namespace(**args))


def test_read_settings_gives_plain_values_without_weights():
    opened = saved(args=argparse.Namespace(a=1), hyper_parameters={"width": 3, "net": object})
    settings = opened.format.read_settings(opened)
    assert settings["args"] == argparse.Namespace(a=1)
    assert settings["hyper_parameters"] == {"width": 3}
    assert "state_dict" not in settings


@pytest.mark.parametrize("entries", [{"version": 2}, {"args": {"model": "resnet18"}}])
def test_complete_source_finds_no_model_in_other_trainings(entries):
    assert complete_source(None, {}, [saved(**entries)]) is None


def test_complete_source_ignores_torchvision_arguments():
    """Its training script records a model's name, too, but not its number of classes."""
    opened = saved(version=1, args=argparse.Namespace(model="resnet18", data_path="/data"))
    assert complete_source(None, {}, [opened]) is None


def test_complete_source_takes_first_recorded_model():
    torch.save(WEIGHTS, "plain.pt")
    source = complete_source(None, {}, [open_checkpoint("plain.pt"), timm_like()])
    assert source.spec == "timm:resnet18"
    assert source.arguments == {"num_classes": 10}


MODULES = """
import torch

class LightningModule(torch.nn.Module):
    def configure_model(self): pass

class Lit(LightningModule):
    def __init__(self, width, rate=0.1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width, 2))

class Open(LightningModule):
    def __init__(self, width, **others):
        super().__init__()
        self.others = others

class Plain(torch.nn.Module):
    def __init__(self, width=1):
        super().__init__()
"""


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("kinds.py:Lit", {"width": 2}),
        ("lightning:kinds.py:Lit", {"width": 2}),
        ("lightning:kinds:Lit", {"width": 2}),
        ("kinds.py:Open", {"width": 2, "unused": 1}),
        ("kinds.py:Plain", {}),
        ("lightning:kinds.py:Plain", {"width": 2}),
    ],
)
def test_hyperparameters_are_fitted_to_the_class(tmp_path, monkeypatch, spec, expected):
    (tmp_path / "kinds.py").write_text(MODULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "kinds", raising=False)
    opened = saved(hyper_parameters={"width": 2, "unused": 1, "_class_path": "kinds.Lit"})
    assert complete_source(spec, {}, [opened]).arguments == expected
    assert complete_source(spec, {"width": 9}, [opened]).arguments == {**expected, "width": 9}


@pytest.mark.parametrize("command", ["eval", "update-bn", "average"])
def test_model_option_is_needed_without_a_recorded_model(command):
    saved(epoch=1)
    words = {
        "eval": ["eval", "c.ckpt", "--data", "own.py:data"],
        "update-bn": ["update-bn", "c.ckpt", "--train-data", "own.py:data", "-o", "out.ckpt"],
        "average": ["average", "c.ckpt", "--train-data", "own.py:data", "-o", "out.ckpt"],
    }
    result = CliRunner().invoke(main, words[command])
    assert result.exit_code == 2
    assert "Missing option '--model'" in result.stderr
    assert "torchvision:NAME" in result.stderr


def test_model_option_suggests_the_prefix():
    saved(epoch=1)
    words = ["eval", "c.ckpt", "--data", "own.py:data", "--model", "torchvison:resnet18"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "Did you mean torchvision:resnet18?" in result.stderr
