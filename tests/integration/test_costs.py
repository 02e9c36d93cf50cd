"""Small inputs that mean much work, averaged: 20 s and 1 GB are more than any may take.

Seconds are of a quick processor; a slower one, or one that others use, gets more in proportion.
"""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePath

from pickle import (  # isort: skip
    APPENDS, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, LONG4, MARK, POP, PROTO, REDUCE, SETITEM,
    SETITEMS, STOP,
)  # fmt: skip

import pytest
import torch
from assembler import get, glob, number, put, text
from gadgets import as_zip, state
from helpers import save
from selecting import first_only
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo

from ckptavg import average, open_run
from ckptavg.formats.training_record import TRAINING_STATE
from ckptavg.io.paths import RemotePath
from ckptavg.runs.discovery.file_names import OTHER_STATE, natural_key

_LIMITED = """
import resource, sys, time
import torch, ckptavg.cli
from ckptavg.cli import main
torch.set_num_threads(1)
start = time.process_time()
sum(i * i for i in range(3_000_000))  # 0.1 s on a quick processor that nothing else uses
allowed = max(20, 200 * (time.process_time() - start))
used = resource.getrusage(resource.RUSAGE_SELF)
seconds = int(used.ru_utime + used.ru_stime + allowed)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    main(sys.argv[1:])
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""
_MOST_MIB = 1000  # of which Python and torch take 300
_LARGEST = 1_000_000  # bytes of an input


def average_within_limits(run: Path, out: Path) -> str:
    """Average in a process of its own; what it said."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits and their measure are Linux's")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < _LARGEST
    command = [sys.executable, "-c", _LIMITED, "average", str(run), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), f"exit {done.returncode}: {done.stderr[-500:]}"
    *said, peak = done.stderr.strip().splitlines()
    assert int(peak.split()[1]) >> 10 < _MOST_MIB
    return "\n".join(said)


def beside(entry: bytes, before: bytes = b"") -> bytes:
    return before + EMPTY_DICT + MARK + text("model") + state() + entry + SETITEMS


def huge_integer_often() -> bytes:
    integer = LONG4 + struct.pack("<i", 300_000) + b"\x7f" * 300_000 + put(0) + POP
    return beside(text("x") + EMPTY_LIST + MARK + get(0) * 60_000 + APPENDS, integer)


def long_integers_often() -> bytes:
    """As long as integers may be."""
    integer = LONG4 + struct.pack("<i", 500) + b"\x7f" * 500 + put(0) + POP
    return beside(text("x") + EMPTY_LIST + MARK + get(0) * 150_000 + APPENDS, integer)


def dropped_deep_below_long_names() -> bytes:
    """Objects that may not go out, each with the names of all dicts above it."""
    opaque = glob("x", "y") + put(1) + POP + text("n" * 200) + put(2) + POP
    inner = EMPTY_DICT + MARK
    inner += b"".join(text(f"{i}") + get(1) + EMPTY_TUPLE + REDUCE for i in range(50_000))
    inner += text("kept") + number(1) + SETITEMS
    for _ in range(96):
        inner = EMPTY_DICT + get(2) + inner + SETITEM
    return beside(text("x") + inner, opaque)


def names_of_training_states() -> bytes:
    entries = (text("optim" * 20_000 + f"{i}config") + number(1) + put(9) for i in range(8))
    dicts = (text("optim" * 900 + f"{i}params") + EMPTY_DICT for i in range(8))
    return beside(b"".join(entries) + b"".join(dicts))


def networks_of_one_dict() -> bytes:
    """Many entries of weights, which have one dict in common."""
    entries = (text(f"n{i}") + get(3) for i in range(60_000))
    return state() + put(3) + POP + EMPTY_DICT + MARK + b"".join(entries) + SETITEMS


def networks() -> bytes:
    entries = (text(f"n{i}") + EMPTY_DICT + text("a") + state() + SETITEM for i in range(6000))
    return EMPTY_DICT + MARK + b"".join(entries) + SETITEMS


PICKLES: dict[str, Callable[[], bytes]] = {
    "an integer of 300 kB, 60,000 times": huge_integer_often,
    "integers of 500 bytes, 150,000 times": long_integers_often,
    "50,000 dropped objects 97 dicts deep": dropped_deep_below_long_names,
    "names that repeat a word": names_of_training_states,
    "60,000 networks of one dict": networks_of_one_dict,
    "6,000 networks": networks,
}


@first_only("build", PICKLES.values(), ids=PICKLES)
def test_pickle_of_hostile_work_costs_little(build, tmp_path):
    (tmp_path / "run").mkdir()
    as_zip(tmp_path / "run" / "epoch_1.pt", PROTO + b"\2" + build() + STOP)
    average_within_limits(tmp_path / "run", tmp_path / "out.pt")


def one_hash(count: int) -> list[tuple[int, int]]:
    """Pairs of numbers below 2^62 that Python gives the same hash."""
    first, second, third = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x27D4EB2F165667C5
    turn = 2**64

    def after(a: int) -> int:
        x = (third + a * second) % turn
        return ((x << 31 | x >> 33) % turn) * first % turn

    target, inverse = after(0) + second, pow(second, -1, turn)
    pairs: list[tuple[int, int]] = []
    a = 0
    while len(pairs) < count:
        b = (target - after(a)) * inverse % turn
        if b < 2**61 - 1:
            pairs.append((a, b))
        a += 1
    assert len({hash(pair) for pair in pairs}) == 1
    return pairs


@pytest.mark.slow
def test_dcp_offsets_of_one_hash_cost_little(tmp_path, monkeypatch):
    """Where boxes begin is a key, and pairs of numbers can be given one hash."""
    monkeypatch.setattr(metadata.MetadataIndex, "__hash__", object.__hash__)  # cheap to write
    folder = tmp_path / "run" / "step_1"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    places, chunks = {}, []
    for pair in one_hash(6000):
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(pair), torch.Size((1, 1))))
        places[metadata.MetadataIndex("w", torch.Size(pair))] = _StorageInfo("__0_0.distcp", 0, 0)
    properties = metadata.TensorProperties(torch.float32)
    item = metadata.TensorStorageMetadata(properties, torch.Size((2**31, 2**31)), chunks)
    saved = metadata.Metadata({"w": item}, None, places)
    (folder / ".metadata").write_bytes(pickle.dumps(saved))
    said = average_within_limits(folder, tmp_path / "out.pt")
    assert "overlap or leave holes" in said


@pytest.mark.slow
def test_file_names_of_digits_and_words_cost_little(tmp_path):
    for name in (f"rng{'1' * 200}x", f"optimizer{'-1' * 100}x", "zero_pp_rank_" * 15, "9" * 240):
        save(tmp_path / "run" / f"{name}.pt", {"w": torch.ones(3)})
    histories = [{"step": i, "loss": 1.0, "eval_" * 50: 2.0} for i in range(2000)]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": histories}))
    average_within_limits(tmp_path / "run", tmp_path / "out.pt")


@pytest.mark.slow
def test_name_patterns_take_linear_time():
    """In a process that is stopped, else: what is quadratic takes hours."""
    code = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
from ckptavg.formats.training_record import TRAINING_STATE
from ckptavg.runs.discovery.file_names import OTHER_STATE
for word in ("optim", "sched", "scaler", "rng", "1", "-1", "_rank1", "rank_1", "_", ".", "last"):
    for end in ("", "x", "config", ".pt"):
        for begin in ("", "rng", "optimizer"):
            name = begin + word * (300_000 // len(word)) + end
            TRAINING_STATE.fullmatch(name)
            OTHER_STATE.fullmatch(name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_natural_key_orders_numbers_of_any_length(monkeypatch):
    """A store may have longer names than a disk."""
    monkeypatch.setattr(RemotePath, "is_dir", lambda self: False)
    numbers = ["9", f"{'0' * 5000}10", f"1{'0' * 5000}", f"2{'0' * 5000}"]
    paths = [RemotePath(f"s3://bucket/epoch_{number}.pt") for number in numbers]
    paths.reverse()
    assert sorted(paths, key=natural_key) == paths[::-1]


@pytest.mark.parametrize(
    ("name", "training"),
    [("optimizer", True), ("my_lr_scheduler_1", True), ("GradScaler", True), ("sched", True),
     ("optimizer_config", False), ("scheduler_params", False), ("optim_name", False),
     ("model", False), ("optimizer_config_state", True)],
)  # fmt: skip
def test_training_state_matches_names(name, training):
    assert bool(TRAINING_STATE.fullmatch(name)) is training


@pytest.mark.parametrize(
    ("stem", "other"),
    [("rng_state_0", True), ("rng1", True), ("optimizer-1.2", True), ("rngx", False),
     ("optim_states", True), ("x_optim_states", True), ("rng_1x", False)],
)  # fmt: skip
def test_other_state_matches_names(stem, other):
    assert bool(OTHER_STATE.fullmatch(stem)) is other


def test_average_compares_each_path_a_few_times(tmp_path, monkeypatch):
    """A directory below 1 MB can hold 12,000 checkpoints: none is looked for among all others."""
    count = 600
    for i in range(count):
        save(tmp_path / "run" / f"{i}.safetensors", {"w": torch.full((1,), float(i))})
    comparisons = 0
    compare = PurePath.__eq__

    def counted(self, other):
        nonlocal comparisons
        comparisons += 1
        return compare(self, other)

    monkeypatch.setattr(PurePath, "__eq__", counted)
    average(open_run(tmp_path / "run"), out=tmp_path / "average.safetensors")
    assert comparisons < 200 * count
