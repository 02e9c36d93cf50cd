"""Several processes: who makes which part, that the parts are the whole, and how all end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import listing, save_states
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import ROOT, TORCHRUN, error_of, launch, run_alone
from safetensors.torch import save_file

from ckptavg.averaging import sharding
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import DTYPES
from ckptavg.formats.file_layout import FileLayout, Layout, OutputTensor
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.registry import lay_out

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
DEATH = "has died without a message: its own output may say why"


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Some 400 kB of all kinds; sizes are odd, so that borders fall anywhere."""
    rng = torch.Generator().manual_seed(seed)
    table = torch.randn(301, 37, generator=rng)
    return {
        "embedding": table,
        "half": torch.randn(5001, generator=rng).half(),
        "brain": torch.randn(7777, generator=rng).bfloat16(),
        "double": torch.randn(1234, generator=rng, dtype=torch.float64),
        "complex": torch.randn(500, generator=rng, dtype=torch.complex64),
        "bytes": torch.randint(0, 255, (9999,), generator=rng, dtype=torch.uint8),
        "count": torch.arange(5003) * seed,
        "step": torch.tensor(seed),
        "turned": torch.randn(60, 90, generator=rng).T,
        "sliced": torch.randn(50, 70, 3, generator=rng)[::2, 3:, 1:],
        "empty": torch.zeros(0, 3),
        "head": table,
    }


def plain(seed: int) -> dict[str, torch.Tensor]:
    """Without ties and views, for files that have none."""
    found = {name: tensor.contiguous() for name, tensor in weights(seed).items()}
    return found | {"head": found["head"] + 1.0}


def shards(state: dict[str, torch.Tensor], path: Path) -> None:
    path.mkdir(parents=True)
    index = {}
    for i, name in enumerate(state):
        index[name] = f"model-{i % 3 + 1:05d}-of-00003.safetensors"
    for file in set(index.values()):
        save_file({n: t for n, t in state.items() if index[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text("{}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in three layouts: run/ (torch.save), hub/ (sharded) and dcp/; and others.

    What small/ holds fits into one page; large/ has several leaves to be hashed.
    """
    home = tmp_path_factory.mktemp("runs")
    save_states(home / "small", [{"w": torch.ones(3)}, {"w": torch.zeros(3)}])
    large = [torch.randn(2_500_001, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    save_states(home / "large", [{"w": t.bfloat16(), "fixed": t[:9].clone()} for t in large])
    rng = torch.Generator().manual_seed(0)
    shapes = {"l.weight_orig": (90, 70), "l.weight_u": (90,), "l.weight_v": (70,), "w": (5000,)}
    norms = [{n: torch.randn(s, generator=rng) for n, s in shapes.items()} for _ in range(3)]
    save_states(home / "normed", norms)
    (home / "run").mkdir()
    (home / "dcp").mkdir()
    for seed in (1, 2, 3):
        torch.save({"state_dict": weights(seed), "epoch": seed}, home / "run" / f"epoch_{seed}.pt")
        shards(plain(seed), home / "hub" / f"checkpoint-{seed}")
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.save({"model": plain(seed)}, checkpoint_id=home / "dcp" / f"step_{seed}")
    return home


@pytest.fixture
def home(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the runs linked in."""
    for run in runs.iterdir():
        (tmp_path / run.name).symlink_to(run)
    (tmp_path / "out").mkdir()
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(path: Path) -> dict[str, bytes]:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=5), count=st.integers(1, 7))
def test_byte_ranges_are_equal_and_end_at_pages(sizes: list[int], count: int) -> None:
    parts = [sharding.byte_ranges(sizes, rank, count) for rank in range(count)]
    for number, size in enumerate(sizes):
        ends = [0] + [part[number][1] for part in parts]
        assert [part[number][0] for part in parts] == ends[:-1]
        assert ends == sorted(ends)
        assert ends[-1] == size
        assert all(end % sharding.PAGE == 0 or end == size for end in ends)
    for part in parts:
        assert abs(sum(end - begin for begin, end in part) - sum(sizes) / count) <= sharding.PAGE


@settings(deadline=None)
@given(data=st.data(), count=st.integers(1, 6))
def test_element_ranges_follow_first_byte(data: st.DataObject, count: int) -> None:
    files, tensors = [], []
    for number in range(data.draw(st.integers(1, 3))):
        at, offsets = data.draw(st.integers(0, 70)), {}
        for i in range(data.draw(st.integers(0, 4))):
            dtype = DTYPES[data.draw(st.sampled_from(["float64", "float32", "bfloat16", "uint8"]))]
            tensor = OutputTensor(f"{number}.{i}", dtype, (data.draw(st.integers(0, 9000)),))
            tensors.append(tensor)
            offsets[tensor.name] = at
            at += tensor.nbytes + data.draw(st.integers(0, 9))
        files.append(FileLayout(str(number), at, [], offsets))
    found = [
        sharding.element_ranges(Layout(True, files), tensors, rank, count) for rank in range(count)
    ]
    for tensor in (t for t in tensors if t.numel):
        number = int(tensor.name[0])
        done = []
        for rank, ranges in enumerate(found):
            begin, end = sharding.byte_ranges([f.size for f in files], rank, count)[number]
            first, stop = ranges[tensor.name, tensor.numel]
            at = files[number].offsets[tensor.name]
            assert all(begin <= at + i * tensor.dtype.size < end for i in range(first, stop))
            done += range(first, stop)
        assert done == list(range(tensor.numel))


def test_lay_out_aligns_elements(runs: Path) -> None:
    for name, template in [
        ("a.safetensors", "run/epoch_1.pt"),
        ("a.pt", "run/epoch_1.pt"),
        ("a", "hub/checkpoint-1"),
    ]:
        checkpoint = open_checkpoint(runs / template)
        tensors = [OutputTensor(n, t.dtype, t.shape) for n, t in checkpoint.tensors.items()]
        layout = lay_out(name, tensors, Provenance({}), checkpoint)
        places = {n: at for file in layout.files for n, at in file.offsets.items()}
        assert len(places) == 12
        assert all(places[t.name] % t.dtype.size == 0 for t in tensors)


COMMANDS = {
    "a.safetensors": ["run"],
    "a.pt": ["run"],
    "a.ckpt": ["run", "--dtype", "bfloat16", "--exclude", "half"],
    "hub": ["hub"],
    "hub.pt": ["hub", "--also", "last.pt=uniform@last=2", "--also", "e=ema:decay=0.5"],
    "dcp": ["dcp"],
    "small.safetensors": ["small"],
    "hashed.pt": ["run", "--hash", "--also", "hashed2.pt=linear"],
    "hashed": ["hub", "--hash", "--weights", "0,1,2", "--exclude", "half"],
    "normed.pt": ["normed", "--hash"],
    "large.safetensors": ["large", "--hash", "--weights", "1,0,2", "--exclude", "fixed"],
    "measured.safetensors": ["large", "--geometry", "--json"],
}


def test_torchrun_two_processes_match_one(home: Path) -> None:
    run_alone("average", "run", "-o", "alone/a.safetensors")
    command = {"args": ["average", "run", "-o", "out/a.safetensors"]}
    (results,) = launch("two", [command], count=2)
    assert [result["code"] for result in results] == [0, 0]
    assert contents(home / "out") == contents(home / "alone")


@pytest.mark.slow
def test_torchrun_four_processes_match_one(home: Path) -> None:
    commands = []
    for name, args in COMMANDS.items():
        said = run_alone("average", *args, "-o", f"alone/{name}")
        commands.append({"args": ["average", *args, "-o", f"out/{name}"]})
    commands[0]["args"].insert(1, "--json")
    commands.append({"args": ["inspect", "run"]})
    commands.append({"args": ["average", "run", "-o", "out/a.pt"]})
    results = launch("four", commands, *TORCHRUN, "--standalone", "--nproc-per-node=4", count=4)
    *good, inspection, exists = results

    for result in good:
        assert [of_one["code"] for of_one in result] == [0, 0, 0, 0], result
        assert result[0]["out"]
        assert not any(of_one["out"] or of_one["err"] for of_one in result[1:])
    assert json.loads(good[0][0]["out"])["output"] == "out/a.safetensors"
    assert "step" in good[0][0]["err"]  # an integer that differs, in whoever's part it lies
    assert listing(home / "out") == listing(home / "alone")
    for name in os.listdir("alone"):
        assert contents(home / "out" / name) == contents(home / "alone" / name)

    measured, expected = (json.loads(text)["geometry"] for text in (good[-1][0]["out"], said))
    for name in ("gram", "distances"):
        torch.testing.assert_close(*(torch.tensor(g[name]) for g in (measured, expected)))
    for hashed in ("out/large.safetensors", "out/normed.pt"):
        run_alone("inspect", hashed, "--verify")

    read = [of_one["read"] for of_one in good[3]]
    inputs = sum(t.nbytes for seed in (1, 2, 3) for t in plain(seed).values())
    assert sum(read) == inputs
    assert max(read) < inputs / 4 + 3 * 2 * 4 * sharding.PAGE

    size = Path("out/a.safetensors").stat().st_size
    for rank, of_one in list(enumerate(good[0]))[1:]:  # tied tensors lie in parts far apart
        assert of_one["wrote"] == list(*sharding.byte_ranges([size], rank, 4))

    assert [of_one["code"] for of_one in exists] == [1, 1, 1, 1]
    said = [of_one["err"] for of_one in exists if of_one["err"]]
    assert len(said) == 1
    assert said[0].startswith("Error: out/a.pt exists already")
    assert [of_one["code"] for of_one in inspection] == [2, 2, 2, 2]
    assert "ckptavg inspect runs in one process only. Start it" in inspection[0]["err"]


@pytest.mark.slow
def test_torchrun_two_hosts_make_one_output(home: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_alone("average", "run", "-o", "alone/a.safetensors")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    hosts = [
        subprocess.Popen(
            [
                *TORCHRUN, "--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1",
                f"--master-port={port}", "--nproc-per-node=1", "-m", "ckptavg", "average", "run",
                "-o", "out/a.safetensors", "--json",
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [host.communicate(timeout=240)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert json.loads(said[0])["output"] == "out/a.safetensors"
    assert not said[1]
    assert contents(home / "out") == contents(home / "alone")


@pytest.mark.slow
def test_torchrun_killed_process_ends_others(home: Path) -> None:
    command = {"args": ["average", "run", "-o", "out/a.pt"], "harm": {"1": "kill", "0": "linger"}}
    (results,) = launch(
        "killed", [command], *TORCHRUN, "--standalone", "--nproc-per-node=3", count=3
    )
    assert results[1] is None
    survivors = [r for r in (results[0], results[2]) if r is not None and r["code"] != 143]
    assert survivors  # one that is slow to notice is ended by torchrun itself
    for of_one in survivors:
        assert of_one["code"] == 1
        assert of_one["err"].count("\n") == (3 if "integers" in of_one["err"] else 1)
        assert "process 1 has died" in of_one["err"]
    assert listing(home / "out") == []


@pytest.mark.slow
def test_torchrun_failure_of_one_writes_nothing(home: Path) -> None:
    average = ["average", "run", "-o"]
    commands = [
        {"args": [*average, "out/a.pt"], "harm": {"1": "kill"}},
        {"args": [*average, "out/a.pt"], "harm": {"1": "break"}},
        {"args": [*average, "out/a.pt"], "harm": {"2": "terminate"}},
        {"args": [*average, "out/a.pt"], "other": ["average", "hub", "-o", "out/a.pt"]},
        {"args": [*average, "out/a.pt"], "other": [*average, "out/a.pt", "--weights", "1,2,3"]},
        {"args": [*average, "out/new.pt"], "harm": {"2": "appear"}},
        {"args": [*average, "out/last.pt"], "harm": {"0": "kill"}},
    ]
    results = launch("failing", commands, count=3)
    killed, broke, terminated, other, weighted, appeared, headless = results

    assert killed[1] is None
    for of_one in (killed[0], killed[2]):
        assert error_of(of_one) == f"process 1 {DEATH}"
    assert error_of(broke[1]) == "the disk of this test is broken"
    for of_one in (broke[0], broke[2]):
        assert error_of(of_one) == "process 1 has failed: the disk of this test is broken"
    assert terminated[2]["code"] != 0
    for of_one in terminated[:2]:
        assert error_of(of_one) == "process 2 was interrupted"
    for differing, what in [(other, "input files"), (weighted, "coefficients")]:
        assert {of_one["code"] for of_one in differing} == {1}
        (said,) = {of_one["err"] for of_one in differing if of_one["err"]}
        assert said.startswith(f"Error: processes 0 and 1 do not have the same {what}. Start all")
    assert "out/new.pt has appeared while the output was being written. Pass" in error_of(
        appeared[0]
    )
    assert error_of(appeared[1]) == f"process 0 has failed: {error_of(appeared[0])}"
    assert headless[0] is None
    assert error_of(headless[2]) == f"process 0 {DEATH}"

    mine, left = sorted(listing(home / "out"), reverse=True)
    assert (home / "out" / mine).read_text() == "mine"
    assert left.startswith(".last.pt.")
    run_alone(*average, "out/last.pt")
    assert listing(home / "out") == ["last.pt", "new.pt"]


def test_torchrun_single_process_sets_up_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in [("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "nowhere.invalid")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    before = signal.getsignal(signal.SIGTERM)
    run_alone("average", "run", "-o", "out/a.pt")
    assert signal.getsignal(signal.SIGTERM) == before
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_waiting_ends_on_interrupt(home: Path, rank: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ckptavg.distributed import torchrun; torchrun._NOTE_AFTER = 0.0\n"
        "from ckptavg.cli import main; main()"
    )
    waiting = subprocess.Popen(
        [sys.executable, "-c", code, "average", "run", "-o", "out/a.pt"],
        env=os.environ | place | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert waiting.stderr is not None
    if rank == "0":
        assert "waiting for the other processes" in waiting.stderr.readline()
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(8)
    waiting.send_signal(signal.SIGINT)
    said = waiting.communicate(timeout=240)[1]
    assert waiting.returncode == 130
    assert said.splitlines()[-1] == "Interrupted: nothing was written."
