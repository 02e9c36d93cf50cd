"""Checkpoints on S3: a server on the loopback, s3fs before it, the endpoint in the environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from command_line import FACTORIES
from helpers import names, same_bits, save, save_weight
from safetensors.torch import load_file

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import CheckpointError, RunError
from ckptavg.io import remote

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytest.importorskip("flask_cors")

MIB = 1 << 20
HEAD = 1 << 18  # bytes of a file's beginning or end that are read at once


@pytest.fixture(scope="module")
def server():
    from s3 import S3Server

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "someone",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        with S3Server() as running:
            patch.setenv("AWS_ENDPOINT_URL", running.url)
            yield running


@pytest.fixture
def s3(server):
    """The server with an empty bucket."""
    for key in server.client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        server.client.delete_object(Bucket="bucket", Key=key["Key"])
    remote._shared_pieces.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    server.requests.clear()
    yield server
    server.before = lambda method, path: None


def state(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(300, 1000) for i in range(5)}
    tensors |= {f"layers.{i}.bias": torch.randn(64) for i in range(50)}
    return tensors | {"tokens": torch.randn(200, 30).half(), "count": torch.tensor(seed)}


def write_run(directory: Path, suffix: str, count: int = 3) -> Path:
    for i in range(1, count + 1):
        save(directory / f"step_{i * 9}{suffix}", state(i), step=i * 9)
    return directory


def ckptavg(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_s3_average_reads_each_byte_once_by_ranges(s3, tmp_path, suffix):
    local = write_run(tmp_path / "run", suffix)
    size = (local / f"step_9{suffix}").stat().st_size
    url = s3.put(local, "some/run")
    s3.requests.clear()
    run = open_run(url)
    assert names(run) == [f"step_{i}{suffix}" for i in (9, 18, 27)]
    assert sum(request.size for request in s3.requests) < 3 * 2 * HEAD + 10_000 < 3 * size / 10
    assert len(s3.requests) <= 3 + 3 * (2 if suffix == ".pt" else 1)
    s3.requests.clear()
    found = average(run)
    for name in names(run):
        read = sorted(s3.read(f"some/run/{name}"))
        assert all(one[1] <= other[0] for one, other in pairwise(read))
        assert 0.95 * size < sum(end - start for start, end in read) < size
        assert len(read) <= 4
    by_hand = average(open_run(local))
    assert found.keys() == by_hand.keys()
    assert all(same_bits(found[name], by_hand[name]) for name in found)


def test_s3_urls_work_in_every_command(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(FACTORIES)
    names_ = {}
    exec(FACTORIES, names_)
    for i in range(1, 4):
        torch.manual_seed(i)
        save(tmp_path / "run" / f"epoch_{i}.pt", names_["model"]().state_dict(), epoch=i)
    shutil.copy(tmp_path / "run" / "epoch_3.pt", tmp_path / "run" / "last.pt")
    url = s3.put(tmp_path / "run", "run")
    model = ["--model", "task.py:model"]

    shown = ckptavg("inspect", url)
    assert shown.exit_code == 0
    assert "3 checkpoints in order" in shown.output
    assert json.loads(ckptavg("inspect", f"{url}/", "--json").stdout)["left_out"] == [
        {"path": f"{url}/last.pt", "why": "repeats epoch_3.pt"}
    ]
    assert f"{url}/epoch_2.pt: 9 tensors" in ckptavg("inspect", f"{url}/epoch_2.pt").output

    assert ckptavg("average", url, "-o", "out.safetensors", "--last", 2).exit_code == 0
    assert ckptavg("average", "run", "-o", "local.safetensors", "--last", 2).exit_code == 0
    there, here = load_file("out.safetensors"), load_file("local.safetensors")
    assert all(same_bits(there[name], here[name]) for name in here)
    made = json.loads(ckptavg("inspect", "out.safetensors", "--json").stdout)["ckptavg"]
    assert made["checkpoints"][-1]["path"] == f"{url}/epoch_3.pt"

    data = ["--train-data", "task.py:data"]
    refreshed = ckptavg("update-bn", f"{url}/epoch_1.pt", "-o", "bn.pt", *model, *data)
    assert refreshed.exit_code == 0
    assert (tmp_path / "bn.pt").exists()
    scored = ckptavg(
        "eval", f"{url}/epoch_1.pt", "run/epoch_1.pt", "--run", url, "--each", "--json",
        "--data", "task.py:data", *model,
    )  # fmt: skip
    assert scored.exit_code == 0
    first, second, *rest = json.loads(scored.stdout)["candidates"]
    assert first["metrics"] == second["metrics"]
    assert first["name"] == first["checkpoints"][0] == f"{url}/epoch_1.pt"
    assert {c["kind"] for c in rest} == {"checkpoint", "average"}


@pytest.mark.parametrize(
    "settings",
    [
        {"AWS_ENDPOINT_URL": "{url}"},
        {"FSSPEC_S3_ENDPOINT_URL": "{url}"},
    ],
)
def test_s3_endpoint_comes_from_environment(s3, tmp_path, settings):
    url = s3.put(save_weight(tmp_path / "epoch_1.pt", 3.0), "run/epoch_1.pt")
    given = {name: value.format(url=s3.url) for name, value in settings.items()}
    kept = {k: v for k, v in os.environ.items() if k != "AWS_ENDPOINT_URL"}
    home = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "ckptavg", "average", url, "-o", tmp_path / "out.safetensors"],
        env=kept | given | {"PYTHONPATH": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out.safetensors")["w"].item() == 3.0


def hugging_face(directory: Path, step: int) -> Path:
    """A sharded directory with a configuration, as the Trainer leaves it."""
    tensors = {name: tensor.contiguous() for name, tensor in state(step).items()}
    shards = {"model-00001-of-00002.safetensors": dict(list(tensors.items())[:3])}
    shards["model-00002-of-00002.safetensors"] = dict(list(tensors.items())[3:])
    for name, part in shards.items():
        save(directory / name, part)
    index = {"weight_map": {k: name for name, part in shards.items() for k in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "merges.txt").write_text("a b")
    (directory / "optimizer.pt").write_bytes(b"none of ours")
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return directory


def test_s3_hugging_face_directories_are_averaged(s3, tmp_path):
    for step in (90, 100):
        hugging_face(tmp_path / "run" / f"checkpoint-{step}", step)
    url = s3.put(tmp_path / "run", "run")
    s3.requests.clear()
    run = open_run(url)
    assert names(run) == ["checkpoint-90", "checkpoint-100"]
    assert len([r for r in s3.requests if r.path == "/bucket"]) <= 4  # listings
    out = average(run, out=tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "merges.txt", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert (out / "merges.txt").read_text() == "a b"
    here, there = average(open_run(tmp_path / "run")), average(open_run(out))
    assert all(same_bits(here[name], there[name]) for name in here)
    assert not s3.read("run/checkpoint-90/optimizer.pt")


def test_s3_alias_is_left_out_by_etag(s3, tmp_path):
    plain = save(tmp_path / "a.safetensors", state(1))
    for key in ("epoch_1", "epoch_2", "last"):
        s3.put(plain, f"run/{key}.safetensors")
    s3.requests.clear()
    run = open_run("s3://bucket/run")
    assert names(run) == ["epoch_1.safetensors", "epoch_2.safetensors"]
    assert len(run.notes) == 1
    assert sum(request.size for request in s3.requests) < 3 * HEAD + 10_000  # its ETag tells


def test_s3_alias_uploaded_in_parts_is_compared_by_bytes(s3, tmp_path):
    path = save(tmp_path / "a.safetensors", state(1))
    s3.put(path, "run/epoch_1.safetensors")
    s3.put(save(tmp_path / "b.safetensors", state(2)), "run/epoch_2.safetensors")
    started = s3.client.create_multipart_upload(Bucket="bucket", Key="run/last.safetensors")
    upload = {"Bucket": "bucket", "Key": "run/last.safetensors", "UploadId": started["UploadId"]}
    parts = []
    content = path.read_bytes()
    for number, part in enumerate((content[: 5 * MIB], content[5 * MIB :]), 1):
        sent = s3.client.upload_part(**upload, PartNumber=number, Body=part)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    s3.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    run = open_run("s3://bucket/run")
    assert run.notes == (
        "s3://bucket/run/last.safetensors repeats epoch_1.safetensors and counts once",
    )


def test_s3_object_replaced_while_read_is_error(s3, tmp_path):
    url = s3.put(write_run(tmp_path / "run", ".pt"), "run")
    run = open_run(url)
    other = save(tmp_path / "other.pt", state(5), step=9)

    def replace(method: str, path: str) -> None:
        s3.before = lambda *_: None
        s3.put(other, "run/step_9.pt")

    s3.before = replace
    with pytest.raises(CheckpointError, match=r"s3://bucket/run/step_9.pt changed while"):
        average(run, out=tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_s3_busy_server_is_asked_again(s3, tmp_path):
    url = s3.put(write_run(tmp_path / "run", ".pt"), "run")
    run = open_run(url)
    busy = iter(["503 Slow Down", "500 Internal Server Error"])
    s3.before = lambda method, path: next(busy, None)
    found, by_hand = average(run), average(open_run(tmp_path / "run"))
    assert all(same_bits(found[name], by_hand[name]) for name in found)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://nobody/run", "s3://nobody/run does not exist. Check its first part"),
        ("s3://nobody", "s3://nobody does not exist. Check its first part"),
        ("s3://bucket/runs", "s3://bucket/runs does not exist. Did you mean s3://bucket/run?"),
        ("s3://bucket/run/epoch_7.pt", "does not exist. Did you mean s3://bucket/run/epoch_1.pt?"),
    ],
)
def test_s3_missing_object_suggests_existing_one(s3, tmp_path, url, words):
    s3.put(save_weight(tmp_path / "epoch_1.pt"), "run/epoch_1.pt")
    with pytest.raises(RunError) as caught:
        open_run(url)
    assert words in str(caught.value)


def test_s3_denied_access_asks_for_credentials(s3, monkeypatch, tmp_path):
    url = s3.put(save_weight(tmp_path / "epoch_1.pt"), "run/epoch_1.pt")
    s3.before = lambda method, path: "403 Forbidden"
    denied = ckptavg("inspect", url)
    assert denied.exit_code == 1
    assert f"{url} may not be read: Forbidden. Give credentials" in denied.stderr
    s3.before = lambda method, path: None
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match=r"Unable to locate credentials\. Give credentials"):
        open_run(url)


def test_s3_network_failure_is_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    done = ckptavg("inspect", "s3://bucket/run")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "s3://bucket/run cannot be read: Could not connect" in done.stderr


def test_http_files_are_averaged_and_errors_explained(s3, tmp_path):
    s3.put(write_run(tmp_path / "run", ".pt"), "run")
    urls = [f"{s3.url}/bucket/run/step_{i}.pt?signature=secret" for i in (27, 9, 18)]
    run = open_run(*urls)
    assert names(run) == ["step_9.pt", "step_18.pt", "step_27.pt"]
    out = average(run, out=tmp_path / "out.safetensors")
    found, by_hand = load_file(out), average(open_run(tmp_path / "run"))
    assert all(same_bits(found[name], by_hand[name]) for name in by_hand)
    assert b"/bucket/run/step_9.pt" in out.read_bytes()
    assert b"secret" not in out.read_bytes()
    with pytest.raises(RunError, match="does not exist"):
        open_run(f"{s3.url}/bucket/run/step_7.pt")
    s3.before = lambda method, path: "403 Forbidden"
    with pytest.raises(CheckpointError, match=r"may not be read.*403.*Give credentials"):
        open_run(f"{s3.url}/bucket/run/step_9.pt")
    with pytest.raises(CheckpointError, match=r"cannot be read.*Connect call failed"):
        open_run("http://127.0.0.1:9/step_9.pt")
