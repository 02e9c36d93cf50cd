"""Inputs at URLs, on a file system in memory: found, ordered, opened and averaged as local ones."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import zipfile
from datetime import datetime, timedelta, timezone
from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from fsspec.registry import known_implementations
from helpers import average_by_hand, names, same_bits, save, save_states, save_weight
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from stores import Store, upload
from writers import write_trainer_checkpoint

import ckptavg
from ckptavg.averaging import stream
from ckptavg.cli import main
from ckptavg.errors import CheckpointError, CkptavgError, RunError, UsageError
from ckptavg.formats import open_checkpoint
from ckptavg.io import paths
from ckptavg.io.range_cache import merge_ranges
from ckptavg.io.stamp import FileStamp


def states(count: int = 3) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        {
            "conv.weight": torch.randn(7, 3, 3, 3).to(memory_format=torch.channels_last),
            "half": torch.randn(11, 13).bfloat16(),
            "turned": torch.randn(40, 30).t(),
            "scalar": torch.randn(()),
            "empty": torch.randn(0, 4),
            "large": torch.randn(300, 400),
            "count": torch.tensor(i),
        }
        for i in range(count)
    ]


def write_run(directory: pathlib.Path, kind: str) -> pathlib.Path:
    for i, state in enumerate(states(), 1):
        if kind == "shards":
            write_trainer_checkpoint(directory / f"checkpoint-{i}", state, i)
        elif kind == "legacy":
            directory.mkdir(exist_ok=True)
            path = directory / f"epoch_{i}.pt"
            torch.save(state, path, _use_new_zipfile_serialization=False)
        elif kind == ".safetensors":
            save(directory / f"epoch_{i}{kind}", {k: v.contiguous() for k, v in state.items()})
        else:
            save(directory / f"epoch_{i}{kind}", state, epoch=i)
    return directory


def refusal(url: str) -> str:
    """Open something that must not open; the one line that says why."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(url)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[k], other[k]) for k in one)


@pytest.mark.parametrize("kind", [".pt", ".safetensors", "legacy", "shards"])
def test_remote_average_equals_local_average(store, tmp_path, kind):
    local = write_run(tmp_path / "run", kind)
    url = upload(local)
    here, there = ckptavg.open_run(local), ckptavg.open_run(url)
    assert names(there) == names(here)
    assert [c.step for c in there] == [c.step for c in here] == [1, 2, 3]
    assert [c.record for c in there] == [c.record for c in here]
    assert [str(c.path) for c in there] == [f"{url}/{name}" for name in names(here)]
    average = ckptavg.average(there)
    assert same(average, ckptavg.average(here))
    large = [state["large"] for state in states()]
    assert same_bits(average["large"], average_by_hand(large, [1, 1, 1], torch.float32))


def test_remote_directory_is_template_of_output(store, tmp_path):
    local = write_run(tmp_path / "run", "shards")
    written = [
        ckptavg.average(ckptavg.open_run(place), out=tmp_path / name)
        for place, name in ((local, "here"), (upload(local), "there"))
    ]
    here, there = ({p.name: p.read_bytes() for p in out.iterdir()} for out in written)
    assert here.keys() == there.keys() >= {"config.json", "generation_config.json"}
    for name in here:
        if not name.startswith("model-"):  # which tell where the inputs were
            assert there[name] == here[name]
    assert same(
        ckptavg.average(ckptavg.open_run(written[1])), ckptavg.average(ckptavg.open_run(local))
    )


def test_remote_components_are_averaged_and_copied(store, tmp_path):
    listed = [{"path": path, "type": "t"} for path in ("", "1_Pooling", "2_Dense")]
    texts = {"modules.json": json.dumps(listed), "1_Pooling/config.json": "{}", "a/b/c.txt": "c"}
    for step in (1, 2):
        folder = tmp_path / "run" / f"step_{step}"
        save(folder / "model.safetensors", {"w": torch.full((3,), float(step))})
        save(folder / "2_Dense" / "model.safetensors", {"w": torch.full((3,), 10.0 * step)})
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "optimizer.pt").write_text("old")
    out = ckptavg.average(ckptavg.open_run(upload(tmp_path / "run")), out=tmp_path / "out")
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {*texts, "model.safetensors", "2_Dense/model.safetensors"}
    assert torch.equal(
        load_file(out / "2_Dense" / "model.safetensors")["w"], torch.full((3,), 15.0)
    )


def test_remote_file_is_template_of_output(store, tmp_path):
    for epoch in (1, 2):
        values = {"model": {"w": torch.full((3,), float(epoch))}, "scale": torch.tensor(0.5)}
        (tmp_path / "run").mkdir(exist_ok=True)
        torch.save(values | {"epoch": epoch}, tmp_path / "run" / f"epoch_{epoch}.ckpt")
    run = ckptavg.open_run(upload(tmp_path / "run"))
    found = torch.load(ckptavg.average(run, out=tmp_path / "out.ckpt"))
    assert torch.equal(found["model"]["w"], torch.full((3,), 1.5))
    assert (found["epoch"], found["scale"]) == (2, torch.tensor(0.5))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
def test_remote_dcp_is_averaged_and_template_of_output(store, tmp_path):
    written = [{name: t.contiguous() for name, t in state.items()} for state in states()]
    for step, state in enumerate(written):
        dcp.save({"model": state, "step": step}, checkpoint_id=tmp_path / "run" / f"step_{step}")
    run = ckptavg.open_run(upload(tmp_path / "run"))
    local = ckptavg.open_run(tmp_path / "run")
    assert same(ckptavg.average(run), ckptavg.average(local))
    loaded = {"model": {name: torch.zeros_like(t) for name, t in written[0].items()}, "step": -1}
    dcp.load(loaded, checkpoint_id=ckptavg.average(run, out=tmp_path / "out"))
    assert loaded["step"] == 2
    assert same(loaded["model"], ckptavg.average(local))


def test_remote_and_local_checkpoints_form_one_run(store, tmp_path):
    paths = save_states(tmp_path / "run", states())
    remote = upload(paths[1], "elsewhere/epoch_2.pt")
    mixed = ckptavg.open_run(paths[0], remote, paths[2])
    assert sorted(str(c.path) for c in mixed) == sorted([str(paths[0]), remote, str(paths[2])])
    one = ckptavg.average(sorted(mixed, key=lambda c: c.path.name))
    assert same(one, ckptavg.average(ckptavg.open_run(tmp_path / "run")))


def test_remote_repeats_count_once_unless_numbered(store, tmp_path):
    run = tmp_path / "run"
    for suffix in (".pt", ".safetensors"):
        for i in (2, 10):
            save_weight(run / f"epoch_{i}{suffix}", float(i))
    save_weight(run / "epoch_11.safetensors", 10.0)
    shutil.copy(run / "epoch_10.pt", run / "last.pt")
    shutil.copy(run / "epoch_10.safetensors", run / "best.safetensors")
    save_weight(run / "optimizer.pt", 0.0)
    url = upload(run)
    torches = ckptavg.open_run(url, glob="*.pt")
    assert names(torches) == ["epoch_2.pt", "epoch_10.pt"]
    assert torches.notes == (f"{url}/last.pt repeats epoch_10.pt and counts once",)
    plain = ckptavg.open_run(url, glob="*.safetensors")
    assert names(plain) == [f"epoch_{i}.safetensors" for i in (2, 10, 11)]
    assert {path.name for path, _ in torches.left_out} >= {"last.pt", "optimizer.pt"}
    again = ckptavg.open_run(url, f"{url}/", f"{url}/epoch_2.pt", glob="*.pt")
    assert names(again) == names(torches)


def test_remote_run_lists_new_checkpoints(store, tmp_path):
    url = upload(save_weight(tmp_path / "epoch_1.pt"), "run/epoch_1.pt").rpartition("/")[0]
    assert len(ckptavg.open_run(url)) == 1
    upload(save_weight(tmp_path / "epoch_2.pt"), "run/epoch_2.pt")
    assert len(ckptavg.open_run(url)) == 2


def test_remote_run_refuses_two_runs_below_url(store, tmp_path):
    for name in ("a", "b"):
        upload(save_weight(tmp_path / "epoch_1.pt"), f"runs/{name}/epoch_1.pt")
    with pytest.raises(RunError, match=r"holds 2 runs: store://runs/a, store://runs/b"):
        ckptavg.open_run("store://runs")
    with pytest.raises(RunError, match=r"store://runs/c does not exist.*store://runs/a"):
        ckptavg.open_run("store://runs/c")


def change_contents(path: pathlib.Path) -> None:
    upload(save_weight(path, 5.0), "run/epoch_2.pt")


def cut_short(path: pathlib.Path) -> None:
    Store().pipe_file("/run/epoch_2.pt", Store().cat_file("/run/epoch_2.pt")[:700])


def delete(path: pathlib.Path) -> None:
    Store().rm("/run/epoch_2.pt")


@pytest.mark.parametrize(
    ("happens", "words"),
    [(change_contents, "changed"), (cut_short, "changed"), (delete, "is not there")],
)
def test_remote_file_changed_while_read_is_error(store, tmp_path, monkeypatch, happens, words):
    for i in (1, 2):
        upload(save_weight(tmp_path / "run" / f"epoch_{i}.pt"), f"run/epoch_{i}.pt")
    run = ckptavg.open_run("store://run")
    happens(tmp_path / "other.pt")
    for file in Store.store.values():
        file.created = datetime.now(tz=timezone.utc) + timedelta(seconds=1)
    with pytest.raises(CheckpointError, match=rf"store://run/epoch_[12]\.pt.*{words}"):
        ckptavg.average(run, out=tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_remote_file_stamp_uses_store_metadata(store, tmp_path):
    upload(save_weight(tmp_path / "a.pt"), "a.pt")
    stamp = FileStamp.of("store://a.pt")
    assert stamp.size == (tmp_path / "a.pt").stat().st_size
    assert stamp.identity != FileStamp.of(tmp_path / "a.pt").identity
    stamp.verify()
    Store.store["/a.pt"].created += timedelta(microseconds=1)
    with pytest.raises(CheckpointError, match="changed"):
        stamp.verify()


@pytest.mark.parametrize(
    ("token", "content"),
    [
        ("ETag 0123456789abcdef0123456789abcdef", "0123456789abcdef0123456789abcdef"),
        ("ETag 0123456789abcdef0123456789abcdef-12", "0123456789abcdef0123456789abcdef-12"),
        ("ETag 5f3a1b2c-1000", ""),  # of a web server: the date and the size
        ("ETag 0x8D4BCC2E4835CD0", ""),
        ("created 0123456789abcdef0123456789abcdef", ""),
        ("", ""),
    ],
)
def test_content_of_accepts_checksum_etags_only(token, content):
    assert paths.content_of(token) == content


def test_remote_average_reads_each_byte_once_within_budget(store, tmp_path, monkeypatch):
    state = {f"layer{i}.weight": torch.randn(250, 1000) for i in range(4)}
    state |= {f"layer{i}.bias": torch.randn(7) for i in range(200)}
    save_states(tmp_path / "run", [state] * 3, ".safetensors")
    url = upload(tmp_path / "run")
    run = ckptavg.open_run(url)
    header = 1 << 18
    size = (tmp_path / "run" / "epoch_1.safetensors").stat().st_size
    assert sum(b - a for _, a, b in Store.ranges) <= 3 * header
    for budget, most in ((64 << 20, 3), (2 << 20, 15)):
        Store.ranges.clear()
        Store.batches.clear()
        monkeypatch.setattr(stream, "READ_AHEAD", budget)
        ckptavg.average(run, out=tmp_path / f"{budget}.safetensors")
        for i in (1, 2, 3):
            read = sorted((a, b) for p, a, b in Store.ranges if p == f"/run/epoch_{i}.safetensors")
            assert len(read) <= most
            assert all(a[1] <= b[0] for a, b in pairwise(read))
            assert 0.95 * size < sum(b - a for a, b in read) <= size
        workers = min(4, os.cpu_count() or 1)
        assert max(Store.batches) <= max(budget // workers, 3 * 4 * stream.BLOCK) + (3 << 16)


def test_remote_average_reads_block_beyond_budget(store, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "READ_AHEAD", 1)
    local = write_run(tmp_path / "run", ".pt")
    assert same(
        ckptavg.average(ckptavg.open_run(upload(local))), ckptavg.average(ckptavg.open_run(local))
    )


def test_remote_torch_file_opens_in_two_requests(store, tmp_path):
    state = {f"layer{i}": torch.randn(100 + i, 100) for i in range(30)}
    path = save(tmp_path / "a.pt", state, epoch=1)
    url = upload(path, "a.pt")
    here, there = open_checkpoint(path), open_checkpoint(url)
    assert len(Store.ranges) == 2
    assert [[p.offset for p in t.pieces] for t in there.tensors.values()] == [
        [p.offset for p in t.pieces] for t in here.tensors.values()
    ]


def repacked(path: pathlib.Path, comment: bytes) -> None:
    """Rewrite an archive as another tool would: unaligned, and with something in between."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.extra = comment if name.endswith("1") else b""
            archive.writestr(info, content)


@pytest.mark.parametrize("length", [0, 1, 60, 64, 300])
def test_remote_torch_file_repacked_is_read_by_its_headers(store, tmp_path, length):
    path = save(tmp_path / "a.pt", states(1)[0], epoch=1)
    extra = b"\xff\xff" + length.to_bytes(2, "little") + bytes(length)
    repacked(path, extra)
    url = upload(path, "a.pt")
    here, there = (ckptavg.average(ckptavg.open_run(place)) for place in (path, url))
    assert same(here, there)


@pytest.mark.slow
def test_remote_header_longer_than_one_read_is_read(store, tmp_path):
    state = {f"a.rather.long.name.of.layer.number.{i}": torch.randn(3) for i in range(4000)}
    for suffix in (".pt", ".safetensors"):
        path = save(tmp_path / f"a{suffix}", state)
        url = upload(path, path.name)
        assert same(ckptavg.average(ckptavg.open_run(url)), ckptavg.average(ckptavg.open_run(path)))


def test_remote_request_is_retried(store, tmp_path):
    save_states(tmp_path / "run", states())
    run = ckptavg.open_run(upload(tmp_path / "run"))
    Store.failures += [ConnectionResetError("reset by peer"), TimeoutError()]
    assert same(ckptavg.average(run), ckptavg.average(ckptavg.open_run(tmp_path / "run")))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionResetError(104, "reset by\npeer"), "reset by peer. Check the URL"),
        (TimeoutError(), "TimeoutError. Check the URL"),
        (PermissionError("Forbidden"), "may not be read: Forbidden. Give credentials"),
        (type("NoCredentialsError", (Exception,), {})("none"), "may not be read: none. Give"),
        (FileNotFoundError(), "is not there"),
    ],
)
def test_remote_request_failure_is_one_line(store, tmp_path, error, words):
    url = upload(save_weight(tmp_path / "a.pt"), "a.pt")
    Store.failures += [error] * 9
    message = refusal(url)
    assert message.startswith(url)
    assert words in message


def test_remote_server_without_ranges_is_refused(store, tmp_path, monkeypatch):
    url = upload(save(tmp_path / "a.pt", {"w": torch.randn(1000, 1000)}), "a.pt")
    monkeypatch.setattr(Store, "cat_file", lambda self, path, *_, **__: bytes(9 << 20))
    assert "sends the whole file" in refusal(url)


def test_file_url_is_local_path(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    path = save_weight(tmp_path / "a dir" / "epoch_1.pt")
    assert " " not in path.as_uri()
    run = ckptavg.open_run(path.parent.as_uri())
    assert [c.path for c in run] == [path]
    assert open_checkpoint(path.as_uri()).path == path
    assert paths.locate(f"file://localhost{path}") == path
    with pytest.raises(UsageError, match=r"names the host 'server'.*file:///absolute/path"):
        paths.locate("file://server/a.pt")


@pytest.mark.parametrize("name", ["exp::3", "s3:", "a:b"])
def test_local_paths_may_look_like_urls(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save_weight(tmp_path / name / "epoch_1.pt")
    assert ckptavg.average(ckptavg.open_run(name), out=f"{name}/out.pt").exists()


def test_remote_names_missing_package(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fsspec.core", None)
        with pytest.raises(CkptavgError, match="pip install s3fs"):
            ckptavg.open_run("s3://bucket/run")
        with pytest.raises(CkptavgError, match="pip install fsspec"):
            ckptavg.open_run("gs://bucket/run")
    needs = {"class": "no_such_package.FileSystem", "err": "Please install no_such_package"}
    monkeypatch.setitem(known_implementations, "needs", needs)
    with pytest.raises(CkptavgError, match=r"needs://a needs one more package.*no_such_package"):
        ckptavg.open_run("needs://a")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://a/b", "Protocol not known: nosuch"),
        ("simplecache::store://a", "a chain of URLs"),
        ("store://", "names no file"),
    ],
)
def test_remote_refuses_malformed_url(store, url, words):
    with pytest.raises(UsageError, match=words):
        ckptavg.open_run(url)


@pytest.mark.parametrize("out", ["store://out.pt", "s3://bucket/out", "file:///tmp/out.pt"])
def test_output_url_is_refused(store, tmp_path, out):
    save_weight(tmp_path / "epoch_1.pt")
    with pytest.raises(UsageError, match=rf"local paths but got {out}"):
        ckptavg.average(ckptavg.open_run(tmp_path), out=out)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a/b.pt?X-Amz-Signature=secret", "https://host/a/b.pt"),
        ("sftp://me:secret@host:22/a.pt", "sftp://host:22/a.pt"),
        ("abfs://container@account.dfs.core.windows.net/a.pt", None),
        ("s3://bucket/what?/a@b:c.pt", None),
        ("/a/path?of@mine", None),
    ],
)
def test_without_secrets_removes_signature_and_password(url, shown):
    assert paths.without_secrets(url) == (shown or url)


NET = """
import torch
def model():
    return torch.nn.Linear(2, 2)
def data():
    return torch.utils.data.TensorDataset(torch.ones(4, 2), torch.zeros(4, dtype=torch.int64))
"""


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_remote_password_is_neither_shown_nor_written(store, tmp_path, monkeypatch, as_json):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    save_states(tmp_path / "run", [torch.nn.Linear(2, 2).state_dict()] * 2)
    url = upload(tmp_path / "run", "me:secret@host/run")
    model = ["--model", "net.py:model", "--data", "net.py:data", "--device", "cpu"]
    said = ""
    for command in (
        ["inspect", url],
        ["inspect", f"{url}/epoch_1.pt"],
        ["inspect", f"{url}/none.pt", "--debug"],
        ["average", url, "--dry-run"],
        ["average", url, "-o", "out.pt", "-v"],
        ["eval", f"{url}/epoch_1.pt", "--run", url, *model, "--results", "r.json"],
        ["eval", f"{url}/epoch_1.pt", *model, "--results", "r.csv"],
    ):
        result = CliRunner().invoke(main, [*command, *as_json])
        assert result.exit_code == ("none.pt" in command[1]), result.output
        said += result.output
    assert "store://host/run/epoch_1.pt" in said
    written = b"".join((tmp_path / name).read_bytes() for name in ("r.json", "r.csv", "out.pt"))
    assert "secret" not in said
    assert b"secret" not in written


def test_provenance_names_urls(store, tmp_path):
    save_states(tmp_path / "run", states())
    url = upload(tmp_path / "run")
    out = ckptavg.average(ckptavg.open_run(url), out=tmp_path / "out.pt")
    made = open_checkpoint(out).provenance
    assert [source.path for source in made.inputs] == [f"{url}/epoch_{i}.pt" for i in (1, 2, 3)]


intervals = st.tuples(st.sampled_from("ab"), st.integers(0, 10**6), st.integers(0, 10**5)).map(
    lambda r: (r[0], r[1], r[1] + r[2])
)


@given(st.lists(intervals, max_size=12))
def test_merge_ranges_joins_neighbours(wanted):
    found = merge_ranges(wanted)
    for one, other in pairwise(found):
        assert one[0] < other[0] or other[1] - one[2] > 1 << 16
    for url, start, end in wanted:
        if start < end:
            assert any(u == url and a <= start and end <= b for u, a, b in found)
    for url, start, end in found:  # nothing but what was asked for, and short gaps
        assert {start, end} <= {x for u, a, b in wanted if u == url for x in (a, b)}


def test_remote_runs_below_steps_need_few_listings(store, tmp_path, monkeypatch):
    for step in (1500, 500, 1000):
        home = tmp_path / "run" / f"checkpoint-{step}"
        for network in ("unet", "unet_ema"):
            save_weight(home / network / "diffusion_pytorch_model.safetensors", float(step))
        (home / "scheduler").mkdir()
        (home / "scheduler" / "scheduler_config.json").write_text("{}")
    url = upload(tmp_path / "run")
    asked = []
    listed = Store.ls
    monkeypatch.setattr(
        Store, "ls", lambda self, path, **kw: asked.append(path) or listed(self, path, **kw)
    )
    run = ckptavg.open_run(url)
    assert [str(c.path) for c in run] == [f"{url}/checkpoint-{i}/unet" for i in (500, 1000, 1500)]
    assert [c.step for c in run] == [500, 1000, 1500]
    assert len(asked) == len(set(asked)) <= 10
    named = ckptavg.open_run(*(f"{url}/checkpoint-{i}/unet" for i in (1000, 500)))
    assert [c.step for c in named.last(1)] == [1000]
    assert ckptavg.average(ckptavg.open_run(url, glob="*/unet_ema"))["w"] == 1000


def test_remote_ranks_are_refused_and_shards_joined(store, tmp_path):
    for rank in range(2):
        save_weight(tmp_path / "iter_5" / f"mp_rank_0{rank}" / "model_optim_rng.pt", float(rank))
        save(
            tmp_path / "whole" / f"m-0000{rank + 1}-of-00002.safetensors",
            {f"{rank}.w": torch.ones(2)},
        )
    with pytest.raises(CheckpointError, match="parts of one model: 2 ranks"):
        ckptavg.open_run(upload(tmp_path / "iter_5", "megatron/iter_5"))
    assert ckptavg.average(ckptavg.open_run(upload(tmp_path / "whole", "whole"))).keys() == {
        "0.w", "1.w",
    }  # fmt: skip
