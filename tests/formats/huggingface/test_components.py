"""Models whose weights lie in several directories: each is averaged, and stands where it stood."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from helpers import listing, save
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import ckptavg
from ckptavg.errors import CheckpointError, ModelError
from ckptavg.formats import is_checkpoint_directory, open_checkpoint
from ckptavg.formats.huggingface.components import find_components
from ckptavg.models.load import load_into


def modules(*paths: str) -> str:
    return json.dumps([{"idx": i, "name": str(i), "path": p, "type": "a.B"} for i, p in
                       enumerate(paths)])  # fmt: skip


def pipeline(**parts: list[str | None]) -> str:
    return json.dumps({"_class_name": "P", "_diffusers_version": "0", **parts})


ROUTER = json.dumps({"types": {"query_0_T": "a.T", "doc_0_S": "a.S"}, "structure": {}})
LAYOUTS = {
    "a Dense module": (
        {"modules.json": modules("", "1_Pooling", "2_Dense"), "1_Pooling/config.json": "{}"},
        ["model.safetensors", "2_Dense/model.safetensors"],
    ),
    "all modules below": (
        {"modules.json": modules("0_Transformer", "1_Dense")},
        ["0_Transformer/model.safetensors", "1_Dense/model.safetensors"],
    ),
    "a router in the root": (
        {"modules.json": modules("", "1_Normalize"), "router_config.json": ROUTER},
        ["query_0_T/model.safetensors", "doc_0_S/model.safetensors"],
    ),
    "a router below": (
        {"modules.json": modules("0_Router"), "0_Router/router_config.json": ROUTER},
        ["0_Router/query_0_T/model.safetensors", "0_Router/doc_0_S/model.safetensors"],
    ),
    "a pipeline": (
        {"model_index.json": pipeline(unet=["diffusers", "U"], vae=["diffusers", "V"],
                                      scheduler=["diffusers", "S"], feature=[None, None]),
         "scheduler/scheduler_config.json": "{}"},
        ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"],
    ),
    "a pipeline's variant": (
        {"model_index.json": pipeline(unet=["diffusers", "U"]), "unet/config.json": "{}"},
        ["unet/diffusion_pytorch_model.fp16.safetensors"],
    ),
}  # fmt: skip


def write(directory: Path, texts: dict[str, str], files: list[str], value: float) -> None:
    for name, text in texts.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    for place, name in enumerate(files, 1):
        save(directory / name, {"linear.weight": torch.full((2, place), value * place)})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("parent", ["checkpoint-{}", "step_{}"])
def test_components_are_averaged_each_into_its_file(tmp_path, layout, parent):
    texts, files = layout
    for step, value in ((100, 1.0), (200, 3.0)):
        write(tmp_path / "run" / parent.format(step), texts, files, value)
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "out")
    assert listing(out) == listing(tmp_path / "run" / parent.format(200))
    for place, name in enumerate(files, 1):
        assert torch.equal(
            load_file(out / name)["linear.weight"], torch.full((2, place), 2.0 * place)
        )
    for name, text in texts.items():
        assert (out / name).read_text() == text
    assert open_checkpoint(out).is_average


def test_components_of_torch_save_become_safetensors(tmp_path):
    for step, value in ((1, 1.0), (2, 3.0)):
        folder = tmp_path / "run" / f"step_{step}"
        write(folder, {"modules.json": modules("", "2_Dense")}, ["model.safetensors"], value)
        (folder / "2_Dense").mkdir()
        wrapped = {"module.a": torch.full((2,), value), "module.b": torch.ones(1)}
        torch.save(wrapped, folder / "2_Dense" / "pytorch_model.bin")
    run = ckptavg.open_run(tmp_path / "run")
    assert set(run.checkpoints[-1].tensors) == {"linear.weight", "2_Dense/a", "2_Dense/b"}
    out = ckptavg.average(run, out=tmp_path / "out")
    found = load_file(out / "2_Dense" / "model.safetensors")
    assert torch.equal(found.pop("module.a"), torch.full((2,), 2.0))
    assert set(found) == {"module.b"}


def test_components_of_bin_variant_stay_bin(tmp_path):
    for step, value in ((1, 1.0), (2, 3.0)):
        folder = tmp_path / "run" / f"step_{step}"
        write(folder, {"modules.json": modules("1_D"), "1_D/config.json": "{}"}, [], value)
        state = {"a": torch.full((2,), value)}
        torch.save(state | {"b": state["a"]}, folder / "1_D" / "pytorch_model.fp16.bin")
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "out")
    assert listing(out) == ["1_D", "1_D/config.json", "1_D/pytorch_model.fp16.bin", "modules.json"]
    found = torch.load(out / "1_D" / "pytorch_model.fp16.bin")
    assert torch.equal(found["a"], torch.full((2,), 2.0))
    assert found["a"].data_ptr() == found["b"].data_ptr()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_components_in_single_file_have_directory_prefixes(tmp_path, suffix):
    texts, files = LAYOUTS["a Dense module"]
    write(tmp_path / "step_1", texts, files, 1.0)
    out = ckptavg.average(ckptavg.open_run(tmp_path / "step_1"), out=tmp_path / f"x{suffix}")
    assert set(open_checkpoint(out).tensors) == {"linear.weight", "2_Dense/linear.weight"}


def test_components_are_selected_by_include(tmp_path):
    texts, files = LAYOUTS["a pipeline"]
    for step, value in ((1, 1.0), (2, 3.0)):
        write(tmp_path / "run" / f"step_{step}", texts, files, value)
    run = ckptavg.open_run(tmp_path / "run")
    out = ckptavg.average(run, out=tmp_path / "out", include="unet/*")
    assert load_file(out / files[0])["linear.weight"][0, 0] == 2
    assert load_file(out / files[1])["linear.weight"][0, 0] == 6


def test_components_exclude_unlisted_directories(tmp_path, caplog):
    caplog.set_level("INFO")
    texts, files = LAYOUTS["a Dense module"]
    for step in (1, 2):
        write(tmp_path / "run" / f"step_{step}", texts, [*files, "ema/model.safetensors"], 1.0)
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "out")
    assert not (out / "ema").exists()
    assert any(r.message.endswith("averaged): ema/") for r in caplog.records)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "..", "a\\b", "a\0"])
def test_components_outside_directory_are_refused(tmp_path, path, refusal):
    write(tmp_path / "m", {"modules.json": modules("", path)}, ["model.safetensors"], 1.0)
    assert "lists a part outside of it" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "[1, {}]", "null", '[{"path": 3, "type": "x"}]', "[" * 9999,
     '[{"path": "gone", "type": "x"}]', modules(*["."] * 50, *map(str, range(900)))],
    ids=range(10),
)  # fmt: skip
def test_find_components_ignores_odd_lists(tmp_path, content):
    for name in ("modules.json", "router_config.json", "model_index.json"):
        write(tmp_path / "m", {name: content}, ["model.safetensors"], 1.0)
    assert find_components(tmp_path / "m") == []
    assert set(open_checkpoint(tmp_path / "m").tensors) == {"linear.weight"}


def test_find_components_ends_on_cycles(tmp_path):
    (tmp_path / "a").symlink_to(".")
    write(tmp_path, {"modules.json": modules("a", "b")}, ["b/model.safetensors"], 1.0)
    assert is_checkpoint_directory(tmp_path)
    assert len(find_components(tmp_path)) < 10


@given(
    st.recursive(st.text(), lambda values: st.lists(values) | st.dictionaries(st.text(), values))
)
def test_find_components_raises_only_checkpoint_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("lists")
    for name in ("modules.json", "router_config.json", "model_index.json"):
        (folder / name).write_text(json.dumps(content))
    with contextlib.suppress(CheckpointError):
        find_components(folder)


def test_load_into_ignores_other_components():
    model, state = nn.Linear(2, 1), nn.Linear(2, 1).state_dict()
    load_into(model, state | {"2_Dense/linear.weight": torch.ones(1)}, "x")
    assert torch.equal(model.weight, state["weight"])
    with pytest.raises(ModelError, match=r"the checkpoint has linear\.weight"):
        load_into(model, state | {"linear.weight": torch.ones(1)}, "x")
