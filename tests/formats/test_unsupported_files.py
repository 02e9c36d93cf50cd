"""Files of other kinds: each is named for what it is, with what to do, and none is called cut."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as save_tensors
from torch import nn

from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.protobuf import is_onnx, is_saved_model
from ckptavg.formats.unsupported_files import HEAD


def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(12.0).view(4, 3), "a.bias": torch.zeros(4)}


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save(weights(), buffer, **options)
    return buffer.getvalue()


def archive(kind: Callable, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind is zipfile.ZipFile:
        with zipfile.ZipFile(buffer, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tarred(**members: bytes) -> bytes:
    return archive(tarfile.open, members)


def zipped(members: dict[str, bytes]) -> bytes:
    return archive(zipfile.ZipFile, members)


def by_numpy(save, *args) -> bytes:
    buffer = io.BytesIO()
    save(buffer, *args)
    return buffer.getvalue()


def arrays() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in weights().items()}


def field(number: int, value: bytes | int) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    assert len(value) < 1 << 14
    return bytes([number << 3 | 2, len(value) & 0x7F | 0x80, len(value) >> 7]) + value


ONNX = field(1, 8) + field(2, b"pytorch") + field(3, b"2.8") + field(7, bytes(9000))
SAVED_MODEL = field(1, 1) + field(2, bytes(9000))
FLAX = b"\x82\xa6params\x81\xa5Dense" + bytes(100)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"

STRANGERS = {
    "a Git LFS pointer": (LFS, "Git LFS pointer", "git lfs pull"),
    "an annexed file": (b"/annex/objects/SHA256E-s12--4d.pt\n", "git-annex", "git annex get"),
    "a page": (b"\n<!DOCTYPE html>\n<html><head>", "HTML page", "Download the file itself"),
    "a page in small letters": (b"<html lang=en>" + "é".encode() * HEAD, "HTML page", "Download"),
    "a store's answer": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "XML", "Download"),
    "JSON": (json.dumps({"step": 5}).encode(), "a JSON text", "Name a file of weights"),
    "JSON with a bracket where a header's would be": (b'{"a":  {"b": {}}}', "a JSON text", "Name"),
    "text": (b"step,loss\n1,2\n", "a text", "Name a file of weights"),
    "text cut in a letter": (b"x" * (HEAD - 1) + "é".encode() * 9, "a text", "Name a file"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF model", "then export"),
    "GGML": (b"tjgg\x03\0\0\0" + bytes(64), "a GGML model", "then export"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file", "Keras"),
    "ONNX": (ONNX, "an ONNX model", "then export"),
    "a SavedModel": (SAVED_MODEL, "a TensorFlow SavedModel", "Load it with TensorFlow"),
    "a TensorFlow index": (bytes(range(200)) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
                           "TensorFlow checkpoint", "Load it with TensorFlow"),
    "ExecuTorch": (b"\x1c\0\0\0ET12" + bytes(64), "an ExecuTorch program", "then export"),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3" + bytes(64), "a TensorFlow Lite model", "then export"),
    "Flax": (FLAX, "MessagePack", "Load it with Flax"),
    "an array": (by_numpy(np.save, arrays()["a.weight"]), "a NumPy file", "numpy.load"),
    "arrays": (by_numpy(lambda file: np.savez(file, **arrays())), "a NumPy file", "numpy.load"),
    "gzip": (gzip.compress(saved()), "compressed by gzip", "gzip -dc"),
    "bzip2": (bz2.compress(saved()), "compressed by bzip2", "bzip2 -dc"),
    "xz": (lzma.compress(saved()), "compressed by xz", "xz -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "compressed by zstd", "zstd -dc"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "compressed by 7-Zip", "7z x"),
    "tar": (tarred(readme=b"x" * 700), "a tar archive", "tar xf"),
    "NeMo": (archive(tarfile.open, {"./model_config.yaml": b"x" * 999,
                                    "./model_weights.ckpt": saved()}),
             "a NeMo archive", "model_weights.ckpt"),
    "torch 0.1": (tarred(sys_info=b"1", pickle=b"2", storages=b"3", tensors=b"4"),
                  "torch 0.1", "torch.load(weights_only=False)"),
    "Keras": (zipped({"config.json": b"{}", "model.weights.h5": b""}), "a Keras model", "Keras"),
    "zip": (zipped({"policy.pth": saved(), "data": b"{}"}), "zip archive of other", "Unpack it"),
    **{f"pickle, protocol {protocol}": (pickle.dumps(arrays(), protocol), "a plain pickle",
                                        "pickle.load") for protocol in range(6)},
    "tensors pickled plainly": (pickle.dumps(weights()), "a plain pickle", "torch.save"),
    "Paddle": (pickle.dumps(arrays() | {"StructuredToParameterName@@": {}}), "PaddlePaddle",
               "paddle.load"),
    "nothing": (b"", "is empty", "leave it out"),
    "zeros": (bytes(5000), "nothing but zeros", "copy it again"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(("content", "kind", "remedy"), STRANGERS.values(), ids=STRANGERS)
def test_foreign_file_is_named_with_remedy(content, kind, remedy, suffix, tmp_path, refusal):
    path = tmp_path / f"step_5{suffix}"
    path.write_bytes(content)
    text = refusal(path)
    assert text.startswith(f"{path} is ")
    assert kind in text
    assert remedy in text
    assert "truncated" not in text


NAMED = {
    "__0_0.distcp": (saved(), "shard of a distributed checkpoint", "Name the directory"),
    ".metadata": (pickle.dumps({}), "metadata of a distributed checkpoint", "Name the directory"),
    "pytorch_model.bin.index.json": (b'{"weight_map": {}}', "index of shards", "Name the"),
    "model.ckpt-5.data-00000-of-00001": (bytes(range(1, 200)), "TensorFlow", "TensorFlow"),
    "model.pdparams": (pickle.dumps(arrays()), "PaddlePaddle", "paddle.load"),
    "model.safetensors": (saved(), "written by torch.save", "model.pt"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "kind", "remedy"),
                         [(name, *rest) for name, rest in NAMED.items()], ids=NAMED)  # fmt: skip
def test_foreign_file_is_recognized_by_name(name, content, kind, remedy, tmp_path, refusal):
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path / name)
    assert kind in text
    assert remedy in text


@pytest.mark.filterwarnings("ignore")
def test_foreign_torch_exports_are_named(tmp_path, refusal):
    model, example = nn.Linear(3, 4), torch.zeros(1, 3)
    torch.jit.save(torch.jit.trace(model, example), tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (example,)), tmp_path / "exported.pt2")
    assert "a TorchScript archive" in refusal(tmp_path / "script.pt")
    text = refusal(tmp_path / "exported.pt2")
    assert "a torch.export archive" in text
    state = torch.export.load(tmp_path / "exported.pt2").state_dict  # the remedy
    torch.save(dict(state), tmp_path / "state.pt")
    assert set(open_checkpoint(tmp_path / "state.pt").tensors) == {"weight", "bias"}


@pytest.mark.filterwarnings("ignore")
def test_foreign_torch_package_is_named(tmp_path, refusal):
    with torch.package.PackageExporter(tmp_path / "package.pt") as package:
        package.save_pickle("weights", "weights.pkl", weights())
    assert "a torch.package archive" in refusal(tmp_path / "package.pt")


def test_foreign_pickle_remedy_gives_checkpoint(tmp_path, refusal):
    path = tmp_path / "step_1.pt"
    path.write_bytes(pickle.dumps(weights()))
    refusal(path)
    torch.save(pickle.loads(path.read_bytes()), path)
    assert set(open_checkpoint(path).tensors) == set(weights())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_legacy_torch_save_is_read_in_every_protocol(protocol, tmp_path):
    path = tmp_path / "step_1.pt"
    torch.save(weights(), path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert set(open_checkpoint(path).tensors) == set(weights())


CUT = {
    "torch.save": saved(),
    "torch.save before 1.6": saved(_use_new_zipfile_serialization=False),
    "safetensors": save_tensors(weights()),
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("part", [0.3, 0.6, 0.97])
def test_truncated_file_is_called_truncated(kind, part, tmp_path, refusal):
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    path.write_bytes(CUT[kind][: int(part * len(CUT[kind]))])
    assert "truncated or still being written" in refusal(path)


@given(st.binary(max_size=40).map(lambda tail: ONNX[:9] + tail) | st.binary(max_size=60))
def test_is_onnx_and_is_saved_model_take_any_bytes(content):
    is_onnx(content)
    is_saved_model(content)


@given(start=st.sampled_from([content[:80] for content, _, _ in STRANGERS.values()]),
       more=st.binary(max_size=600))  # fmt: skip
def test_foreign_start_is_refused_in_one_line(start, more, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "stranger.pt"
    path.write_bytes(start + more)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert len(str(caught.value).splitlines()) == 1
