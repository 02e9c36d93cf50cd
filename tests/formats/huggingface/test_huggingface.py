"""Directories as ``save_pretrained`` writes them, and indices that lie."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckptavg.formats import is_checkpoint_directory, open_checkpoint
from ckptavg.formats.reader import Reader


def values(checkpoint) -> dict[str, torch.Tensor]:
    """What lies at the ranges of a table, as tensors."""
    found = {}
    with contextlib.closing(Reader()) as reader:
        for name, tensor in checkpoint.tensors.items():
            raw = bytearray(tensor.nbytes)
            reader.read(tensor, 0, tensor.numel, memoryview(raw))
            flat = torch.frombuffer(raw, dtype=getattr(torch, tensor.dtype.name))
            found[name] = flat.view(tensor.shape)
    return found


def write_index(directory: Path, shards: dict[str, dict[str, torch.Tensor]], kind="safetensors"):
    """Write shards and the index that lists them; the index."""
    for file, tensors in shards.items():
        if kind == "safetensors":
            save_file(tensors, directory / file)
        else:
            torch.save(tensors, directory / file)
    stem = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (directory / f"{stem}.index.json").write_text(json.dumps({"metadata": {}} | index))
    return index


def rewrite_index(directory: Path, **changes: str) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


SHARDS = {
    "model-00001-of-00002.safetensors": {"a": torch.rand(3), "b": torch.rand(2, 2)},
    "model-00002-of-00002.safetensors": {"c": torch.rand(4)},
}


@pytest.fixture
def sharded(tmp_path):
    write_index(tmp_path, SHARDS)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "12KB"}], ids=["single", "shards"])
def test_huggingface_reads_save_pretrained(language_model, tmp_path, options):
    language_model.save_pretrained(tmp_path, **options)
    files = {str(path) for path in tmp_path.glob("*.safetensors")}
    assert (len(files) > 1) == bool(options)
    assert is_checkpoint_directory(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.layout, {f.path for f in checkpoint.files}) == ("huggingface", files)
    found = values(checkpoint)
    expected = {n: p for n, p in language_model.state_dict().items() if n != "lm_head.weight"}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert checkpoint.nbytes == sum(p.nbytes for p in language_model.parameters())


def test_huggingface_bin_file_keeps_tie(language_model, tmp_path):
    torch.save(language_model.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.ties() == [["transformer.wte.weight", "lm_head.weight"]]
    assert set(values(checkpoint)) == set(language_model.state_dict())


def test_huggingface_bin_shards_are_read(tmp_path):
    shards = {f"pytorch_model-{i}.bin": tensors for i, tensors in enumerate(SHARDS.values())}
    write_index(tmp_path, shards, "bin")
    found = values(open_checkpoint(tmp_path))
    expected = {name: t for tensors in SHARDS.values() for name, t in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_huggingface_prefers_single_file_and_safetensors(sharded):
    torch.save({"old": torch.rand(1)}, sharded / "pytorch_model.bin")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b", "c"}
    save_file({"whole": torch.rand(1)}, sharded / "model.safetensors")
    assert set(open_checkpoint(sharded).tensors) == {"whole"}


def linked(sharded: Path, blobs: Path, snapshot: Path) -> Path:
    """Move files to a folder of blobs, named by numbers, and link to them from a snapshot."""
    files = sorted(path for path in sharded.iterdir() if path.is_file())
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(files):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"{number}", snapshot))
    return snapshot


@pytest.mark.parametrize("below", ["snapshots/abc", "snapshots/abc/transformer"])
def test_huggingface_reads_linked_shards_of_hub_cache(sharded, tmp_path, below):
    snapshot = linked(sharded, tmp_path / "blobs", tmp_path / below)
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c"}


def test_huggingface_follows_links_within_directory(sharded):
    shard = sharded / next(iter(SHARDS))
    shard.rename(sharded / "first")
    shard.symlink_to("first")
    assert set(open_checkpoint(sharded).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("blobs", "below"),
    [("other", "snapshots/abc"), ("disk2/a", "model"), ("a/blobs", "b/snapshots/abc")],
    ids=["beside the blobs", "another disk", "another repository's cache"],
)
def test_huggingface_follows_links_to_anywhere(sharded, tmp_path, blobs, below):
    (tmp_path / blobs).parent.mkdir(exist_ok=True)
    snapshot = linked(sharded, tmp_path / blobs, tmp_path / below)
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c"}


def test_huggingface_reports_broken_link_as_missing_shard(sharded, refusal):
    shard = sharded / next(iter(SHARDS))
    shard.unlink()
    shard.symlink_to("gone")
    assert "not there" in refusal(sharded)


def test_huggingface_drops_wrapper_across_shards(tmp_path):
    write_index(tmp_path, {"1.safetensors": {"module.a": torch.rand(1)},
                           "2.safetensors": {"module.b": torch.rand(1)}})  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.stored_names == {"a": "module.a", "b": "module.b"}


def test_huggingface_keeps_wrapper_in_one_shard_alone(tmp_path):
    write_index(tmp_path, {"1.safetensors": {"module.a": torch.rand(1)},
                           "2.safetensors": {"b": torch.rand(1)}})  # fmt: skip
    assert set(open_checkpoint(tmp_path).tensors) == {"module.a", "b"}


def test_huggingface_drops_n_averaged_of_any_shard(tmp_path):
    write_index(
        tmp_path,
        {
            "1.safetensors": {"n_averaged": torch.tensor(3), "module.a": torch.rand(1)},
            "2.safetensors": {"module.b": torch.rand(1)},
        },
    )
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_huggingface_record_is_trainer_state(sharded):
    (sharded / "trainer_state.json").write_text('{"global_step": 30, "epoch": 1.5}')
    assert open_checkpoint(sharded).record.step == 30


@pytest.mark.parametrize(
    "target",
    ["../outside.safetensors", "{outside}", "sub/inside.safetensors", "..", ".", "", "a/../../x"],
)
def test_huggingface_index_outside_directory_is_refused(tmp_path, refusal, target):
    directory, outside = tmp_path / "model", tmp_path / "outside.safetensors"
    (directory / "sub").mkdir(parents=True)
    write_index(directory, SHARDS)
    for path in (outside, directory / "sub" / "inside.safetensors"):
        save_file({"secret": torch.rand(2)}, path)
    target = target.format(outside=outside)
    rewrite_index(directory, secret=target)
    text = refusal(directory)
    assert repr(target) in text
    assert "outside" in text


@pytest.mark.parametrize("target", ["missing.safetensors", "bad\0name", "x" * 300])
def test_huggingface_index_of_missing_shard_is_refused(sharded, refusal, target):
    rewrite_index(sharded, c=target)
    assert "not there" in refusal(sharded)


def test_huggingface_index_of_missing_tensors_is_refused(sharded, refusal):
    rewrite_index(sharded, d="model-00001-of-00002.safetensors", b=next(reversed(SHARDS)))
    text = refusal(sharded)
    assert re.search(r"\b[bd], [bd]\b", text)


def test_huggingface_refuses_tensor_in_two_shards(sharded, refusal):
    save_file({"a": torch.rand(3), "c": torch.rand(4)}, sharded / next(reversed(SHARDS)))
    assert "two shards: a" in refusal(sharded)


def test_huggingface_names_damaged_shard(sharded, refusal):
    path = sharded / next(iter(SHARDS))
    os.truncate(path, path.stat().st_size - 1)
    assert str(path) in refusal(sharded)


INDICES = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no map": "{}",
    "a list for a map": '{"weight_map": ["a"]}',
    "numbers for files": '{"weight_map": {"a": 1}}',
    "no tensors": '{"weight_map": {}}',
    "deep": '{"weight_map": ' + "[" * 200_000,
    "not UTF-8": b"\xff\xfe",
    "itself": '{"weight_map": {"a": "model.safetensors.index.json"}}',
}


@pytest.mark.parametrize("content", INDICES.values(), ids=INDICES)
def test_huggingface_index_malformed_is_refused(sharded, refusal, content):
    path = sharded / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refusal(sharded)


def test_huggingface_directory_without_weights_is_refused(tmp_path, refusal):
    (tmp_path / "config.json").write_text("{}")
    assert not is_checkpoint_directory(tmp_path)
    assert "not itself a checkpoint" in refusal(tmp_path)
