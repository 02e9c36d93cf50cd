"""Checkpoints whose suffix does not say what they are: taken, or passed over and said."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers import names, save_weight

from ckptavg import open_run
from ckptavg.errors import CheckpointError, RunError
from ckptavg.runs.discovery.reason import Reason

SUFFIXES = [".tar", ".pyth", ".PT", ".PTH", ".Ckpt", ".SAFETENSORS", ".model", ".th", ".pt.ep5"]


def save_as(path, value, **beside):
    """A torch.save file whatever its suffix."""
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": {"w": torch.tensor([float(value)])}, **beside}, path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_of_any_kind_opens_when_named(tmp_path, suffix):
    paths = [save_as(tmp_path / f"epoch_{i}{suffix}", i) for i in (1, 2)]
    assert names(open_run(*paths)) == [path.name for path in paths]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_of_any_kind_makes_run_without_others(tmp_path, suffix):
    for i in (10, 9):
        save_as(tmp_path / f"epoch_{i}{suffix}", i)
    (tmp_path / "log.txt").write_text("begun")
    (tmp_path / "optimizer.tar").write_bytes((tmp_path / f"epoch_9{suffix}").read_bytes())
    run = open_run(tmp_path)
    assert names(run) == [f"epoch_9{suffix}", f"epoch_10{suffix}"]
    assert run.left_out == ()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffix_left_out_is_noted_and_glob_takes_it(tmp_path, suffix):
    for i in (1, 2):
        save_as(tmp_path / f"epoch_{i}.pth", i)
        save_as(tmp_path / f"other_{i}{suffix}", -i)
    run = open_run(tmp_path)
    assert names(run) == ["epoch_1.pth", "epoch_2.pth"]
    assert run.left_out == tuple(
        (tmp_path / f"other_{i}{suffix}", Reason.SUFFIX.value) for i in (1, 2)
    )
    (note,) = run.notes
    assert f"other_1{suffix} and 1 more are left out" in note
    assert names(open_run(tmp_path, glob="other*")) == [f"other_{i}{suffix}" for i in (1, 2)]


def test_suffix_with_epoch_makes_run_beside_model(tmp_path):
    for epoch in range(1, 6):
        save_as(tmp_path / f"model.pt.ep{epoch}", epoch, epoch=epoch, step=100 * epoch)
    shutil.copy(tmp_path / "model.pt.ep5", tmp_path / "model.pt")
    run = open_run(tmp_path)
    assert names(run.last(3)) == ["model.pt.ep3", "model.pt.ep4", "model.pt.ep5"]
    assert run.left_out == ((tmp_path / "model.pt", "repeats model.pt.ep5"),)
    assert len(open_run(tmp_path, glob="model.pt.ep*")) == 5
    (tmp_path / "model.pt.ep3").write_bytes(b"")  # torn: it is one of them all the same
    with pytest.raises(CheckpointError, match=r"model\.pt\.ep3"):
        len(open_run(tmp_path).last(3))


@pytest.mark.parametrize("name", ["best.torchscript", "epoch_2.pt.bak", "epoch_2.pt~", "best.pt.1"])
def test_suffix_of_copy_or_export_is_left_out(tmp_path, name):
    save_as(tmp_path / "best.pt", 1)
    save_as(tmp_path / name, 2)
    run = open_run(tmp_path)
    assert names(run) == ["best.pt"]
    assert run.left_out == ((tmp_path / name, Reason.SUFFIX.value),)


def test_suffix_of_no_checkpoint_is_not_mentioned(tmp_path):
    save_weight(tmp_path / "epoch_1.pt", 1)
    for name, content in {
        "data.tar": b"ustar",
        "arrays.npz": b"PK\x03\x04" + bytes(22) + b"\x05\x00\x00\x00a.npy",
        "model.onnx": b"\x08\x07",
        "vocab.model": b"\n\x0e",
        "empty.PT": b"",
        "config.json": b"{}",
        "names.txt": b"eight by{te",
    }.items():
        (tmp_path / name).write_bytes(content)
    assert open_run(tmp_path).left_out == ()


def test_suffix_of_legacy_torch_file_is_left_out(tmp_path):
    save_weight(tmp_path / "epoch_1.pt", 1)
    torch.save({"w": torch.ones(1)}, tmp_path / "x.t7", _use_new_zipfile_serialization=False)
    assert open_run(tmp_path).left_out == ((tmp_path / "x.t7", Reason.SUFFIX.value),)


def test_open_run_error_suggests_naming_other_suffixes(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"ustar")
    with pytest.raises(RunError, match="name files with other suffixes one by one"):
        open_run(tmp_path)
