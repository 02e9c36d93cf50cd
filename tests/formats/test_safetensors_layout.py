"""Headers of safetensors outputs: what an input's says beside its tensors goes along."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import save
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import ckptavg
from ckptavg.formats.safetensors.layout import header_metadata

KOHYA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "4.0",
    "ss_sd_model_hash": "e1441589",
    "ss_new_vae_hash": "63aeecb90f",
    "ss_loss_type": "l2",
    "modelspec.architecture": "stable-diffusion-v1/lora",
}
UNTRUE = {
    "sshs_model_hash": "55b1",
    "sshs_legacy_hash": "d1ab",
    "modelspec.hash_sha256": "0x0f",
    "sha256": "ab",
    "val_loss": "0.25",
    "eval/accuracy": "91",
    "best_metric": "1e-3",
}


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {name: text for name, text in file.metadata().items() if name != "ckptavg"}


@pytest.mark.parametrize("out", ["x.safetensors", "x"])
def test_safetensors_header_is_kept_but_hashes_and_scores(tmp_path, caplog, out):
    caplog.set_level("INFO")
    for step in (1, 2):
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        told = {"format": "pt", "step": str(step), **KOHYA, **UNTRUE}
        save_file({"w": torch.ones(2)}, folder / "model.safetensors", told)
    written = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / out)
    path = written / "model.safetensors" if written.is_dir() else written
    assert metadata_of(path) == {"format": "pt", "step": "2", **KOHYA}
    (note,) = [r.message for r in caplog.records if "untrue" in r.message]
    assert "sshs_model_hash" in note


def test_safetensors_header_text_is_in_each_shard(tmp_path):
    mapping = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for step in (1, 2):
        folder = tmp_path / "run" / f"step-{step}"
        folder.mkdir(parents=True)
        for name, shard in mapping.items():
            save_file({name: torch.ones(2)}, folder / shard, {"format": "pt", "alpha": "32"})
        index = json.dumps({"metadata": {}, "weight_map": mapping})
        (folder / "model.safetensors.index.json").write_text(index)
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "out")
    for shard in mapping.values():
        assert metadata_of(out / shard) == {"format": "pt", "alpha": "32"}


def test_header_metadata_drops_dcp_sharding_info():
    own = {"DCP_SHARDING_INFO": "{}", "DCP_VERSION": "1.0", "format": "pt"}
    assert header_metadata("{}", own) == ({"format": "pt", "ckptavg": "{}"}, [])


def test_header_metadata_format_is_pt():
    kept, notes = header_metadata("made", {"format": "mlx", "a": "b"})
    assert kept == {"a": "b", "format": "pt", "ckptavg": "made"}
    assert not notes


@given(st.dictionaries(st.text(max_size=9), st.text(max_size=9)))
def test_header_metadata_keeps_or_names_entries(template):
    kept, notes = header_metadata("made", template)
    lost = template.keys() - kept.keys() - {"DCP_SHARDING_INFO", "DCP_VERSION"}
    assert bool(lost) == bool(notes)
    assert all(kept[name] == template[name] for name in template.keys() & kept.keys() - {"format"})


def test_safetensors_header_drops_changing_number(tmp_path):
    for i in (1, 2):
        beside = {"step": 10 * i, "va": i / 7, "p_drop": 0.1, "author": "me"}
        save(tmp_path / "run" / f"{i}.safetensors", {"w": torch.ones(2) * i}, **beside)
    ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "step", "p_drop", "author", "ckptavg"}
