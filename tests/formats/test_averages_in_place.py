"""Trainers that keep a running average where the weights are looked for: which entry is which."""

from __future__ import annotations

import pytest
import torch

from ckptavg.formats import open_checkpoint


@pytest.fixture
def opened(tmp_path):
    """Save something and open it."""

    def save_and_open(value, key=None):
        torch.save(value, tmp_path / "epoch_2.pth")
        return open_checkpoint(tmp_path / "epoch_2.pth", key)

    return save_and_open


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"stem.conv.weight": torch.full((2, 2), value), "head.bias": torch.full((3,), value)}


def wrapped(value: float, **counter: int) -> dict[str, torch.Tensor]:
    """A state dict of an averaged model: its counter first, then the weights under a wrapper."""
    counted = {name: torch.tensor(count) for name, count in counter.items()}
    return counted | {f"module.{name}": tensor for name, tensor in weights(value).items()}


def mmengine_checkpoint() -> dict[str, object]:
    """As mmengine's EMAHook leaves it: the moving average under ``state_dict``."""
    return {
        "meta": {"epoch": 2, "iter": 8},
        "state_dict": weights(0.5),
        "message_hub": {},
        "ema_state_dict": wrapped(1.0, steps=8),
    }


@pytest.mark.parametrize("key", [None, "state_dict", "ema_state_dict"])
def test_mmengine_ema_swap_is_noted(opened, key):
    (note,) = opened(mmengine_checkpoint(), key).notes
    assert "'state_dict' holds the moving average" in note
    assert "'ema_state_dict' the weights as trained (`key='ema_state_dict'`)" in note


def test_mmengine_trained_weights_have_names_of_average(opened):
    average = opened(mmengine_checkpoint())
    trained = opened(mmengine_checkpoint(), "ema_state_dict")
    assert average.key == "state_dict"
    assert list(trained.tensors) == list(average.tensors) == list(weights(0))


def test_ema_state_dict_beside_weights_is_noted(opened):
    (note,) = opened({"state_dict": weights(1.0), "ema_state_dict": weights(0.5)}).notes
    assert note == "weights are taken from 'state_dict'; others are in ema_state_dict (see `key`)"


def test_weights_called_steps_are_kept(opened):
    inner = {"steps": torch.zeros(1), "module.steps": torch.zeros(1), "a": torch.zeros(1)}
    assert list(opened(inner).tensors) == ["steps", "module.steps", "a"]
    assert list(opened({f"module.{name}": t for name, t in inner.items()}).tensors) == [*inner]


def test_mmcv_ema_copies_are_noted(opened):
    copies = {f"ema_{name.replace('.', '_')}": t for name, t in weights(1.0).items()}
    (note,) = opened({"meta": {"epoch": 2}, "state_dict": weights(0.5) | copies}).notes
    assert "mmcv's EMAHook" in note
    assert "ema_NAME the weight as trained" in note


def test_mmcv_note_ignores_layers_called_ema(opened):
    state = weights(0.5) | {"ema_head_bias": torch.zeros(3), "ema_gate": torch.zeros(3)}
    assert opened({"state_dict": state}).notes == ()
