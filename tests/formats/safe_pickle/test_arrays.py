"""State dicts of NumPy arrays, whose bytes lie in the pickle: read as they are, or as text."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from torch import _utils

import ckptavg
from ckptavg.errors import CheckpointError, UnsupportedTensorError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.safe_pickle import unpickler

NUMBERS = ["f2", "f4", "f8", "c8", "c16", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]
CLASSIC, ZIP = False, True


def read(path) -> dict[str, torch.Tensor]:
    return ckptavg.average([open_checkpoint(path)])


arrays = st.sampled_from(NUMBERS).flatmap(
    lambda code: arrays_of.arrays(
        np.dtype(code),
        arrays_of.array_shapes(min_dims=0, min_side=0, max_side=4),
        elements=arrays_of.from_dtype(np.dtype(code), allow_nan=False),
    )
)


@settings(max_examples=60, deadline=None)
@given(st.lists(arrays, min_size=1, max_size=3), st.integers(2, 5), st.booleans())
def test_arrays_of_any_dtype_and_order_are_read(tmp_path_factory, values, protocol, transposed):
    state = {f"a{i}": a.T if transposed else a for i, a in enumerate(values)}
    path = tmp_path_factory.mktemp("arrays") / "step_1.pt"
    torch.save(state, path, pickle_protocol=protocol)
    found = read(path)
    assert list(found) == list(state)
    for name, array in state.items():
        assert tuple(found[name].shape) == array.shape
        assert np.array_equal(found[name].numpy(), array)
        assert str(found[name].dtype) == f"torch.{array.dtype}"


@pytest.mark.parametrize("layout", [CLASSIC, ZIP])
def test_arrays_are_averaged_into_tensors_and_noted(tmp_path, layout):
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((300, 7)).astype("f4") for _ in range(3)]
    for step, weight in enumerate(weights, 1):
        state = {"params": {"w": weight, "steps": np.array(step)}, "epoch": step}
        path = tmp_path / f"step_{step}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=layout)
    run = ckptavg.open_run(tmp_path)
    assert "NumPy arrays" in run.checkpoints[0].notes[0]
    ckptavg.average(run, out=tmp_path / "out.pth")
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    mean = sum(weight.astype("f8") for weight in weights) / 3
    assert np.array_equal(found["params"]["w"].numpy(), mean.astype("f4"))
    assert (found["params"]["steps"], found["epoch"]) == (3, 3)


def test_arrays_in_copied_checkpoint_count_once(tmp_path):
    for step in (1, 2):
        torch.save({"w": np.arange(200.0) * step}, tmp_path / f"step_{step}.pt")
    shutil.copy(tmp_path / "step_2.pt", tmp_path / "last.pt")
    assert len(ckptavg.open_run(tmp_path)) == 2


def test_arrays_of_one_byte_are_read(tmp_path):
    state = {f"flag{i}": np.array(200, dtype="u1") for i in range(40)}
    torch.save(state, tmp_path / "step_1.pt")
    assert all(t == 200 for t in read(tmp_path / "step_1.pt").values())


def test_arrays_beside_tensors_are_not_weights(tmp_path):
    """A history or a generator's state is no weight, and may be of another length each time."""
    for step in (1, 2):
        state = {"w": torch.full((2,), float(step)), "losses": np.zeros(step)}
        torch.save(state, tmp_path / f"step_{step}.pt")
    run = ckptavg.open_run(tmp_path)
    assert list(run.checkpoints[0].tensors) == ["w"]
    assert "1 values beside the tensors are not taken: losses" in run.checkpoints[0].notes
    assert torch.equal(ckptavg.average(run)["w"], torch.full((2,), 1.5))


@pytest.mark.parametrize(
    "array", [np.zeros(2, ">f4"), np.zeros(2, np.longdouble)], ids=["big", "long"]
)
def test_arrays_of_types_torch_lacks_are_refused_by_name(tmp_path, array):
    torch.save({"w": np.zeros(2), "odd": array}, tmp_path / "step_1.pt")
    assert list(open_checkpoint(tmp_path / "step_1.pt").refused) == ["odd"]
    with pytest.raises(UnsupportedTensorError, match="odd"):
        read(tmp_path / "step_1.pt")


def test_arrays_of_text_or_objects_are_not_tensors(tmp_path):
    state = {"w": np.zeros(2), "names": np.array(["a", "b"]), "mixed": np.array([None, 1])}
    torch.save(state, tmp_path / "step_1.pt")
    checkpoint = open_checkpoint(tmp_path / "step_1.pt")
    assert (list(checkpoint.tensors), checkpoint.refused) == (["w"], {})
    assert "2 values beside the tensors are not taken: names, mixed" in checkpoint.notes


class OnXla(torch.Tensor):
    """Pickled as older torch did with a device's tensor: through NumPy, which has no bfloat16."""

    def __reduce_ex__(self, protocol):
        tensor = self.as_subclass(torch.Tensor)
        wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
        return _utils._rebuild_xla_tensor, (wide.numpy(), tensor.dtype, "cpu", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("protocol", [2, 4])
def test_device_tensors_pickled_as_arrays_are_read(tmp_path, dtype, protocol):
    tensor = (torch.arange(-6, 6).view(3, 4) * 3).to(dtype)
    state = {"w": tensor.as_subclass(OnXla), "bias": torch.ones(2)}
    torch.save(state, tmp_path / "step_1.pt", pickle_protocol=protocol)
    expected = torch.load(tmp_path / "step_1.pt", weights_only=False)
    found = read(tmp_path / "step_1.pt")
    for name in state:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


def test_arrays_in_too_large_pickle_are_named_as_cause(tmp_path, monkeypatch):
    torch.save({"w": np.zeros(1000)}, tmp_path / "step_1.pt")
    monkeypatch.setattr(unpickler, "MAX_PICKLE", 2**12)
    with pytest.raises(CheckpointError, match=r"NumPy's arrays are stored there.*from_numpy"):
        open_checkpoint(tmp_path / "step_1.pt")
