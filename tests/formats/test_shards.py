"""Shards of one model without an index: put together by their offsets or their names."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import names, same_bits, save
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from ckptavg import average, open_run
from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint, shards
from ckptavg.formats.tiling import tiles

PLACES = {"emb": Shard(0), "w": Shard(1), "norm": Replicate()}


def whole(step: int) -> dict[str, torch.Tensor]:
    """A model at one step, of extents that two ranks share unevenly."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"emb": (5, 4), "w": (4, 7), "norm": (4,), "scale": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def put_boxes(path: Path, boxes: dict[str, tuple[torch.Tensor, list[int]]]) -> None:
    """One rank's file as torch's writer lays it out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    info = {name: {"saved_offsets": start} for name, (_, start) in boxes.items()}
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}
    save_file({name: box.contiguous() for name, (box, _) in boxes.items()}, path, metadata)


def put_halves(directory: Path, step: int = 1, names: tuple[str, str] | None = None) -> Path:
    """A model cut along its rows for two ranks, the second of which has the 0-d tensor too."""
    state = whole(step)
    for rank in range(2):
        boxes = {
            name: (
                tensor.chunk(2)[rank],
                [rank * ((len(tensor) + 1) // 2), *[0] * (tensor.dim() - 1)],
            )
            for name, tensor in state.items()
            if tensor.dim()
        }
        if rank:
            boxes["scale"] = (state["scale"], [])
        file = (names or ("", ""))[rank] or f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        put_boxes(directory / file, boxes)
    return directory


def put_counted(directory: Path, states, pattern="model-{:05d}-of-{:05d}.safetensors") -> Path:
    for i, state in enumerate(states, 1):
        save(directory / pattern.format(i, len(states)), state)
    return directory


def save_from_rank(rank: int, port: int, run: Path) -> None:
    """What one of two processes of a training saves with torch's own writer."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ["WORLD_SIZE"] = "2"
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for step in (500, 1000):
        state = {
            name: distribute_tensor(tensor, mesh, [PLACES[name]]) if name in PLACES else tensor
            for name, tensor in whole(step).items()
        }
        files = {"emb": 1, "w": 2, "norm": 2, "scale": 1}
        for kind, mapping in (("files", files), ("file", None)):
            writer = HuggingFaceStorageWriter(
                str(run / kind / f"step-{step}"), mapping, save_distributed=True
            )
            dcp.save(state, storage_writer=writer)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_of_torch_ranks_form_run_of_whole_models(tmp_path):
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(save_from_rank, (port, tmp_path), 2)
    for kind, count in (("file", 2), ("files", 4)):
        assert len(list((tmp_path / kind / "step-500").iterdir())) == count
        run = open_run(tmp_path / kind)
        assert [c.step for c in run] == [500, 1000]
        made = average(run)
        for name, tensor in made.items():
            mean = (whole(500)[name].double() + whole(1000)[name].double()) / 2
            assert torch.equal(tensor, mean.float()), name
        assert same_bits(average(run.last(1))["w"], whole(1000)["w"])


def test_shards_are_written_whole(tmp_path):
    run = open_run(put_halves(tmp_path / "model"))
    average(run, out=tmp_path / "x.safetensors")
    assert {n: t.shape for n, t in load_file(tmp_path / "x.safetensors").items()} == {
        n: t.shape for n, t in whole(1).items()
    }
    out = average(run, out=tmp_path / "out")
    again = open_checkpoint(out)
    assert all(same_bits(t, whole(1)[n]) for n, t in average(open_run(out)).items())
    assert again.is_average
    for file in [tmp_path / "x.safetensors", *out.glob("*.safetensors")]:
        with safe_open(file, "pt") as opened:
            assert "DCP_SHARDING_INFO" not in opened.metadata()


def test_shards_named_all_are_their_directory(tmp_path):
    put_halves(tmp_path / "step-1")
    run = open_run(*(tmp_path / "step-1").iterdir())
    assert names(run) == ["step-1"]


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
def test_shards_numbered_of_total_are_one_model(tmp_path, suffix):
    for step in (1, 2):
        first, *others = [{name: tensor} for name, tensor in whole(step).items()]
        put_counted(
            tmp_path / f"checkpoint-{step}", [first, *others], "m-{:05d}-of-{:05d}" + suffix
        )
    made = average(open_run(tmp_path))
    assert made.keys() == whole(1).keys()
    mean = (whole(1)["w"].double() + whole(2)["w"].double()) / 2
    assert torch.equal(made["w"], mean.float())


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("part_{}_of_{}.pt", [1, 3]),
        ("part_{}_of_{}.pt", [2, 3]),
        ("m-{:05d}-of-{:05d}.safetensors", [1, 2]),
        ("m-{:05d}-of-{:05d}.safetensors", [1]),
        ("m-{:05d}-of-{:05d}.safetensors", [3]),
    ],
)
def test_shards_missing_are_named(tmp_path, pattern, kept):
    put_counted(tmp_path, [{f"{i}.w": torch.ones(2)} for i in range(3)], pattern)
    missing = [i for i in (1, 2, 3) if i not in kept]
    for i in missing:
        (tmp_path / pattern.format(i, 3)).unlink()
    with pytest.raises(CheckpointError, match=f"parts of one model: {len(kept)} of 3") as refused:
        open_run(tmp_path)
    assert all(pattern.format(i, 3) in str(refused.value) for i in missing)


def test_shards_named_incompletely_are_refused(tmp_path):
    put_counted(tmp_path, [{f"{i}.w": torch.ones(2)} for i in range(3)])
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="parts of one model, without model-00002-of-00003"):
        open_run(paths[0], paths[2])
    assert names(open_run(paths[0])) == [paths[0].name]


def test_shards_that_are_slices_are_refused(tmp_path):
    """Tensor-parallel ranks that bear the names of shards have the same tensors, in slices."""
    states = [{"emb.weight": torch.randn(4, 2), "norm.weight": torch.ones(2)} for _ in range(2)]
    put_counted(tmp_path, states)
    with pytest.raises(CheckpointError, match=r"parts of one model .* several have 'emb.weight'"):
        open_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"parts of one model"):
        open_run(*sorted(tmp_path.iterdir()))


def test_shards_exclude_epochs_numbered_of_total(tmp_path):
    for pattern in ("epoch_{}_of_{}.pt", "epoch-{:05d}-of-{:05d}.safetensors"):
        directory = put_counted(tmp_path / pattern[:7], [whole(i) for i in range(3)], pattern)
        assert len(open_run(directory)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4), [2, 0])), "'emb' overlap or leave"),
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4), [4, 0])), "'emb' overlap or leave"),
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4), [2**57, 2**57])), "'emb' overlap"),
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4), [3])), "of 'emb' do not fit its shape"),
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4), [-3, 0])), "of 'emb' are malformed"),
        (lambda boxes: boxes.update(emb=(torch.ones(2, 4).half(), [3, 0])), "differ in type"),
        (lambda boxes: boxes.update(emb=(torch.ones(2), [3])), "differ in type"),
        (lambda boxes: boxes.update(norm=(torch.ones(4), [0])), "'norm' overlap"),
    ],
)
def test_shards_whose_boxes_do_not_tile_are_refused(tmp_path, change, message):
    state = whole(1)
    first = {"emb": (state["emb"][:3], [0, 0]), "norm": (state["norm"], [0])}
    second = {"emb": (state["emb"][3:], [3, 0])}
    put_boxes(tmp_path / "shard-00001-model-00001-of-00001.safetensors", first)
    put_boxes(tmp_path / "shard-00002-model-00001-of-00001.safetensors", second)
    assert open_checkpoint(tmp_path).tensors["emb"].shape == (5, 4)
    change(second)
    put_boxes(tmp_path / "shard-00002-model-00001-of-00001.safetensors", second)
    with pytest.raises(CheckpointError, match=f"parts of one model .*{message}"):
        open_run(tmp_path)


def test_shards_name_absent_rank(tmp_path):
    put_halves(tmp_path)
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"parts of one model .*there is no shard-00001"):
        open_run(tmp_path)


def test_shards_name_few_of_many_absent_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_MISSING", 50)
    put_halves(tmp_path, names=("", "shard-999999999-model-00001-of-00001.safetensors"))
    (tmp_path / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no shard-00001, .* and 46 more"):
        open_checkpoint(tmp_path)


@given(st.data())
def test_shards_cut_along_any_dimension_are_joined(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("shards")
    extents = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    state = torch.randn(extents)
    ranks = data.draw(st.integers(1, 4))
    dimension = data.draw(st.integers(0, len(extents) - 1))
    position = 0
    for rank, box in enumerate(state.chunk(ranks, dimension), 1):
        start = [0] * len(extents)
        start[dimension] = position
        position += box.shape[dimension]
        put_boxes(
            directory / f"shard-{rank:05d}-model-00001-of-00001.safetensors", {"w": (box, start)}
        )
    found = open_checkpoint(directory)
    assert tiles(found.tensors["w"].shape, found.tensors["w"].pieces)
    assert same_bits(average(open_run(directory))["w"], state)
