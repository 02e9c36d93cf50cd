"""Files whose structure lies: one line, exit 1, no output, little memory, and never a wait."""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

from pickle import (  # isort: skip
    APPENDS, BINGET, EMPTY_DICT, EMPTY_LIST, MARK, MEMOIZE, NONE, POP, PROTO, REDUCE, SETITEMS,
    STOP, TUPLE, TUPLE2, dumps,
)  # fmt: skip

import pytest
import torch
from assembler import glob, number, put, tensor, text
from click.testing import CliRunner
from fuzz.watch import watched
from gadgets import WEIGHTS, as_legacy, as_zip, state
from helpers import listing
from selecting import combinations, first_only

from ckptavg.cli import main
from ckptavg.formats import open_checkpoint

LOCAL, DIRECTORY, END = b"PK\3\4", b"PK\1\2", b"PK\5\6"


@pytest.fixture
def run(tmp_path):
    """A run that holds one honest checkpoint, to which a test adds another."""
    path = tmp_path / "room" / "run"
    path.mkdir(parents=True)
    torch.save({"w": torch.zeros(4)}, path / "epoch_2.pt")
    arguments = ["average", str(path), "-o", str(tmp_path / "first.pt")]
    assert CliRunner().invoke(main, arguments).exit_code == 0  # all modules are loaded now
    return path


def check_read(run: Path) -> None:
    """The average of the run is that of both checkpoints."""
    out = run.parent / "out.pt"
    with watched(run.parent):
        result = CliRunner().invoke(main, ["average", str(run), "-o", str(out)])
    assert result.exit_code == 0, result.output
    found = torch.load(out, weights_only=True)["state_dict"]["w"]
    assert found.tolist() == [w / 2 for w in WEIGHTS]


def check_refused(run: Path, why: str, *names: str) -> None:
    """One line says what is wrong with which file, the exit status is 1, nothing is written."""
    before = listing(run.parent)
    with watched(run.parent):
        arguments = ["average", str(run), *names, "-o", str(run.parent / "out.pt")]
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert len(result.stderr) < 2500
    assert why in result.stderr
    assert str(run) in result.stderr
    assert listing(run.parent) == before


# ------------------------------------------------------------------------------------- zip archives


def saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.tensor(WEIGHTS)}, buffer)
    return buffer.getvalue()


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(*items: tuple[str, bytes], how: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", how) as archive:
        warnings.simplefilter("ignore")  # of two entries with one name
        archive.comment = comment
        for name, content in items:
            archive.writestr(name, content)
    return buffer.getvalue()


def patched(content: bytes, name: str, where: bytes, at: int, layout: str, value: int) -> bytes:
    """Overwrite a field of an entry's local header or directory entry."""
    raw, fixed = name.encode(), 30 if where == LOCAL else 46
    found = content.index(raw)
    while content[found - fixed : found - fixed + 4] != where:
        found = content.index(raw, found + 1)
    changed = bytearray(content)
    struct.pack_into(layout, changed, found - fixed + at, value)
    return bytes(changed)


def flagged(content: bytes, flag: int) -> bytes:
    """Every entry bears a flag, in both of its headers."""
    for name in entries(content):
        content = patched(content, name, LOCAL, 6, "<H", flag)
        content = patched(content, name, DIRECTORY, 8, "<H", flag)
    return content


def described(items: dict[str, bytes]) -> bytes:
    """An archive written to a pipe: sizes follow the contents."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

        seek = tell

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, content in items.items():
            archive.writestr(name, content)
    return pipe.getvalue()


def with_end(content: bytes, size: int, offset: int) -> bytes:
    """The directory's size and offset in a zip64 record."""
    end = content.rindex(END)
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, size, offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    most = (0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return content[:end] + record + locator + END + struct.pack("<HHHHIIH", *most)


SAVED = saved()
ITEMS = entries(SAVED)
DATA, PICKLE = "archive/data/0", "archive/data.pkl"
ODD_ZIPS = {
    "a comment": zipped(*ITEMS.items(), comment=b"PK\1\2" * 2000),
    "sizes that follow": described(ITEMS),
    "a directory in the middle": SAVED + bytes(1000),
    "entries beside the folder": zipped(*ITEMS.items(), ("../../etc/passwd", b"x")),
}
LYING_ZIPS = {
    "a shorter storage": (zipped(*(ITEMS | {DATA: bytes(15)}).items()), "shorter"),
    "a storage that claims too much": (patched(SAVED, DATA, DIRECTORY, 24, "<I", 2**31), ""),
    "a storage that claims 4 GiB": (
        patched(patched(SAVED, DATA, DIRECTORY, 24, "<I", 2**32 - 1),
                DATA, DIRECTORY, 20, "<I", 2**32 - 1), ""),
    "a pickle that claims 2 GiB": (patched(SAVED, PICKLE, DIRECTORY, 24, "<I", 2**31), "claims"),
    "compressed": (zipped(*ITEMS.items(), how=zipfile.ZIP_DEFLATED), "compressed"),
    "an unknown compression": (patched(SAVED, PICKLE, DIRECTORY, 10, "<H", 99), "compressed"),
    "encrypted": (flagged(zipped(*ITEMS.items()), 1), "encrypted"),
    "two pickles": (zipped(*ITEMS.items(), (PICKLE, ITEMS[PICKLE])), "one name"),
    "two storages of one name": (zipped(*ITEMS.items(), (DATA, bytes(16))), "one name"),
    "another name in the local header": (
        zipped(*ITEMS.items()).replace(DATA.encode(), b"archive/data/1", 1), "contradicts"),
    "another size in the local header": (
        patched(zipped(*ITEMS.items()), DATA, LOCAL, 18, "<I", 8), "contradicts"),
    "entries on top of each other": (patched(SAVED, DATA, DIRECTORY, 42, "<I", 0), "overlap"),
    "an entry past the end": (patched(SAVED, DATA, DIRECTORY, 42, "<I", 2**31), "outside"),
    "a directory of 4 EiB": (with_end(SAVED, 2**62, 0), ""),
    "a directory at 8 EiB": (with_end(SAVED, 100, 2**63), ""),
    "a directory before the file": (with_end(SAVED, 2**40, 2**40), ""),
    "a name from another planet": (flagged(SAVED, 0x800).replace(b"data/0", b"data/\xff"), ""),
}  # fmt: skip


@first_only("content", ODD_ZIPS.values(), ids=ODD_ZIPS)
def test_zip_of_odd_layout_is_read(content, run):
    (run / "epoch_1.pt").write_bytes(content)
    check_read(run)


@first_only(("content", "why"), LYING_ZIPS.values(), ids=LYING_ZIPS)
def test_zip_with_false_fields_is_refused(content, why, run):
    (run / "epoch_1.pt").write_bytes(content)
    check_refused(run, why)


# ------------------------------------------------------------------------------------- legacy files

LYING_LEGACIES = {
    "a list of storages that names one twice": {"keys": dumps(["0", "0"])},
    "a list that names another": {"keys": dumps(["1"])},
    "a list of numbers": {"keys": dumps([0])},
    "no list": {"keys": dumps({"0": 1})},
    "an unknown protocol": {"protocol": dumps(1002)},
    "a huge number for a protocol": {"protocol": dumps(2**60_000)},
    "a big-endian machine": {"system": dumps({"little_endian": False})},
    "a truth that is no bool": {"system": dumps({"little_endian": 1})},
    "a storage that is larger": {"tree": state(weights=tensor(numel=2**40)) + STOP},
    "a storage of two sizes": {"tree": state(text("v") + tensor(numel=5)) + STOP},
    "no end": {"tree": state()},
}


@first_only("others", LYING_LEGACIES.values(), ids=LYING_LEGACIES)
def test_legacy_file_with_false_fields_is_refused(others, run):
    as_legacy(run / "epoch_1.pt", state() + STOP, **others)
    check_refused(run, "epoch_1.pt")


@first_only("count", [-1, 0, 3, 5, 2**62, -(2**63)])
def test_legacy_storage_of_false_length_is_refused(count, run):
    path = run / "epoch_1.pt"
    as_legacy(path, state() + STOP)
    content = path.read_bytes()
    path.write_bytes(content[:-24] + struct.pack("<q", count) + content[-16:])
    check_refused(run, "past the end")


# ------------------------------------------------------------------------------------- safetensors


def header(dtype="F32", shape=(4,), offsets=(0, 16), more="") -> bytes:
    entry = {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
    return b'{"w": %s%s}' % (json.dumps(entry).encode(), more.encode())


def framed(head: bytes, content: bytes = struct.pack("<4f", *WEIGHTS), length=None) -> bytes:
    return struct.pack("<Q", len(head) if length is None else length) + head + content


ENTRY = json.dumps({"dtype": "F32", "shape": [4], "data_offsets": [16, 32]})
ODD_HEADERS = {
    "plain": header(),
    "long metadata": header(more=f', "__metadata__": {{"x": "{"y" * 2_000_000}"}}'),
    "numbers like bombs in the metadata": header(
        more=', "__metadata__": {"step": "%s", "epoch": "1e999", "lr": "nan"}' % ("9" * 5000)
    ),
    "an account that is not ours": header(more=', "__metadata__": {"ckptavg": "%s"}' % ("[" * 999)),
}
LYING_HEADERS = {
    "a length of 16 EiB": framed(header(), length=2**64 - 1),
    "a length past the end": framed(header(), length=10_000),
    "a length that is negative": framed(header(), length=2**63),
    "extents whose product overflows": framed(header(shape=(2**32, 2**32, 4))),
    "extents whose product overflows to a fit": framed(header(shape=(2**62 + 1, 4))),
    "nothing, 2^61 times 2^61 times": framed(header(shape=(2**61, 2**61, 0), offsets=(0, 0)), b""),
    "offsets past the end": framed(header(shape=(2**40,), offsets=(0, 2**42))),
    "offsets backwards": framed(header(offsets=(16, 0))),
    "a hole": framed(header(offsets=(4, 20)), bytes(20)),
    "an overlap": framed(header(more=f', "v": {ENTRY.replace("16, 32", "8, 24")}'), bytes(24)),
    "deep lists": framed(b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": framed(b'{"w":' * 100_000 + b"1" + b"}" * 100_000),
    "a number of 10,000 digits": framed(b'{"w": {"shape": [%s]}}' % (b"9" * 10_000)),
    "an exponent": framed(b'{"w": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 16]}}'),
    "a name twice": framed(header(more=f', "w": {ENTRY}'), bytes(32)),
    "an unknown dtype": framed(header(dtype="F32\x1b[2J\n")),
    "no UTF-8": framed(header().replace(b'"w"', b'"\xc3\x28"')),
    "a long name": framed(header().replace(b'"w"', b'"%s"' % (b"module." * 70_000))),
    "metadata of numbers": framed(header(more=', "__metadata__": {"step": 1}')),
    "too many dimensions": framed(header(shape=(4, *[1] * 64))),
}


@first_only("head", ODD_HEADERS.values(), ids=ODD_HEADERS)
def test_safetensors_odd_header_is_read(head, run):
    (run / "epoch_1.safetensors").write_bytes(framed(head))
    check_read(run)


@first_only("content", LYING_HEADERS.values(), ids=LYING_HEADERS)
def test_safetensors_false_header_is_refused(content, run):
    (run / "epoch_1.safetensors").write_bytes(content)
    check_refused(run, "epoch_1.safetensors")


# -------------------------------------------------------------------- what is no file, and indices


def special(kind: str, path: Path, monkeypatch) -> None:
    """Make something that opens, or waits to, and is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # its address must be short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to(kind)


SPECIAL = ["pipe", "socket", "/dev/zero", "/dev/null", "/dev/stdin"]
needs_unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are Unix's")


@needs_unix
@combinations(kind=SPECIAL, suffix=[".pt", ".safetensors"])
def test_special_file_is_refused_without_waiting(kind, suffix, run, monkeypatch):
    path = run / f"epoch_1{suffix}"
    special(kind, path, monkeypatch)
    code, message = within_limits(str(run if suffix == ".pt" else path))
    assert (code, "not a regular file" in message) == (1, True), message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_empty_directory_of_checkpoint_name_is_refused(suffix, run):
    (run / f"epoch_1{suffix}").mkdir()
    check_refused(run, "holds no checkpoint", str(run / f"epoch_1{suffix}"))


@needs_unix
@first_only("kind", [*SPECIAL, "loop"])
def test_index_of_special_file_is_refused_without_waiting(kind, run, monkeypatch):
    index_of(run, "a.safetensors")
    special(kind, run / "a.safetensors", monkeypatch)
    code, message = within_limits(str(run))
    assert (code, "not there" in message) == (1, True), message


@needs_unix
@first_only("kind", ["pipe", "/dev/zero"])
def test_trainer_state_that_is_no_file_is_ignored(kind, run, monkeypatch):
    (run / "model.safetensors").write_bytes(framed(header()))
    special(kind, run / "trainer_state.json", monkeypatch)
    assert within_limits(str(run))[0] == 0


def index_of(run: Path, name: str) -> None:
    (run / "epoch_2.pt").unlink()
    index = {"weight_map": {"w": name}}
    (run / "model.safetensors.index.json").write_text(json.dumps(index))


OUTSIDE = {
    "above": "../secret.safetensors",
    "above, by way of below": "a/../../secret.safetensors",
    "absolute": "/etc/passwd",
    "itself": ".",
    "its parent": "..",
    "nothing": "",
    "a NUL": "a\0.safetensors",
    "a long name": "x" * 100_000,
    "a path of long names": "/".join(["x" * 255] * 100),
    "half a character": "\ud800",
    "a device": "/dev/zero",
    "control characters": "\x1b[2J\n.safetensors",
}


@first_only("name", OUTSIDE.values(), ids=OUTSIDE)
def test_index_leading_elsewhere_is_refused(name, run):
    (run.parent / "secret.safetensors").write_bytes(framed(header()))
    index_of(run, name)
    check_refused(run, "index.json")


def test_index_of_link_reveals_no_foreign_content(run):
    (run.parent / "secret").write_text("root:x:0:0" * 10)
    index_of(run, "a.safetensors")
    (run / "a.safetensors").symlink_to("../secret")
    check_refused(run, "a.safetensors is a text")


# -------------------------------------------------------------------------------- limits, measured

_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from ckptavg.cli import main
try:
    main(["inspect", *sys.argv[1:], "-q"])
finally:
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")))
"""
_MOST_MIB = 600


def within_limits(*paths: str) -> tuple[int, str]:
    """Inspect in a process of its own, which may neither hang nor take much memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits and their measure are Linux's")
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, *paths],
        capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    mib = int(done.stdout.split()[-2]) >> 10
    assert mib < _MOST_MIB, f"it took {mib} MiB"
    assert len(done.stderr.splitlines()) == (done.returncode == 1), done.stderr[-500:]
    return done.returncode, done.stderr


def one_hash(count: int) -> list[tuple[int, int]]:
    """Pairs of small numbers that Python gives the same hash."""
    first, second, third = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x27D4EB2F165667C5
    turn = 2**64

    def after(a: int) -> int:
        x = (third + a * second) % turn
        return ((x << 31 | x >> 33) % turn) * first % turn

    target, inverse = after(0) + second, pow(second, -1, turn)
    found, a = [], 0
    while len(found) < count:
        b = (target - after(a)) * inverse % turn
        found += [(a, b)] if b < 2**60 else []
        a += 1
    assert len({hash(pair) for pair in found}) == 1
    return found


def pairs(count: int) -> bytes:
    return b"".join(number(a) + number(b) + TUPLE2 + NONE for a, b in one_hash(count))


PICKLES = {
    "keys of one hash": lambda: state(pairs(30_000)),
    "a memo without end": lambda: EMPTY_LIST + MEMOIZE * 10_000_000 + POP + state(),
    "a name of wrappers": lambda: EMPTY_DICT + MARK + text("module." * 1_000_000 + "w") + tensor()
    + SETITEMS,
    "one element a trillion times": lambda: state(weights=tensor(shape=(2**40,), stride=(0,))),
    "one storage many times over": lambda: state(
        b"".join(text(f"t{i}") + tensor(shape=(2**20 + i, 2), stride=(0, 1))
                 for i in range(1000))),
    "nothing, 2^61 times": lambda: state(weights=tensor(shape=(2**61, 2**61, 0), stride=(0,) * 3)),
    "copies of a list": lambda: EMPTY_LIST + put(0) + MARK + NONE * 50_000 + APPENDS + POP
    + (glob("builtins", "list") + MARK + BINGET + b"\0" + TUPLE + REDUCE) * 20_000 + state(),
}  # fmt: skip


@first_only("build", PICKLES.values(), ids=PICKLES)
def test_pickle_of_huge_work_is_refused(build, run):
    as_zip(run / "epoch_1.pt", PROTO + b"\2" + build() + STOP)
    code, message = within_limits(str(run / "epoch_1.pt"))
    assert (code, "MemoryError" in message) == (1, False), message


def test_strides_without_meaning_are_normalized(run):
    """Tables of places are keyed by strides, and pairs of numbers can be given one hash."""
    views = enumerate(one_hash(100))
    tensors = [text(f"t{i}") + tensor(shape=(1, 1), stride=pair) for i, pair in views]
    tensors += [text(f"e{i}") + tensor(shape=(0, i), stride=(1, i)) for i in range(9)]
    as_zip(run / "epoch_1.pt", PROTO + b"\2" + state(b"".join(tensors)) + STOP)
    found = open_checkpoint(run / "epoch_1.pt").tensors.values()
    assert {piece.stride for t in found for piece in t.pieces} == {(1,), (0, 0)}


HEADERS = {
    "lists without end": lambda: b'{"w": [' + b"[]," * 12_000_000 + b"[]]}",
    "objects without end": lambda: b'{"w": [' + b"{}," * 12_000_000 + b"{}]}",
    "wide characters": lambda: header(
        more=f', "__metadata__": {{"x": "\N{PILE OF POO}{"y" * 20_000_000}"}}'
    ),
}


@pytest.mark.parametrize("build", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("place", ["header", "index", "trainer's state"])
def test_json_of_millions_of_values_takes_little_memory(build, place, run):
    path = run / "model.safetensors"
    if place == "header":
        path.write_bytes(framed(build()))
    elif place == "index":
        (run / "model.safetensors.index.json").write_bytes(build())
    else:
        path.write_bytes(framed(header()))
        (run / "trainer_state.json").write_bytes(build())
    code, message = within_limits(str(run))
    assert code in (0, 1)
    assert "MemoryError" not in message


@pytest.mark.slow
def test_zip_directory_of_gigabytes_is_not_read(run):
    """A sparse file: it takes no room on the disk."""
    path, size = run / "epoch_1.pt", 64 << 30
    with path.open("wb") as file:
        file.write(SAVED)
        file.seek(size)
        start = file.tell()
        file.write(with_end(SAVED[SAVED.rindex(END) :], size - (1 << 30), 1 << 30))
        file.seek(start + 56 + 8)
        file.write(struct.pack("<Q", start))
    code, message = within_limits(str(path))
    assert (code, "claims" in message) == (1, True), message


def test_zip_of_many_entries_takes_little_memory(run):
    count, body = 60_000, io.BytesIO()
    names = [*ITEMS, *(f"archive/x{i}" for i in range(count))]
    rows = []
    for name in names:
        content, raw = ITEMS.get(name, b""), name.encode()
        sizes = (len(content), len(content), len(raw))
        rows.append(struct.pack("<4sHHHHHHIIIHHHHHII", DIRECTORY, 20, 20, 0, 0, 0, 33, 0, *sizes,
                                0, 0, 0, 0, 0, body.tell()) + raw)  # fmt: skip
        body.write(struct.pack("<4sHHHHHIIIHH", LOCAL, 20, 0, 0, 0, 33, 0, *sizes, 0))
        body.write(raw + content)
    directory, start = b"".join(rows), body.tell()
    content = body.getvalue() + directory + END + bytes(18)
    path = run / "epoch_1.pt"
    path.write_bytes(with_end(content, len(directory), start).replace(
        struct.pack("<QQ", 3, 3), struct.pack("<QQ", len(names), len(names))))  # fmt: skip
    assert within_limits(str(path))[0] == 0
