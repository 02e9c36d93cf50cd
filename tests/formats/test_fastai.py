"""fastai's files: its loader takes exactly ``model`` and ``opt``, or a bare state dict."""

from __future__ import annotations

import argparse

import pytest
import torch

import ckptavg
from ckptavg.formats import open_checkpoint

STATES = {
    "no state yet": {"hypers": [{"lr": 0.001}], "state": []},
    "Adam": {"hypers": [{"lr": 0.1, "mom": 0.9}], "state": [{"grad_avg": torch.ones(600, 60)}]},
    "lookahead": {"hypers": [], "state": [], "count": 3, "slow_weights": None},
    "torch's": {"state": {}, "param_groups": [{"lr": 0.1}]},
}


def average(tmp_path, opt, name="out.pth", **further):
    (tmp_path / "run").mkdir()
    for i in (1, 2):
        model = {"a.weight": torch.full((2,), 2.0 * i)}
        torch.save({"model": model, "opt": opt, **further}, tmp_path / "run" / f"m_{i}.pth")
    return ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / name)


@pytest.mark.parametrize("opt", STATES.values(), ids=STATES)
def test_fastai_output_has_model_and_opt_alone(tmp_path, opt, caplog):
    caplog.set_level("INFO")
    out = average(tmp_path, opt)
    found = torch.load(out)
    assert set(found) == {"model", "opt"}
    assert found["opt"] is None
    assert torch.equal(found["model"]["a.weight"], torch.full((2,), 3.0))
    assert open_checkpoint(out).is_average
    assert any(r.message.endswith("last checkpoint: opt") for r in caplog.records)


def test_fastai_output_keeps_opt_that_is_options(tmp_path):
    opt = argparse.Namespace(lr=0.1)
    assert torch.load(average(tmp_path, opt), weights_only=False)["opt"] == opt


def test_fastai_file_has_no_further_entries(tmp_path):
    assert set(torch.load(average(tmp_path, STATES["torch's"], epoch=3))) == {
        "model", "epoch", "ckptavg",
    }  # fmt: skip


def test_fastai_average_in_pt_file_has_state_dict(tmp_path):
    assert "state_dict" in torch.load(average(tmp_path, STATES["Adam"], "out.pt"))
