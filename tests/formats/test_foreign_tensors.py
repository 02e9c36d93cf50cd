"""Tensors as other devices than CPU and GPU pickle them: what torch.load makes of them is read."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import _utils

import ckptavg
from ckptavg.errors import UnsupportedTensorError
from ckptavg.formats import open_checkpoint


class OnXla(torch.Tensor):
    """Pickled as a tensor on a device whose memory torch cannot reach."""

    def __reduce_ex__(self, protocol):
        tensor = self.as_subclass(torch.Tensor)
        rebuild = _utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (tensor, tensor.dtype, "cpu", False)


def on_xla(tensor: torch.Tensor) -> OnXla:
    return tensor.as_subclass(OnXla)


TENSORS = {
    "float32": torch.arange(12.0).view(3, 4),
    "bfloat16": torch.tensor([1.5, -3.0]).bfloat16(),
    "strided": torch.arange(24.0).view(4, 6).t()[1:5:2],
    "0-d": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "bool": torch.tensor([True, False]),
}


@pytest.mark.parametrize("safe", [True, False])
def test_xla_tensors_are_read_as_by_torch(tmp_path, safe):
    torch.save({name: on_xla(t) for name, t in TENSORS.items()}, tmp_path / "step_1.pt")
    expected = torch.load(tmp_path / "step_1.pt", weights_only=safe)
    read = ckptavg.average([open_checkpoint(tmp_path / "step_1.pt")])
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_xla_tensors_and_parameters_are_averaged(tmp_path):
    for step in (1, 2, 4):
        state = {
            "weight": on_xla(torch.full((2, 3), float(step))),
            "bias": torch.nn.Parameter(on_xla(torch.full((3,), -float(step)))),
        }
        torch.save({"model": state, "step": step}, tmp_path / f"step_{step}.pt")
    average = ckptavg.average(ckptavg.open_run(tmp_path))
    expected = torch.tensor(7 / 3, dtype=torch.float64).float()
    assert torch.equal(average["weight"], expected.expand(2, 3))
    assert torch.equal(average["bias"], -expected.expand(3))


class OnNpu(torch.Tensor):
    """Pickled as torch_npu does: a plain storage, and a private format beside it."""

    def __reduce_ex__(self, protocol):
        tensor = self.as_subclass(torch.Tensor)
        _, view = tensor.__reduce_ex__(protocol)
        return _rebuild_npu_tensor, (*view, 2)


def _rebuild_npu_tensor(*_parts):
    raise AssertionError("nothing in a checkpoint is called")


_rebuild_npu_tensor.__module__ = "torch_npu.utils.storage"


def test_npu_tensors_are_read_without_torch_npu(tmp_path, monkeypatch):
    library = types.ModuleType("torch_npu.utils.storage")
    library._rebuild_npu_tensor = _rebuild_npu_tensor
    with monkeypatch.context() as patch:
        for name in ("torch_npu", "torch_npu.utils"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, "torch_npu.utils.storage", library)
        tensor = torch.arange(6.0).view(2, 3).t()
        torch.save({"weight": tensor.as_subclass(OnNpu)}, tmp_path / "step_1.pt")
    read = ckptavg.average([open_checkpoint(tmp_path / "step_1.pt")])
    assert torch.equal(read["weight"], tensor)


class OfAnotherType(torch.Tensor):
    """Kept in one type, meant in another, which takes a conversion."""

    def __reduce_ex__(self, protocol):
        tensor = self.as_subclass(torch.Tensor)
        rebuild = _utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (tensor, torch.float16, "cpu", False)


def test_tensor_converted_on_loading_is_refused_by_name(tmp_path):
    torch.save({"weight": torch.zeros(2).as_subclass(OfAnotherType)}, tmp_path / "step_1.pt")
    assert "kept as float32" in open_checkpoint(tmp_path / "step_1.pt").refused["weight"]
    with pytest.raises(UnsupportedTensorError, match="weight"):
        ckptavg.average([open_checkpoint(tmp_path / "step_1.pt")])


def test_uninitialized_parameter_is_refused_by_name(tmp_path):
    lazy = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LazyLinear(3))
    torch.save(lazy.state_dict(), tmp_path / "step_1.pt")
    checkpoint = open_checkpoint(tmp_path / "step_1.pt")
    assert set(checkpoint.refused) == {"1.weight", "1.bias"}
    assert set(checkpoint.tensors) == {"0.weight", "0.bias"}


class Packed(torch.nn.Module):
    """Stands for a library's own tensor: no class that is known, with tensors in it."""

    def __reduce__(self):
        return _rebuild_packed, (torch.ones(3), torch.ones(1))


def _rebuild_packed(*_parts):
    raise AssertionError("nothing in a checkpoint is called")


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_packed_tensors_are_refused_by_name(tmp_path, prefix):
    state = {"weight": torch.zeros(2, 2), "packed": Packed(), "_extra_state": Packed()}
    saved = {"encoder": state, "decoder": {"w": torch.ones(2)}} if prefix else state
    torch.save(saved, tmp_path / "step_1.pt")
    checkpoint = open_checkpoint(tmp_path / "step_1.pt")
    assert list(checkpoint.refused) == [f"{prefix}packed"]
    with pytest.raises(UnsupportedTensorError, match=r"packed .*_rebuild_packed"):
        ckptavg.average([checkpoint])
