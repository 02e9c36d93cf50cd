"""Weights under another name than usual, beside a configuration: the output has the same names."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import listing, save
from safetensors.torch import load_file

import ckptavg
from ckptavg.formats import is_checkpoint_directory, open_checkpoint


def write(directory, name, value, config="config.json", **texts):
    state = {"a": torch.full((2,), value), "b": torch.ones(3)}
    save(directory / name, state)
    (directory / config).write_text("{}")
    for text in texts:
        (directory / f"{text}.txt").write_text(text)


def average(root, names, config="config.json", **texts):
    for step, value in ((1, 1.0), (2, 3.0)):
        for name in names:
            write(root / "run" / f"step-{step}", name, value, config, **texts)
    return averaged(root)


def averaged(root):
    run = ckptavg.open_run(*sorted((root / "run").iterdir()))
    return ckptavg.average(run, out=root / "out")


def state_of(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


VARIANTS = [
    "model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.non_ema.safetensors",
    "pytorch_model.fp16.bin",
]


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_alone_is_averaged_under_its_name(tmp_path, name):
    out = average(tmp_path, [name], vocab="")
    assert listing(out) == sorted(["config.json", name, "vocab.txt"])
    assert torch.equal(state_of(out / name)["a"], torch.full((2,), 2.0))
    assert is_checkpoint_directory(out)
    assert open_checkpoint(out).is_average


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("open_clip_pytorch_model.bin", "open_clip_config.json"),
        ("open_clip_model.safetensors", "config.json"),
        ("model.fp16x.safetensors", "config.json"),
        ("flow.safetensors", "config.yaml"),
        ("pytorch_lora_weights.safetensors", "notes.txt"),
    ],
)
def test_weights_file_alone_keeps_its_name(tmp_path, name, config):
    out = average(tmp_path, [name], config, vocab="")
    assert listing(out) == sorted([config, name, "vocab.txt"])
    assert torch.equal(state_of(out / name)["a"], torch.full((2,), 2.0))
    assert set(state_of(out / name)) == {"a", "b"}


def test_pt_file_beside_configuration_becomes_safetensors(tmp_path):
    out = average(tmp_path, ["net.pt"], "config.yaml")
    assert listing(out) == ["config.yaml", "model.safetensors"]


def test_weights_file_alone_leaves_directories_out(tmp_path):
    for step in (1, 2):
        write(tmp_path / "run" / f"step-{step}", "flow.safetensors", 1.0, "flow_config.json")
        save(tmp_path / "run" / f"step-{step}" / "photos" / "a.png.txt", {})
    out = averaged(tmp_path)
    assert listing(out) == ["flow.safetensors", "flow_config.json"]


def test_variants_beside_the_first_are_named_in_note(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["model.fp16.safetensors", "model.fp32.safetensors"]
    assert listing(average(tmp_path, names)) == ["config.json", names[0]]
    (checkpoint, _) = ckptavg.open_run(tmp_path / "run").checkpoints
    assert checkpoint.notes == (
        f"weights are taken from {names[0]}, not from another variant: {names[1]}",
    )
    assert any(names[1] in r.message for r in caplog.records if "not copied" in r.message)


def test_variant_beside_usual_name_is_left_out(tmp_path, caplog):
    caplog.set_level("INFO")
    names = ["model.safetensors", "model.fp16.safetensors"]
    assert listing(average(tmp_path, names)) == ["config.json", names[0]]
    assert any(names[1] in r.message for r in caplog.records if "not copied" in r.message)


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_variant_shards_keep_their_index(tmp_path, stem):
    mapping = {"a": f"{stem}.fp16-00001-of-00002.safetensors"}
    mapping |= {"b": f"{stem}.fp16-00002-of-00002.safetensors"}
    index = f"{stem}.safetensors.index.fp16.json"
    for step in (1, 2):
        folder = tmp_path / "run" / f"step-{step}"
        for name, shard in mapping.items():
            save(folder / shard, {name: torch.full((2,), float(step))})
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
        (folder / "config.json").write_text("{}")
    out = averaged(tmp_path)
    assert listing(out) == sorted(["config.json", index, *mapping.values()])
    assert json.loads((out / index).read_text())["weight_map"] == mapping
    assert torch.equal(load_file(out / mapping["b"])["b"], torch.full((2,), 1.5))


def test_variants_exclude_numbered_checkpoints(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run" / f"model.epoch{step}.safetensors", {"a": torch.ones(2) * step})
    (tmp_path / "run" / "config.json").write_text("{}")
    assert len(ckptavg.open_run(tmp_path / "run")) == 2
