"""Archives that readers could read differently: what torch.load makes of them, or a refusal."""

from __future__ import annotations

import contextlib
import io
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.reader import Reader

fsspec = pytest.importorskip("fsspec")

LOCAL, CENTRAL, END, END64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6"
Items = list[tuple[str, bytes]]


def saved(value: float, count: int = 4) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.full((count,), float(value))}, buffer)
    return buffer.getvalue()


def items(content: bytes) -> Items:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def zipped(entries: Items, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.comment = comment
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


ONE, TWO = saved(1), saved(2)
PLAIN = zipped(items(ONE))
DATA, PICKLE = "archive/data/0", "archive/data.pkl"


def renamed(change) -> bytes:
    return zipped([(change(name), content) for name, content in items(ONE)])


def replaced(content: bytes, record: bytes, at: int, form: str, value: int, nth: int = -1) -> bytes:
    """Overwrite a field of a record, the last one of its kind unless told otherwise."""
    places = [i for i in range(len(content)) if content.startswith(record, i)]
    changed = bytearray(content)
    struct.pack_into(form, changed, places[nth] + at, value)
    return bytes(changed)


def parted(gap: int, where: str = DATA) -> bytes:
    """Bytes between an entry and the next one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in items(ONE):
            archive.writestr(zipfile.ZipInfo(name), content)
            if name == where:
                buffer.seek(gap, io.SEEK_CUR)
                archive.start_dir = buffer.tell()
    return buffer.getvalue()


def shifted(before: int) -> bytes:
    """Bytes before the archive, with which its offsets count."""
    buffer = io.BytesIO(LOCAL + bytes(before))
    with zipfile.ZipFile(buffer, "a") as archive:
        for name, content in items(ONE):
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def two_folders(first: str, second: str) -> bytes:
    return zipped(
        [(f"{first}/x", b"x"), *items(ONE), (f"{second}/data.pkl", dict(items(TWO))[PICKLE])]
    )


def swapped_local_extra(length: int) -> bytes:
    """The storage's local header claims a longer extra field."""
    place = PLAIN.index(DATA.encode()) - 30
    changed = bytearray(PLAIN)
    struct.pack_into("<H", changed, place + 28, length)
    return bytes(changed)


def doubled(*names: str) -> bytes:
    others = dict(items(TWO))
    with contextlib.suppress(UserWarning):
        return zipped([*items(ONE), *((name, others[name.lower()]) for name in names)])
    raise AssertionError


ODD = {
    "as torch writes it": ONE,
    "as Python writes it": PLAIN,
    "two, one behind the other": ONE + TWO,
    "two of Python's": PLAIN + zipped(items(TWO)),
    "two, the first torch's": ONE + zipped(items(TWO)),
    "three": ONE + TWO + saved(3),
    "one of another length first": saved(5, 400) + TWO,
    "one in the comment": zipped(items(ONE), TWO),
    "Python's in the comment": zipped(items(ONE), zipped(items(TWO))),
    "an end in the comment": zipped(items(ONE), END + bytes(18)),
    "an end of the same numbers in the comment": zipped(items(ONE), PLAIN[-22:]),
    "part of an end in the comment": zipped(items(ONE), END + b"abc"),
    "a comment": zipped(items(ONE), b"hello"),
    "a long comment": zipped(items(ONE), bytes(60_000)),
    "bytes behind": ONE + bytes(1000),
    "many bytes behind": ONE + bytes(66_000),
    "more bytes behind": ONE + bytes(80_000),
    "bytes before": LOCAL + bytes(60) + ONE,
    "bytes before, counted": shifted(60),
    "a storage with more behind it": zipped(
        [(n, c + bytes(48) if n == DATA else c) for n, c in items(ONE)]),
    "a storage with other weights behind it": zipped(
        [(n, c + dict(items(TWO))[DATA] if n == DATA else c) for n, c in items(ONE)]),
    **{f"a gap of {gap}": parted(gap) for gap in (1, 16, 18, 64, 82, 128)},
    "a gap behind the pickle": parted(64, PICKLE),
    "capital letters in the pickle's name": renamed(lambda n: n.replace("data.pkl", "DATA.PKL")),
    "capital letters in the folder's": renamed(
        lambda n: n.replace("archive", "Archive") if n.endswith("0") else n),
    "two pickles but for capitals": doubled("archive/DATA.pkl"),
    "two storages but for capitals": doubled("ARCHIVE/data/0"),
    "another folder first": two_folders("x", "x"),
    "another folder's pickle too": two_folders("archive", "y"),
    "a file outside first": zipped([("x", b"x"), *items(ONE)]),
    "names from the root": renamed(lambda n: f"/{n}"),
    "backslashes": renamed(lambda n: n.replace("/", "\\")),
    "no version": zipped([(n, c) for n, c in items(ONE) if "version" not in n]),
    "fewer entries than there are": replaced(replaced(PLAIN, END, 8, "<H", 2), END, 10, "<H", 2),
    "more entries than there are": replaced(replaced(PLAIN, END, 8, "<H", 9), END, 10, "<H", 9),
    "another volume": replaced(PLAIN, END, 4, "<H", 1),
    "a directory elsewhere": replaced(PLAIN, END, 16, "<I", 4),
    "a shorter directory": replaced(PLAIN, END, 12, "<I", 46),
    "a longer extra field": swapped_local_extra(4),
    "an extra field onto the next": swapped_local_extra(64),
    "another method": replaced(PLAIN, CENTRAL, 10, "<H", 8, 1),
    "encrypted": replaced(PLAIN, CENTRAL, 8, "<H", 1, 1),
    "a patch": replaced(PLAIN, CENTRAL, 8, "<H", 0x20, 1),
    "a longer size in the directory": replaced(PLAIN, CENTRAL, 24, "<I", 20, 2),
    "a name with an end": renamed(lambda n: n + "\0x" if n == DATA else n),
}  # fmt: skip


def loaded(path) -> list[float] | None:
    try:
        return torch.load(path, weights_only=True)["w"].tolist()
    except Exception:
        return None


def entries_of(path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except Exception:
        return []


def opened(path) -> list[float] | None:
    """The weights as they are read here; None where the file is refused."""
    try:
        tensor = open_checkpoint(path).tensors["w"]
        out = bytearray(tensor.nbytes)
        with contextlib.closing(Reader()) as reader:
            reader.read(tensor, 0, tensor.numel, memoryview(out))
    except CheckpointError:
        return None
    return torch.frombuffer(out, dtype=torch.float32).tolist()


def check_alike(content: bytes, path) -> None:
    """What is read is what torch reads, by path and by URL; what it refuses may be whole here."""
    path.write_bytes(content)
    url = f"memory://odd/{hash(content)}.pt"
    fsspec.filesystem("memory").pipe(url, content)
    here, there, expected = opened(path), opened(url), loaded(path)
    assert here in (None, expected or [1.0] * 4)
    assert there in (None, expected or [1.0] * 4)


@pytest.mark.parametrize("odd", ODD)
def test_zip_reader_reads_odd_archive_as_torch_or_refuses(odd, tmp_path):
    check_alike(ODD[odd], tmp_path / "odd.pt")


READ = ["as torch writes it", "as Python writes it", "a comment", "a long comment", "bytes behind",
        "bytes before, counted", "a gap of 64", "no version"]  # fmt: skip


@pytest.mark.parametrize("odd", READ)
def test_zip_reader_reads_harmless_odd_archive(odd, tmp_path):
    path = tmp_path / "odd.pt"
    path.write_bytes(ODD[odd])
    assert opened(path) == [1.0] * 4


def room_behind(name: str, room: int) -> bytes:
    """What torch writes, but for the room in front of an entry's bytes: it stands behind them.

    The entries around it are where torch puts them, so that only the entry's own header tells.
    """
    place = ONE.rindex(LOCAL, 0, ONE.index(name.encode()))
    name_length, extra_length = struct.unpack_from("<HH", ONE, place + 26)
    begin = place + 30 + name_length + extra_length
    size = len(dict(items(ONE))[name])
    assert begin % 64 == 0
    assert room <= extra_length
    moved = ONE[place : begin - room] + ONE[begin : begin + size] + bytes(room)
    content = bytearray(ONE[:place] + moved + ONE[begin + size :])
    struct.pack_into("<H", content, place + 28, extra_length - room)
    assert len(content) == len(ONE)
    return bytes(content)


@pytest.mark.parametrize("room", [1, 4, 16])
def test_zip_reader_tolerates_gap_behind_storage(room, tmp_path):
    content = room_behind("archive/data/0", room)
    check_alike(content, tmp_path / "odd.pt")
    assert opened(tmp_path / "odd.pt") == [1.0] * 4


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_zip_reader_never_reads_other_weights(tmp_path_factory, data):
    """One byte of a header or of the directory is another: the bytes of the storage stay."""
    base = data.draw(st.sampled_from([ONE, PLAIN, ODD["a comment"]]))
    content = bytearray(base)
    payload = base.index(struct.pack("<4f", *[1.0] * 4))
    spots = st.integers(0, len(content) - 1).filter(lambda i: not payload <= i < payload + 16)
    pickle = base.index(b"\x80\x02")
    spots = spots.filter(lambda i: not pickle <= i < base.index(b"PK", pickle))
    for at in data.draw(st.lists(spots, min_size=1, max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    path.write_bytes(content)
    here, expected = opened(path), loaded(path)
    # Of an entry that is flagged as a directory torch returns memory that nothing was written to.
    if expected is None or any(entry.external_attr & 0x10 for entry in entries_of(path)):
        expected = [1.0] * 4
    assert here in (None, expected)
