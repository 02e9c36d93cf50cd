"""The archives of ``torch.save``: right bytes where they are whole, refused where they are not."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.reader import Reader
from ckptavg.formats.torch_save import zip_checksums

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
          torch.int64, torch.int8, torch.uint16, torch.uint32, torch.bool,
          torch.float8_e4m3fn]  # fmt: skip


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8)
    return raw.view(-1).view(dtype).view(shape)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read(tensor) -> bytes:
    out = bytearray(tensor.nbytes)
    if out:
        with contextlib.closing(Reader()) as reader:
            reader.read(tensor, 0, tensor.numel, memoryview(out))
    return bytes(out)


def state_dict() -> dict[str, torch.Tensor]:
    tied = torch.rand(4, 3)
    plain = {str(dtype): random(dtype, 5, 2) for dtype in DTYPES}
    return plain | {
        "tied.a": tied,
        "tied.b": tied,
        "row": tied[2],
        "transposed": torch.rand(3, 4).t(),
        "sliced": torch.rand(9, 8)[1::3, 2:7:2],
        "expanded": torch.rand(3, 1).expand(3, 5),
        "half of a storage": torch.tensor(range(10), dtype=torch.uint16)[5:],
        "0-d": torch.tensor(3.5),
        "empty": torch.rand(0, 3),
        "parameter": torch.nn.Parameter(torch.rand(2)),
    }


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("to_file", [True, False], ids=["by name", "through a stream"])
def test_zip_reader_ranges_hold_values_of_torch(tmp_path, protocol, to_file):
    path = tmp_path / "model.ckpt"
    if to_file:
        torch.save(state_dict(), path, pickle_protocol=protocol)
    else:
        with path.open("wb") as file:
            torch.save(state_dict(), file, pickle_protocol=protocol)
    expected = torch.load(path, weights_only=False)
    opened = open_checkpoint(path)
    assert list(opened.tensors) == list(expected)
    for name, tensor in opened.tensors.items():
        assert (tensor.dtype.name, tensor.shape) == (
            str(expected[name].dtype).removeprefix("torch."),
            tuple(expected[name].shape),
        )
        assert read(tensor) == as_bytes(expected[name]), name


def test_zip_reader_gives_one_range_for_contiguous_tensor(tmp_path):
    path = tmp_path / "model.pt"
    value = torch.rand(6, 5)
    torch.save({"a": value, "b": value[2:4]}, path)
    content = path.read_bytes()
    opened = open_checkpoint(path)
    for name, expected in (("a", value), ("b", value[2:4])):
        tensor = opened.tensors[name]
        assert tensor.contiguous
        at = tensor.pieces[0].offset
        assert content[at : at + tensor.nbytes] == as_bytes(expected)


def test_zip_reader_ties_are_names_of_same_bytes(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(state_dict(), path)
    opened = open_checkpoint(path)
    assert opened.ties() == [["tied.a", "tied.b"]]
    assert opened.nbytes == sum(t.nbytes for n, t in opened.tensors.items() if n != "tied.b")


def test_zip_reader_reads_file_without_checksums(tmp_path):
    path = tmp_path / "model.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(open_checkpoint(path).tensors["a"]) == as_bytes(torch.arange(3.0))
    assert zip_checksums.storages(str(path)) == []


def test_zip_checksums_depend_on_contents_not_file_names(tmp_path):
    value = torch.rand(8)
    torch.save({"a": value}, tmp_path / "one.pt")
    torch.save({"a": value.clone()}, tmp_path / "two.pt")
    torch.save({"a": value + 1}, tmp_path / "xyz.pt")
    one, two, three = (
        [(s.entry.size, s.entry.crc) for s in zip_checksums.storages(str(tmp_path / f"{name}.pt"))]
        for name in ("one", "two", "xyz")
    )
    assert len(one) == 1
    assert one == two != three


# ------------------------------------------------------------------------------------ damaged files


def saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(4.0), "b": torch.zeros(2, 3)}, buffer, **options)
    return buffer.getvalue()


def test_zip_reader_refuses_every_truncation(tmp_path, refusal):
    content, path = saved(), tmp_path / "cut.pt"
    for length in {*range(0, len(content), 7), *range(len(content) - 60, len(content))}:
        path.write_bytes(content[:length])
        refusal(path)


def rewritten(change) -> bytes:
    """The same archive, its entries changed on their way."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            name, content, how = change(info.filename, old.read(info), zipfile.ZIP_STORED)
            if name:
                new.writestr(zipfile.ZipInfo(name), content, how)
    return buffer.getvalue()


def compress(part):
    return lambda n, c, how: (n, c, zipfile.ZIP_DEFLATED if part in n else how)


def drop(part):
    return lambda n, c, how: ("" if part in n else n, c, how)


def shorten(n, c, how):
    return n, c[:-1] if n.endswith("data/0") else c, how


def big_endian(n, c, how):
    return n, b"big" if n.endswith("byteorder") else c, how


def patched(content: bytes, name: str, record: bytes, at: int, value: int, form: str) -> bytes:
    """Overwrite a field of an entry's local header (PK34) or directory entry (PK12)."""
    fixed = {b"PK\x03\x04": 30, b"PK\x01\x02": 46}[record]
    start = next(
        i
        for i in range(len(content))
        if content.startswith(record, i) and content.startswith(name.encode(), i + fixed)
    )
    changed = bytearray(content)
    struct.pack_into(form, changed, start + at, value)
    return bytes(changed)


STORED = rewritten(lambda *entry: entry)
FIRST, SECOND = "archive/data/0", "archive/data/1"
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"


def moved_onto_its_neighbour() -> bytes:
    at = zipfile.ZipFile(io.BytesIO(STORED)).getinfo(SECOND).header_offset
    return patched(STORED, FIRST, CENTRAL, 42, at, "<I")


def larger_in_the_directory() -> bytes:
    content = patched(STORED, SECOND, CENTRAL, 20, 10_000, "<I")
    return patched(content, SECOND, CENTRAL, 24, 10_000, "<I")


def far_away(offset: int) -> bytes:
    """The last storage's directory entry names a place that no file reaches, by a zip64 field."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(STORED)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in sorted(old.infolist(), key=lambda i: i.filename == SECOND):
            new.writestr(zipfile.ZipInfo(info.filename), old.read(info))
        new.getinfo(SECOND).header_offset = offset
    return buffer.getvalue()


def script_module() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), buffer)
    return buffer.getvalue()


def plain_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    return buffer.getvalue()


DAMAGED = {
    "an empty file": (b"", "empty"),
    "text": (b"step,loss\n1,2\n" * 9, "is a text"),
    "noise": (bytes(range(255, 0, -1)), "neither"),
    "bytes lost on the way": (STORED[:300] + STORED[320:], ""),
    "bytes that do not belong": (STORED[:300] + bytes(20) + STORED[300:], ""),
    "compressed tensors": (rewritten(compress("data/0")), "compressed"),
    "a compressed pickle": (rewritten(compress("data.pkl")), "compressed"),
    "a missing storage": (rewritten(drop("data/1")), "missing"),
    "no pickle": (rewritten(drop("data.pkl")), "other files"),
    "a short storage": (rewritten(shorten), "shorter"),
    "a big-endian file": (rewritten(big_endian), "big-endian"),
    "overlapping entries": (moved_onto_its_neighbour(), "overlap"),
    "an entry larger than it is": (larger_in_the_directory(), ""),
    "an entry that begins at 1 TiB": (far_away(1 << 40), ""),
    "an entry that begins at 8 EiB": (far_away((1 << 63) + 1), ""),
    "an entry that begins at 16 EiB": (far_away((1 << 64) - 1), ""),
    "an extra field up to the next one": (patched(STORED, FIRST, LOCAL, 28, 60, "<H"), "runs into"),
    "no local header": (patched(STORED, FIRST, LOCAL, 0, 0, "<I"), "no header"),
    "a local name past the end": (patched(STORED, SECOND, LOCAL, 26, 65_535, "<H"), "runs into"),
    "a pickle whose name is long": (patched(STORED, "archive/data.pkl", LOCAL, 28, 60_000, "<H"),
                                    "runs into"),
    "another pickle": (rewritten(lambda n, c, how: (n, b"\x80\x02." if "pkl" in n else c, how)),
                       "malformed"),
    "a zip of other things": (plain_zip(), "other files"),
    "a zip of nothing": (b"PK\x05\x06" + bytes(18), ""),
}  # fmt: skip


@pytest.mark.parametrize(("content", "why"), DAMAGED.values(), ids=DAMAGED)
def test_zip_reader_refuses_damaged_archive(content, why, tmp_path, refusal):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    text = refusal(path)
    assert str(path) in text
    assert why in text


def test_zip_reader_reads_stored_archive(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(STORED)
    assert read(open_checkpoint(path).tensors["a"]) == as_bytes(torch.arange(4.0))


@pytest.mark.filterwarnings("ignore")
def test_zip_reader_names_torchscript_archive(tmp_path, refusal):
    (tmp_path / "model.pt").write_bytes(script_module())
    assert "TorchScript" in refusal(tmp_path / "model.pt")


def view(key: str, numel: int, kind="FloatStorage") -> bytes:
    """``{"<kind><numel>": a flat tensor}``, without the braces."""
    return (
        b"X" + struct.pack("<I", len(f"{kind}{numel}")) + f"{kind}{numel}".encode()
        + b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n" + kind.encode()
        + b"\nX" + struct.pack("<I", len(key)) + key.encode() + b"X\x03\0\0\0cpuI"
        + str(numel).encode() + b"\ntQK\0(I" + str(numel).encode() + b"\nt(K\1t\x89}tR"
    )  # fmt: skip


def test_zip_reader_refuses_storage_that_grows(forge, refusal):
    claims = view("0", 4) + view("0", 1_000_000_000)
    path = forge(b"\x80\x02}(" + claims + b"u.", {"0": bytes(16)})
    refusal(path)


def test_zip_reader_refuses_storage_that_changes_type(forge, refusal):
    path = forge(
        b"\x80\x02}(" + view("0", 4) + view("0", 4, "DoubleStorage") + b"u.", {"0": bytes(16)}
    )
    refusal(path)


def test_zip_reader_limits_size_of_small_entries(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (
            ("data.pkl", b"\x80\x02}(" + view("0", 4) + b"u."),
            ("data/0", bytes(16)),
        ):
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/byteorder", bytes(64 << 20))
    tracemalloc.start()
    try:
        with contextlib.suppress(CheckpointError):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


SEEDS = [saved(), STORED, saved(pickle_protocol=4)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_zip_reader_damage_raises_only_checkpoint_error(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    directory = max(0, content.rfind(b"PK\x05\x06") - 400)
    spots = st.integers(0, len(content) - 1) | st.integers(directory, len(content) - 1)
    for at in data.draw(st.lists(spots, min_size=1, max_size=6)):
        end = at + data.draw(st.integers(0, 8))
        content[at:end] = data.draw(st.just(b"\xff" * (end - at)) | st.binary(max_size=8))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        open_checkpoint(path)
