"""Disks that fail, inputs that change, processes that die: whole or absent, and said in a line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import listing, same_bits, save, save_states
from safetensors.torch import load_file
from selecting import combinations

from ckptavg import average, open_run
from ckptavg.errors import CheckpointError, CkptavgError, OutputError

SUPPORT = Path(__file__).parents[1] / "support"
OUTPUTS = ["swa.safetensors", "swa.pt", "swa"]
MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="calls of Linux")


def name_of_errno(value: object) -> str | None:
    """The name of an error number."""
    return errno.errorcode.get(value) if isinstance(value, int) else None


def states(count: int = 3, numel: int = 50_000) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(count)
    return [
        {"a": torch.randn(numel, generator=generator), "b": torch.randn(7, 3, generator=generator)}
        for _ in range(count)
    ]


def mean() -> dict[str, torch.Tensor]:
    found = states()
    return {name: (sum(s[name].double() for s in found) / 3).float() for name in found[0]}


def model(path: Path, state: dict[str, torch.Tensor], companion: int = 2) -> Path:
    """A Hugging Face directory with a companion of so many bytes."""
    save(path / "model.safetensors", state)
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_bytes(b" " * companion)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_states(tmp_path / "run", states())
    return tmp_path / "run"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for i, state in enumerate(states(), 1):
        model(tmp_path / "models" / f"checkpoint-{i}", state)
    return tmp_path / "models"


def read(out: Path) -> dict[str, torch.Tensor]:
    if out.is_dir():
        return load_file(out / "model.safetensors")
    if out.suffix == ".safetensors":
        return load_file(out)
    return torch.load(out, weights_only=True)["state_dict"]


def assert_whole(out: Path) -> None:
    found, expected = read(out), mean()
    assert set(found) == set(expected)
    assert all(same_bits(found[name], expected[name]) for name in expected)


def failure(work: Callable[[], object], kind: type[CkptavgError] = OutputError) -> str:
    """The one line that is said."""
    with pytest.raises(kind) as caught:
        work()
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert caught.value.remedy, text
    return text


# ------------------------------------------------------------------------------ disks that are full


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    home = tmp_path_factory.mktemp("small")
    enter = ["unshare", "-rm"]
    probe = [*enter, "mount", "-t", "tmpfs", "none", os.fspath(home)]
    if not shutil.which("unshare") or subprocess.run(probe, check=False).returncode:
        pytest.skip("needs a mount namespace (unshare -rm)")
    large = [{"a": state["a"].repeat(10)} for state in states()]  # 2 MB
    save_states(home / "run", large)
    for i, state in enumerate(large, 1):
        model(home / "models" / f"checkpoint-{i}", state, 2 * MIB)
    (home / "disk").mkdir()
    command = [*enter, sys.executable, SUPPORT / "small_disk.py", home]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert listing(home / "disk") == []
    return json.loads(done.stdout)


FULL = "OutputError: the disk ran full while "
SMALL_DISKS = {
    "looked_at_first": ("MB are free", []),
    "reserving": (FULL, []),
    "writing": (FULL, []),
    "another_fills_it": (FULL, ["theirs"]),
    "companion": (FULL, []),
    "no_inodes": (FULL, ["theirs"]),
    "old_one_stays": ("MB are free", ["swa.safetensors"]),
    "a_dead_run_s_room": ("written", ["swa.safetensors"]),
    "read_only": ("may not be written to", []),
    "limit": ("ulimit -f", []),
}


@pytest.mark.slow
@linux
@pytest.mark.parametrize("case", SMALL_DISKS)
def test_small_disk_keeps_outputs_whole(small_disks, case):
    answer, (expected, left) = small_disks[case], SMALL_DISKS[case]
    assert expected in answer["said"]
    assert len(str(answer["said"]).splitlines()) == 1
    assert answer["left"] == left
    assert answer.get("old", True)


# ---------------------------------------------------------------- calls that fail, or do too little

FAILURES = {
    errno.EIO: "cannot be written: Input/output error",
    errno.ENOSPC: "ran full",
    errno.EDQUOT: "ran full",
    errno.EROFS: "cannot be written: Read-only file system",
    errno.EFBIG: "ulimit -f",
}
CALLS = ["posix_fallocate", "pwrite", "fsync", "truncate"]


def fails(name: str, number: int, after: int = 0) -> Callable[..., object]:
    """A system call that fails, after some good ones."""
    real, calls = getattr(os, name), []

    def call(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **keywords)

    return call


@linux
@combinations(name_of_errno, call=CALLS, number=FAILURES, name=OUTPUTS)
def test_write_failure_keeps_old_output(run_dir, models, tmp_path, monkeypatch, name, number, call):
    inputs, out = models if name == "swa" else run_dir, tmp_path / name
    average(open_run(inputs).last(2), out=out)
    before = {path: (tmp_path / path).read_bytes() for path in listing_files(tmp_path)}
    if call == "truncate":  # what stands in for a reservation
        monkeypatch.setattr(os, "posix_fallocate", fails("posix_fallocate", errno.EOPNOTSUPP))
    monkeypatch.setattr(os, call, fails(call, number, after=call == "pwrite"))
    text = failure(lambda: average(open_run(inputs), out=out, overwrite=True))
    monkeypatch.undo()
    assert FAILURES[number] in text
    assert str(out) in text
    assert {path: (tmp_path / path).read_bytes() for path in listing_files(tmp_path)} == before


def listing_files(directory: Path) -> list[str]:
    return [path for path in listing(directory) if (directory / path).is_file()]


@linux
@pytest.mark.parametrize("name", OUTPUTS)
def test_simple_file_system_takes_outputs(run_dir, models, tmp_path, monkeypatch, name):
    """No reservation, no hard links, no rename without replacing, no locks."""
    for call in ("posix_fallocate", "link"):
        monkeypatch.setattr(os, call, fails(call, errno.EOPNOTSUPP))
    monkeypatch.setattr("ckptavg.io.rename._RENAMEAT2", None)
    monkeypatch.setattr("ckptavg.io.temporaries.fcntl", None)
    inputs, before = models if name == "swa" else run_dir, listing(tmp_path)
    for overwrite in (False, True):
        average(open_run(inputs), out=tmp_path / name, overwrite=overwrite)
        assert_whole(tmp_path / name)
    text = failure(lambda: average(open_run(inputs), out=tmp_path / name))
    assert "`overwrite=True`" in text
    left = [path for path in listing(tmp_path) if path.split("/")[0] != name]
    assert left == before


@linux
@pytest.mark.parametrize("name", OUTPUTS)
def test_short_reads_and_writes_change_nothing(run_dir, models, tmp_path, monkeypatch, name):
    preadv, pwrite, short = os.preadv, os.pwrite, []

    def read_less(handle, buffers, offset, *flags):
        short.append("read")
        return preadv(handle, [memoryview(buffers[0])[:997]], offset, *flags)

    def write_less(handle, data, offset):
        short.append("write")
        return pwrite(handle, memoryview(data)[:1009], offset)

    run = open_run(models if name == "swa" else run_dir)
    monkeypatch.setattr(os, "preadv", read_less)
    monkeypatch.setattr(os, "pwrite", write_less)
    average(run, out=tmp_path / name)
    monkeypatch.undo()
    assert min(map(short.count, ("read", "write"))) > 100
    assert_whole(tmp_path / name)


@linux
@combinations(name_of_errno, after=[0, 3], number=[errno.EIO, errno.ESTALE], name=[None, *OUTPUTS])
def test_read_failure_leaves_nothing(run_dir, tmp_path, monkeypatch, name, number, after):
    run, before = open_run(run_dir), listing(tmp_path)
    monkeypatch.setattr(os, "preadv", fails("preadv", number, after))
    out = None if name is None else tmp_path / name
    text = failure(lambda: average(run, out=out), CheckpointError)
    monkeypatch.undo()
    assert str(run_dir) in text
    assert f"cannot be read: {os.strerror(number)}" in text
    assert listing(tmp_path) == before


# ---------------------------------------------------------------- places that go away or are closed


@linux
@combinations(overwrite=[False, True], what=["directory", "temporary"], name=OUTPUTS)
def test_removed_output_place_is_reported(run_dir, tmp_path, name, what, overwrite):
    place = tmp_path / "place"
    place.mkdir()

    def remove(done: int, total: int) -> None:
        if done == total:
            shutil.rmtree(place)
            if what == "temporary":
                place.mkdir()

    out = place / name
    text = failure(
        lambda: average(open_run(run_dir), out=out, overwrite=overwrite, progress=remove)
    )
    assert "removed meanwhile" in text
    assert str(out) in text
    assert not place.exists() or listing(place) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_directory_without_permission_is_reported(run_dir, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o555)
    try:
        assert "may not be written" in failure(
            lambda: average(open_run(run_dir), out=place / "swa.pt")
        )
    finally:
        place.chmod(0o755)


# ----------------------------------------------------------- inputs that change while they are read


def rewrite_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(64))


def replace(path: Path) -> None:
    copy = path.with_suffix(".copy")
    save(copy.with_suffix(".pt"), states(4)[3]).rename(copy)
    copy.replace(path)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_and_refill(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(b"")
    path.write_bytes(content)


CHANGES = [rewrite_in_place, replace, truncate, cut_and_refill, Path.unlink]


@combinations(moment=["first", "last"], change=CHANGES, name=[None, *OUTPUTS])
def test_changing_input_is_reported(run_dir, tmp_path, name, change, moment):
    changed = run_dir / "epoch_2.pt"

    def meanwhile(done: int, total: int) -> None:
        if done == (0 if moment == "first" else total):
            other = threading.Thread(target=change, args=(changed,))
            other.start()
            other.join()

    out, run = None if name is None else tmp_path / name, open_run(run_dir)
    text = failure(lambda: average(run, out=out, progress=meanwhile), CheckpointError)
    assert str(changed) in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if change is truncate and moment == "first":
        assert "ends before byte" in text


WRITER = """
import os, sys
with open(sys.argv[1], "r+b") as file:
    content = file.read()
    print("ready", flush=True)
    while True:
        os.pwrite(file.fileno(), content, 0)
"""


@linux
def test_input_written_constantly_is_reported(run_dir, tmp_path):
    changed = run_dir / "epoch_3.pt"
    command = [sys.executable, "-c", WRITER, os.fspath(changed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "ready\n"
            for name in OUTPUTS:
                run = open_run(run_dir)
                text = failure(lambda r=run, n=name: average(r, out=tmp_path / n), CheckpointError)
                assert f"{changed} changed while it was being read" in text
        finally:
            writer.kill()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
import torch, ckptavg
from ckptavg.averaging import stream
stream.TASK = 1000
run = ckptavg.open_run(sys.argv[1])
ckptavg.average(run, out=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_average_needs_few_open_files(tmp_path):
    states = [{"w": torch.full((20_000,), float(i))} for i in range(100)]
    save_states(tmp_path / "run", states)
    out = tmp_path / "out.pt"
    command = [sys.executable, "-c", FEW_FILES, tmp_path / "run", out]
    subprocess.run(command, check=True, timeout=240)
    assert torch.load(out)["state_dict"]["w"].unique().tolist() == [49.5]


def test_half_written_input_is_reported_as_changed(tmp_path):
    states = [{"w": torch.zeros(3_000_000)} for _ in range(3)]
    paths = save_states(tmp_path / "run", states, ".safetensors")
    run = open_run(tmp_path / "run")
    with paths[1].open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff\xff\xff\xff")  # NaN
    with pytest.raises(CheckpointError, match=r"epoch_2.*changed while it was being read"):
        average(run, out=tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
