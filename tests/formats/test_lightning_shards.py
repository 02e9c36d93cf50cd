"""Shards with ``meta.pt``: what is made of them is what Lightning loads."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import listing

import ckptavg
from ckptavg.formats import open_checkpoint

META = {
    "epoch": 2,
    "global_step": 20,
    "pytorch-lightning_version": "2.6.0",
    "hyper_parameters": {"width": 8, "args": argparse.Namespace(lr=0.1)},
    "lr_schedulers": [{"last_epoch": 2}],
    "callbacks": {},
}
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write(directory, value, meta):
    state = {"_orig_mod.net.weight": torch.full((2, 3), value), "_orig_mod.net.bias": torch.ones(2)}
    optimizer = {"state": {"exp_avg": torch.zeros(2)}}
    directory.mkdir(parents=True)
    dcp.save({"model": state, "optimizer_0": optimizer}, checkpoint_id=directory)
    if meta is not None:
        torch.save(meta, directory / "meta.pt")


@pytest.fixture
def run(tmp_path):
    for step, value in ((10, 1.0), (20, 3.0)):
        meta = META | {"global_step": step}
        write(tmp_path / "run" / f"epoch={step // 10}-step={step}.ckpt", value, meta)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["out.ckpt", "out.pt"])
def test_lightning_shards_in_file_keep_meta_entries(run, tmp_path, name, caplog):
    caplog.set_level("INFO")
    out = ckptavg.average(ckptavg.open_run(run), out=tmp_path / name)
    found = torch.load(out, weights_only=name == "out.pt")
    prefix = "" if name == "out.pt" else "_orig_mod."
    assert torch.equal(found["state_dict"][f"{prefix}net.weight"], torch.full((2, 3), 2.0))
    assert found["pytorch-lightning_version"] == "2.6.0"
    assert found["hyper_parameters"]["width"] == 8
    assert ("args" in found["hyper_parameters"]) == (name == "out.ckpt")
    assert "lr_schedulers" not in found
    assert any("lr_schedulers" in r.message for r in caplog.records)
    assert open_checkpoint(out).is_average


def test_lightning_shards_in_directory_keep_meta_file(run, tmp_path):
    (run / "epoch=2-step=20.ckpt" / "hparams.yaml").write_text("width: 8")
    (run / "epoch=2-step=20.ckpt" / "optimizer.pt").write_text("old")
    out = ckptavg.average(ckptavg.open_run(run), out=tmp_path / "out")
    assert listing(out) == [".metadata", "__0_0.distcp", "hparams.yaml", "meta.pt"]
    found = torch.load(out / "meta.pt", weights_only=False)
    assert found == {name: value for name, value in META.items() if name != "lr_schedulers"}


@pytest.mark.parametrize(
    "meta",
    [None, b"", b"no zip", {"step": 3}, [1, 2]],
    ids=["none", "empty", "other", "Fabric", "list"],
)
def test_lightning_meta_not_of_trainer_is_not_merged(tmp_path, meta):
    for step in (1, 2):
        directory = tmp_path / "run" / f"step_{step}"
        write(directory, float(step), None if isinstance(meta, bytes) else meta)
        if isinstance(meta, bytes):
            (directory / "meta.pt").write_bytes(meta)
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "x.ckpt")
    assert set(torch.load(out)) == {"state_dict", "ckptavg"}
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "x")
    assert (out / "meta.pt").exists() == isinstance(meta, dict)
