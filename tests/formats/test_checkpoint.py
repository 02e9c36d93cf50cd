"""What every format is opened into."""

from __future__ import annotations

import os
import time
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptavg.errors import CheckpointError
from ckptavg.formats import FileStamp, open_checkpoint
from ckptavg.formats.checkpoint import DTYPES, is_row_major, row_major
from ckptavg.formats.reader import Reader
from ckptavg.io import paths as storage

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if hasattr(torch, d.name)], ids=str)
def test_dtypes_agree_with_torch(dtype):
    theirs = getattr(torch, dtype.name)
    assert dtype.size == theirs.itemsize
    assert (dtype.kind == "complex") == theirs.is_complex
    assert (dtype.kind in ("float", "packed")) == theirs.is_floating_point
    assert (dtype.kind == "packed") == (theirs.is_floating_point and theirs.itemsize == 1)


@pytest.mark.parametrize(("name", "count", "nbytes"), [
    ("float32", 3, 12), ("bool", 3, 3), ("float4_e2m1", 3, 2), ("float6_e2m3", 4, 3),
])  # fmt: skip
def test_dtype_nbytes_rounds_up_for_sub_byte_types(name, count, nbytes):
    assert DTYPES[name].nbytes(count) == nbytes


@given(shapes)
def test_row_major_equals_torch_strides(shape):
    assert row_major(shape) == torch.empty(shape).stride()


@given(shapes, st.lists(st.integers(0, 20), min_size=4, max_size=4))
def test_is_row_major_agrees_with_torch_contiguity(shape, strides):
    stride = tuple(strides[: len(shape)])
    assert (
        is_row_major(shape, stride) == torch.empty(2000).as_strided(shape, stride).is_contiguous()
    )
    assert is_row_major(shape, row_major(shape))


def replace_by_a_copy(path):
    info, copy = path.stat(), path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    copy.replace(path)


def rewrite_with_the_same_time(path):
    info, content = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(content)))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


CHANGES = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "shorter": lambda path: os.truncate(path, 10),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "replaced by a copy of the same time": replace_by_a_copy,
    "rewritten with the same time": rewrite_with_the_same_time,
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_file_stamp_detects_change(tmp_path, change):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.rand(3)}, path)
    (stamp,) = open_checkpoint(path).files
    assert stamp == FileStamp.of(path)
    stamp.verify()
    time.sleep(0.02)  # longer than a tick of the clock that file systems go by
    change(path)
    with pytest.raises(CheckpointError, match=str(path)):
        stamp.verify()


NO_CHANGES = {
    "read": lambda path: path.read_bytes(),
    "linked as the last one": lambda path: os.link(path, path.with_name("last.pt")),
    "write-protected": lambda path: path.chmod(0o400),
}


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
def test_file_stamp_ignores_unchanged_contents(tmp_path, change):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.rand(3)}, path)
    (stamp,) = open_checkpoint(path).files
    time.sleep(0.02)
    change(path)
    stamp.verify()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are Unix's")
def test_open_binary_refuses_pipe(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.rand(3)}, path)
    tensor = open_checkpoint(path).tensors["a"]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        storage.open_binary(path)
    with closing(Reader()) as reader, pytest.raises(CheckpointError, match="not a regular file"):
        reader.read(tensor, 0, 3, memoryview(bytearray(12)))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="it is Linux's")
def test_open_binary_reports_disk_failure_in_one_line(tmp_path):
    """Linux's file of a process's memory cannot be read where nothing is mapped, as at 0."""
    why = "/proc/self/mem cannot be read: Input/output error"
    with storage.open_binary("/proc/self/mem") as file, pytest.raises(CheckpointError, match=why):
        file.read(10)


def test_checkpoint_nbytes_counts_tied_bytes_once(tmp_path):
    path = tmp_path / "model.pt"
    tied = torch.rand(10)
    torch.save(
        {"a": tied, "b": tied, "c": torch.rand(2), "e": torch.rand(0), "f": torch.rand(0)}, path
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.nbytes == 48
    assert checkpoint.size == path.stat().st_size
    assert checkpoint.ties() == [["a", "b"]]


def test_checkpoint_ties_exclude_differing_views(tmp_path):
    storage = torch.rand(8)
    views = {
        "all": storage,
        "half": storage[:4],
        "other": storage[4:],
        "folded": storage.view(2, 4),
    }
    torch.save(views, tmp_path / "model.pt")
    assert open_checkpoint(tmp_path / "model.pt").ties() == []


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors", "missing"])
def test_open_checkpoint_refuses_missing_path(tmp_path, refusal, name):
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_open_checkpoint_refuses_unreadable_file(tmp_path, refusal):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.rand(3)}, path)
    if os.geteuid() == 0:
        pytest.skip("root may read all")
    path.chmod(0)
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("name", ["model", "model.pt", "model.safetensors", "model.ckpt"])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_open_checkpoint_detects_format_by_content(tmp_path, refusal, name, kind):
    (torch.save if kind == "torch" else save_file)({"a": torch.rand(3)}, tmp_path / name)
    if kind == "torch" and name.endswith(".safetensors"):
        refusal(tmp_path / name)
    else:
        assert open_checkpoint(tmp_path / name).layout == kind
