"""Files in the format of torch before 1.6, written by torch itself."""

from __future__ import annotations

import argparse
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.averaging.api import average
from ckptavg.averaging.compute import read_state_dict
from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.runs.run import open_run


def legacy(path, value):
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def views() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 4)
    return {
        "base": base,
        "tied": base,
        "transposed": base.t(),
        "sliced": base[1:3, ::2],
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }


def test_legacy_file_is_read_to_the_bit(tmp_path):
    saved = views()
    value = {"state_dict": saved, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    checkpoint = open_checkpoint(legacy(tmp_path / "old.pth", value))
    found = read_state_dict(checkpoint)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert checkpoint.record.epoch == 3
    assert ["base", "tied"] in checkpoint.ties()


def test_legacy_and_zip_files_average_together(tmp_path):
    legacy(tmp_path / "epoch_1.pt", {"w": torch.tensor([1.0, 2.0])})
    torch.save({"w": torch.tensor([3.0, 6.0])}, tmp_path / "epoch_2.pt")
    assert average(open_run(tmp_path))["w"].tolist() == [2.0, 4.0]


def test_legacy_file_with_trailing_bytes_is_refused(tmp_path):
    path = legacy(tmp_path / "old.pt", {"w": torch.zeros(4)})
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="end where the file does"):
        open_checkpoint(path)


def test_legacy_storage_of_wrong_length_is_refused(tmp_path):
    path = legacy(tmp_path / "old.pt", {"w": torch.full((4,), 2.0)})
    data = path.read_bytes()
    at = data.rindex(struct.pack("<q", 4))
    path.write_bytes(data[:at] + struct.pack("<q", 2**60) + data[at + 8 :])
    with pytest.raises(CheckpointError, match="past the end"):
        open_checkpoint(path)


def test_legacy_big_endian_file_is_named(tmp_path):
    path = legacy(tmp_path / "old.pt", {"w": torch.zeros(4)})
    data, true = path.read_bytes(), b"little_endianq\x02\x88"
    assert true in data
    path.write_bytes(data.replace(true, true[:-1] + b"\x89"))
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_legacy_pickle_is_not_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    path = legacy(tmp_path / "old.pt", {"state_dict": {"w": torch.zeros(2)}, "trap": Trap()})
    assert list(open_checkpoint(path).tensors) == ["w"]
    assert not (tmp_path / "canary").exists()
    with path.open("rb") as file:  # Python's own unpickler does run it
        for _ in range(3):
            pickle.load(file)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid):
                return torch.storage.TypedStorage(2, dtype=torch.float32)

        Unpickler(file).load()
    assert (tmp_path / "canary").exists()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_legacy_damage_raises_only_checkpoint_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged_legacy.pt"
    good = legacy(path, {"w": torch.zeros(3), "v": torch.ones(2)}).read_bytes()
    at = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(at, min(len(good), at + 12)))
    path.write_bytes(good[:at] + data.draw(st.binary(max_size=6)) + good[end:])
    try:
        found = read_state_dict(open_checkpoint(path))
    except CheckpointError:
        return
    assert sum(tensor.numel() for tensor in found.values()) <= 16
