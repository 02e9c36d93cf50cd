"""Directories of torch.distributed.checkpoint, written by torch in one process and in several."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckptavg
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.errors import CheckpointError, RunError
from ckptavg.formats import is_checkpoint_directory, open_checkpoint
from ckptavg.formats.dcp import reader as our_dcp
from ckptavg.formats.dcp.reader import Box
from ckptavg.formats.tiling import tiles
from ckptavg.models.runtime import Runtime

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"
)
Tensors = Mapping[str, torch.Tensor]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Embedding(7, 2))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    one = model()
    optimizer = torch.optim.AdamW(one[0].parameters())
    one[1](one[0](torch.randn(4, 5))).sum().backward()
    optimizer.step()
    return one, optimizer


@pytest.fixture
def run(tmp_path):
    """Three checkpoints with an optimizer's state and plain values, and their state dicts."""
    states = []
    for step in (8, 9, 10):
        one, optimizer = trained(step)
        dcp.save(
            {
                "model": one.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": {"step": step, "names": ["a", "b"], "best": torch.tensor([0.5])},
                "epoch": step // 4,
                "mixed": [1, torch.ones(2)],
                "object": range(3),
            },
            checkpoint_id=tmp_path / "run" / f"step_{step}",
        )
        states.append({name: t.clone() for name, t in one.state_dict().items()})
    return tmp_path / "run", states


def mean(states, name: str) -> torch.Tensor:
    return (sum(s[name].double() for s in states) / len(states)).to(states[0][name].dtype)


def test_dcp_opens_as_table_of_ranges(run):
    directory, states = run
    found = open_checkpoint(directory / "step_9")
    assert (found.layout, found.key, found.record.epoch) == ("distributed", "model", 2)
    assert set(found.tensors) == set(states[1])
    for name, tensor in found.tensors.items():
        piece = tensor.pieces[0]
        with open(piece.file, "rb") as file:
            file.seek(piece.offset)
            raw = bytearray(file.read(tensor.nbytes))
        values = torch.frombuffer(raw, dtype=states[1][name].dtype).view(tensor.shape)
        assert torch.equal(values, states[1][name])


def test_dcp_run_is_ordered_and_averaged_exactly(run):
    directory, states = run
    opened = ckptavg.open_run(directory)
    assert [c.path.name for c in opened] == ["step_8", "step_9", "step_10"]
    average = ckptavg.average(opened)
    for name, tensor in average.items():
        expected = mean(states, name) if tensor.is_floating_point() else states[-1][name]
        assert torch.equal(tensor, expected), name


def test_dcp_output_is_loaded_by_torch(run, tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    directory, states = run
    out = ckptavg.average(ckptavg.open_run(directory), out=tmp_path / "average")
    loaded: dict[str, Any] = {
        "model": model().state_dict(),
        "epoch": None,
        "progress": {"step": None, "names": None},
        "ckptavg": None,
    }
    dcp.load(loaded, checkpoint_id=out)
    assert (loaded["epoch"], loaded["progress"]) == (2, {"step": 10, "names": ["a", "b"]})
    for name, tensor in loaded["model"].items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, mean(states, name))
    again = open_checkpoint(out)
    assert again.is_average
    told = next(r.getMessage() for r in caplog.records if "not taken over" in r.getMessage())
    assert told.endswith("optimizer, progress.best, mixed, object")


def test_dcp_output_is_read_by_dcp_to_torch_save(run, tmp_path):
    directory, states = run
    out = ckptavg.average(ckptavg.open_run(directory), out=tmp_path / "average")
    dcp_to_torch_save(out, tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert set(plain) == {"model", "epoch", "progress", "ckptavg"}
    assert torch.equal(plain["model"]["0.weight"], mean(states, "0.weight"))


def test_dcp_output_drops_nested_optimizer_alone(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    for step in (1, 2):
        one, optimizer = trained(step)
        app = {"model": one.state_dict(), "optim": optimizer.state_dict(), "step": step}
        dcp.save(
            {"app": app, "hparams": {"optimizer": "adam"}},
            checkpoint_id=tmp_path / "run" / f"step_{step}",
        )
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "average")
    loaded = {"app": {"step": 0}, "hparams": {"optimizer": ""}}
    dcp.load(loaded, checkpoint_id=out)
    assert loaded == {"app": {"step": 2}, "hparams": {"optimizer": "adam"}}
    told = next(r.getMessage() for r in caplog.records if "not taken over" in r.getMessage())
    assert told.endswith(": app.optim")
    assert open_checkpoint(out).other_entries == ("hparams", "app.step")


def test_dcp_average_in_run_is_left_out(run):
    directory, _ = run
    ckptavg.average(ckptavg.open_run(directory), out=directory / "step_11")
    opened = ckptavg.open_run(directory)
    assert len(opened) == 3
    assert opened.left_out == ((directory / "step_11", "an average that ckptavg wrote"),)


def test_dcp_output_replaces_only_dcp_directory(run, tmp_path):
    directory, _ = run
    out = ckptavg.average(ckptavg.open_run(directory), out=tmp_path / "average")
    ckptavg.average(ckptavg.open_run(directory).last(1), out=out, overwrite=True)
    assert len(open_checkpoint(out).provenance.inputs) == 1
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ckptavg.CkptavgError, match=r"notes\.txt"):
        ckptavg.average(ckptavg.open_run(directory), out=out, overwrite=True)


def test_dcp_average_in_pt_file_has_bare_names(run, tmp_path):
    directory, states = run
    out = ckptavg.average(ckptavg.open_run(directory), out=tmp_path / "average.pt")
    found = torch.load(out)
    assert torch.equal(found["state_dict"]["0.bias"], mean(states, "0.bias"))


@pytest.mark.parametrize(
    ("saved", "key"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state}, "state_dict"),
        (lambda state: {"app": {"model": state, "optim": {"state": {}}}}, "app.model"),
        (lambda state: {"state": {"model": state, "timestamp": {"batch": 3}}}, "state.model"),
        (lambda state: {"model": {"encoder": state}}, "model"),
        (lambda state: {"net_g": state}, "net_g"),
    ],
    ids=["bare", "state_dict", "app", "state", "nested", "named"],
)
def test_dcp_finds_nested_weights(tmp_path, saved, key):
    state = dict(model().state_dict())
    for step in (1, 2):
        dcp.save(saved(state), checkpoint_id=tmp_path / "run" / f"step_{step}")
    given = key if key == "net_g" else None
    opened = ckptavg.open_run(tmp_path / "run", key=given)
    assert opened.checkpoints[0].key == key
    out = ckptavg.average(opened, out=tmp_path / "average")
    loaded = saved({name: torch.zeros_like(t) for name, t in state.items()})
    dcp.load(loaded, checkpoint_id=out)
    assert str(loaded) == str(saved(state))


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def save_from_rank(rank: int, size: int, port: int, directory: Path) -> None:
    """One process of a training that shards its model by FSDP, over two dimensions if it can."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    torch.manual_seed(0)
    sharded = model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (size,)))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(35.0).view(5, 7)
    state = {
        "model": sharded.state_dict()
        | {
            "grid": distribute_tensor(whole, grid, [Shard(0), Shard(1)]),
            "columns": distribute_tensor(whole, grid, [Replicate(), Shard(1)]),
            "one": distribute_tensor(torch.ones(1), grid, [Shard(0), Replicate()]),
        }
    }
    dcp.save(state, checkpoint_id=directory)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_dcp_of_four_processes_is_read_by_one(tmp_path):
    port = free_port()
    torch.multiprocessing.spawn(save_from_rank, (4, port, tmp_path / "step_1"), 4)
    assert len(list((tmp_path / "step_1").glob("*.distcp"))) == 4
    opened = open_checkpoint(tmp_path / "step_1")
    assert len(opened.tensors["grid"].pieces) == 4
    found = ckptavg.average([opened])
    torch.manual_seed(0)
    expected = model().state_dict()
    whole = torch.arange(35.0).view(5, 7)
    expected |= {"grid": whole, "columns": whole, "one": torch.ones(1)}
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    out = ckptavg.average([opened], out=tmp_path / "average")
    loaded = {"model": {name: torch.zeros_like(t) for name, t in expected.items()}}
    dcp.load(loaded, checkpoint_id=out)
    for name, tensor in expected.items():
        assert torch.equal(loaded["model"][name], tensor), name


# What a directory can be damaged by, or made to mislead with.


def damage(directory: Path, change) -> Path:
    """The directory with its metadata changed, by torch's own classes."""
    path = directory / "step_9" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    changed = change(metadata)
    path.write_bytes(pickle.dumps(metadata if changed is None else changed))
    return directory / "step_9"


def place(metadata, name="model.0.weight"):
    return next(v for k, v in metadata.storage_data.items() if k.fqn == name)


def outside(name):
    def change(metadata):
        place(metadata).relative_path = name

    return change


def longer(metadata):
    place(metadata).length = 10**9


def shifted(metadata):
    place(metadata).offset += 1


def swapped(metadata):
    a, b = place(metadata), place(metadata, "model.2.weight")
    a.offset, b.offset, a.length, b.length = b.offset, a.offset, b.length, a.length


def holes(metadata):
    metadata.state_dict_metadata["model.0.weight"].size = torch.Size([4, 5])


def overlap(metadata):
    item = metadata.state_dict_metadata["model.0.weight"]
    item.chunks.append(item.chunks[0])


def huge(metadata):
    item = metadata.state_dict_metadata["model.0.weight"]
    item.size = item.chunks[0].sizes = torch.Size([2**40, 2**20])


def nowhere(metadata):
    index = next(k for k in metadata.storage_data if k.fqn == "model.0.weight")
    del metadata.storage_data[index]


def compressed(metadata):
    place(metadata).transform_descriptors = ["zstd"]


def shared(metadata):
    place(metadata, "epoch").offset = place(metadata, "progress.step").offset


def one_place(metadata):
    metadata.planner_data["epoch"] = metadata.planner_data["progress.step"]


def negative(metadata):
    place(metadata).offset = -5


class Executed:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-never-be-there",)


DAMAGE = {
    "a file above": (outside("../step_8/__0_0.distcp"), "outside its directory"),
    "an absolute path": (outside("/etc/passwd"), "outside its directory"),
    "no file": (outside("__9_0.distcp"), "not there"),
    "a name with a NUL": (outside("a\0b"), "not there|cannot be read"),
    "itself": (outside("."), "outside its directory|not there"),
    "past the end": (longer, "runs past"),
    "shifted": (shifted, "not a readable"),
    "shared": (shared, "share bytes"),
    "one place": (one_place, "two items have the place"),
    "another tensor": (swapped, "is not what"),
    "holes": (holes, "overlap or leave holes"),
    "overlap": (overlap, "overlap or leave holes"),
    "huge": (huge, "malformed|is not what"),
    "nowhere": (nowhere, "is nowhere"),
    "compressed": (compressed, "compressed"),
    "negative": (negative, "malformed"),
    "a gadget": (lambda _: Executed(), "something else"),
    "a list": (lambda _: [1, 2], "something else"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_dcp_metadata_damaged_is_one_error(run, change, message):
    path = damage(run[0], change)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in caught.value.message
    assert not Path("/tmp/should-never-be-there").exists()


def test_dcp_hostile_object_is_not_run_or_written(tmp_path):
    for step in (1, 2):
        state = {"model": {"w": torch.ones(step)[:1]}, "extra": Executed(), "n": 1}
        dcp.save(state, checkpoint_id=tmp_path / "hostile" / f"step_{step}")
    out = ckptavg.average(ckptavg.open_run(tmp_path / "hostile"), out=tmp_path / "average")
    content = b"".join(p.read_bytes() for p in out.iterdir())
    assert b"should-never" not in content
    assert not Path("/tmp/should-never-be-there").exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_dcp_follows_links_to_another_disk(run, tmp_path, name):
    path = run[0] / "step_9" / name
    before = set(open_checkpoint(run[0] / "step_9").tensors)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert set(open_checkpoint(run[0] / "step_9").tensors) == before


def test_dcp_without_metadata_is_error(run):
    (run[0] / "step_9" / ".metadata").unlink()
    for named in (run[0], run[0] / "step_9"):
        with pytest.raises(RunError, match=r"step_9 holds parts of one model but no \.metadata"):
            ckptavg.average(ckptavg.open_run(named))


def test_dcp_values_beyond_limit_are_not_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr(our_dcp, "_MOST_BYTES", 1)
    out = ckptavg.average(ckptavg.open_run(run[0]), out=tmp_path / "average")
    names = set(pickle.loads((out / ".metadata").read_bytes()).state_dict_metadata)
    assert names == {*(f"model.{name}" for name in run[1][0]), "ckptavg"}


def test_dcp_output_drops_optimizer_of_any_name(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    for step in (1, 2):
        one, optimizer = trained(step)
        saved = {"model": one.state_dict(), "nets": {"opt_g": optimizer.state_dict()}, "n": step}
        dcp.save(saved, checkpoint_id=tmp_path / "run" / f"step_{step}")
    out = ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / "average")
    names = pickle.loads((out / ".metadata").read_bytes()).state_dict_metadata
    assert not [name for name in names if name.startswith("nets")]
    assert any(r.getMessage().endswith("checkpoint: nets.opt_g") for r in caplog.records)


def test_dcp_metadata_cut_short_is_error(run):
    path = run[0] / "step_9" / ".metadata"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"\.metadata is not a readable"):
        open_checkpoint(run[0] / "step_9")
    assert is_checkpoint_directory(run[0] / "step_9")


def test_dcp_metadata_without_paths_keeps_item_names(run):
    def change(metadata):
        metadata.planner_data = None

    path = damage(run[0], change)
    assert "model.0.weight" in open_checkpoint(path, key="").tensors


@st.composite
def cuts(draw):
    """A shape, and boxes that tile it: cut in two again and again at random places."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        start, extent = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        places = [d for d in range(len(shape)) if extent[d] > 1]
        if not places:
            boxes.append((start, extent))
            continue
        d = draw(st.sampled_from(places))
        at = draw(st.integers(1, extent[d] - 1))
        first = (*extent[:d], at, *extent[d + 1 :])
        second = (*extent[:d], extent[d] - at, *extent[d + 1 :])
        boxes += [(start, first), ((*start[:d], start[d] + at, *start[d + 1 :]), second)]
    return shape, boxes


def covers(shape, boxes) -> bool:
    """Whether each element is covered once, by counting them."""
    count = torch.zeros(shape, dtype=torch.int64)
    for start, extent in boxes:
        part = tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))
        if any(a + n > m for a, n, m in zip(start, extent, shape, strict=True)):
            return False
        count[part] += 1
    return bool((count == 1).all())


@given(cuts(), st.data())
def test_tiles_detects_holes_and_overlaps(case, data):
    shape, boxes = case
    as_boxes = lambda boxes: [Box(a, n, "f", 0, 0) for a, n in boxes]  # noqa: E731
    assert tiles(shape, as_boxes(boxes))
    i = data.draw(st.integers(0, len(boxes) - 1))
    start, extent = boxes[i]
    moved = tuple(data.draw(st.integers(0, 5)) for _ in start)
    other = [*boxes[:i], (moved, extent), *boxes[i + 1 :]]
    assert tiles(shape, as_boxes(other)) == covers(shape, other)


def test_dcp_reads_tensors_of_any_memory_order(tmp_path):
    values = {
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "channels_last": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "part": torch.arange(20.0)[3:9],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3).bfloat16(),
    }
    dcp.save({"model": values}, checkpoint_id=tmp_path / "step_1")
    opened = open_checkpoint(tmp_path / "step_1")
    found = ckptavg.average([opened])
    loaded = {"model": {name: torch.full_like(t, 9) for name, t in values.items()}}
    dcp.load(loaded, checkpoint_id=ckptavg.average([opened], out=tmp_path / "average"))
    for name, tensor in values.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(loaded["model"][name], tensor), name


def test_update_checkpoint_keeps_dcp_layout(tmp_path):
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    dcp.save({"model": net.state_dict(), "epoch": 4}, checkpoint_id=tmp_path / "one")
    out, cpu = tmp_path / "refreshed", Runtime(torch.device("cpu"))
    update_checkpoint(
        open_checkpoint(tmp_path / "one"), out, StatisticsPass(net, [torch.randn(8, 5)], cpu)
    )
    loaded = {"model": nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).state_dict(), "epoch": 0}
    dcp.load(loaded, checkpoint_id=out)
    assert loaded["epoch"] == 4
    assert torch.equal(loaded["model"]["1.running_mean"], net[1].running_mean)
    assert net[1].running_mean.abs().sum() > 0
