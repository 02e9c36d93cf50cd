"""The files of ``torch.save``: the pickle read inertly, the storages as byte ranges."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO, cast

from ckptavg.errors import CheckpointError
from ckptavg.formats import inert_pickle, storage, torch_legacy
from ckptavg.formats.inert_values import MalformedPickle, Storage, TensorView
from ckptavg.formats.storage import Location
from ckptavg.formats.table import Piece, Tensor

PROVENANCE_RECORD = "ckptavg.json"  # where a bare state dict has no room for an entry
_LOCAL_HEADER = 30
_MAX_DIRECTORY = 64 * 2**20
_CHUNK = 2**20  # bytes of an entry that are read at a time
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800  # flags of an entry
_ELSEWHERE = 0xFFFFFFFF  # a size that a zip64 field holds
_NUMBERS = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i",
    "int16": "h", "int8": "b", "uint8": "B",
}  # fmt: skip
_ALIGNMENT = 64  # of what torch.save stores


@dataclass
class TorchFile:
    """An opened ``torch.save`` file.

    Attributes:
        path: The file.
        tree: What was saved, as plain values; tensors as ``TensorView`` or ``Refused``.
        provenance: How ckptavg made it, as JSON, if that stands beside the object.
    """

    path: str
    tree: Any
    _locate: Callable[[Storage], int] = field(repr=False)
    provenance: str | None = None
    _offsets: dict[str, int] = field(default_factory=dict, repr=False)

    def tensor(self, view: TensorView) -> Tensor:
        """The table entry of a tensor in the tree.

        Raises:
            CheckpointError: Its storage is missing from the file, compressed or too short.
        """
        key = view.storage.key
        if key not in self._offsets:
            self._offsets[key] = self._locate(view.storage)
        start = self._offsets[key] + view.offset * view.dtype.size
        empty = 0 in view.shape  # strides that say nothing are made alike
        stride = tuple(
            0 if empty or n == 1 else s for n, s in zip(view.shape, view.stride, strict=True)
        )
        piece = Piece(self.path, start, view.shape, stride, (0,) * len(view.shape))
        return Tensor(view.dtype, view.shape, (piece,))

    def number(self, view: TensorView) -> float | None:
        """The value of a 0-d tensor; None where it is no number, or not there."""
        code = _NUMBERS.get(view.dtype.name)
        try:
            offset = self.tensor(view).pieces[0].offset
        except CheckpointError:
            return None
        if code is None:
            return None
        with storage.open_binary(self.path) as file:
            file.seek(offset)
            raw = file.read(view.dtype.size)
        if view.dtype.name == "bfloat16":  # the upper half of a float32
            raw = bytes(2) + raw
        value: float = struct.unpack("<" + code, raw)[0]
        return value


def read(place: str | Location, within: tuple[int, int] | None = None) -> TorchFile:
    """Open a ``torch.save`` file: its directory and its pickle, no tensor data.

    Args:
        place: The file.
        within: Offset and length of the part of it that is the ``torch.save`` file, if not all.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    path = str(place)
    try:
        with _open(place, within) as file:
            if within is None and file.read(len(torch_legacy.START)) == torch_legacy.START:
                tree, offsets = torch_legacy.read(place, file.seek(0, 2))
                return TorchFile(path, tree, lambda stored: offsets[stored.key])
            archive = zipfile.ZipFile(file)
            entries = _entries(path, archive.infolist())
            _check_entries(path, entries)
            ends = _ends(archive)
            starts = _packed(file, archive, entries, path) if storage.is_url(path) else {}
            order = entries.get("byteorder")
            if order and order.file_size == 3 and _content(file, order, path) == b"big":
                raise CheckpointError(
                    f"{path} was saved on a big-endian machine", "Load and save it on this one."
                )
            tree = inert_pickle.loads(_content(file, entries["data.pkl"], path))
            made = entries.get(PROVENANCE_RECORD)
            text = _content(file, made, path).decode() if made else None
    except MalformedPickle as error:
        raise damaged(path, f"its pickle is malformed: {error}") from error
    except _DAMAGE as error:
        raise damaged(path, _why(path, error)) from error
    base = within[0] if within else 0

    def locate(stored: Storage) -> int:
        info = _entry_of(path, entries, stored)
        if info.filename in starts:
            return base + starts[info.filename]
        with _open(path, within) as file:
            return base + data_offset(file, info, path, ends)

    return TorchFile(path, tree, locate, text)


def _open(place: str | Location, within: tuple[int, int] | None) -> BinaryIO:
    file = storage.open_binary(place)
    return cast(BinaryIO, _Part(file, *(within or (0, file.seek(0, io.SEEK_END)))))


class _Part(io.RawIOBase):
    """A part of a file as if it were a file, read in sips no longer than a zip directory may be."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("it begins before its beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        size = left if size < 0 else size
        if size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        self._file.seek(self._start + self._at)
        data = self._file.read(min(size, left))
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


_DAMAGE = (  # what zipfile raises
    zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError,
    struct.error,
)  # fmt: skip


def _packed(
    file: BinaryIO, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], path: str
) -> dict[str, int]:
    """Where entries begin, as far as their neighbours tell: each local header is a request.

    ``torch.save`` leaves no room between entries and begins each at a multiple of 64 bytes; a file
    counts as its own if that holds of its pickle, whose local header is read.
    """
    ends = _ends(archive)
    found: dict[str, int] = {}
    for info in archive.infolist():
        least = info.header_offset + _LOCAL_HEADER + len(info.orig_filename.encode())
        descriptor = (24 if info.file_size >> 32 else 16) if info.flag_bits & 8 else 0
        start = ends[info.filename] - descriptor - info.file_size
        if start % _ALIGNMENT == 0 and least <= start < least + 2 * _ALIGNMENT:
            found[info.filename] = start
    pickle = entries["data.pkl"]
    return found if found.get(pickle.filename) == data_offset(file, pickle, path) else {}


def _entry_of(
    path: str, entries: Mapping[str, zipfile.ZipInfo], stored: Storage
) -> zipfile.ZipInfo:
    """The entry of a storage, checked."""
    info = entries.get(f"data/{stored.key}")
    if info is None:
        raise damaged(path, f"the storage {stored.key!r} is missing")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise damaged(path, "its tensors are compressed, which torch.save never does")
    element = stored.dtype.size if stored.dtype else 1
    if stored.numel * element > info.file_size:
        raise damaged(path, f"the storage {stored.key!r} is shorter than it claims")
    return info


def storages(path: str) -> list[zipfile.ZipInfo]:
    """The entries that hold storages, as they lie; none in other files and where CRCs lack."""
    with _open(path, None) as file:
        if not zipfile.is_zipfile(file):
            return []
        with zipfile.ZipFile(file) as archive:
            found = [info for info in archive.infolist() if "/data/" in info.filename]
    found.sort(key=lambda info: info.header_offset)
    return found if any(info.CRC for info in found) else []


def damaged_entries(path: str) -> list[str] | None:
    """The entries of a file that do not have the CRC-32 that its directory tells.

    Returns:
        Their names; None where there is nothing to compare: in other files, and where torch was
        told to omit the checksums.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        with _open(path, None) as file:
            if not file.read(4).startswith(b"PK\x03\x04"):
                return None
            archive = zipfile.ZipFile(file)
            infos = [i for i in archive.infolist() if i.compress_type == zipfile.ZIP_STORED]
            if not any(info.CRC for info in infos):
                return None
            return [info.filename for info in infos if _crc(file, info, path) != info.CRC]
    except _DAMAGE as error:
        raise damaged(path, _why(path, error)) from error


def _crc(file: BinaryIO, info: zipfile.ZipInfo, path: str) -> int:
    """The CRC-32 of a stored entry."""
    file.seek(data_offset(file, info, path))
    crc, left = 0, info.file_size
    while left:
        content = file.read(min(left, _CHUNK))
        if not content:
            raise EOFError(f"{info.filename!r} is cut short")
        crc, left = zlib.crc32(content, crc), left - len(content)
    return crc


def looks_like(start: bytes) -> bool:
    """Whether a file that begins so was written by ``torch.save``."""
    return start.startswith((b"PK\x03\x04", torch_legacy.START[:8]))


def damaged(path: str | Location, why: str) -> CheckpointError:
    """The error for a file that cannot be read as a checkpoint."""
    return CheckpointError(
        f"{path} is not a readable checkpoint: {why}",
        "It may be truncated or still being written; copy it again or leave it out.",
    )


def data_offset(
    file: Any, info: zipfile.ZipInfo, path: str, ends: Mapping[str, int] | None = None
) -> int:
    """Where the bytes of a stored zip entry begin, by its local header.

    Args:
        file: The archive.
        info: The entry, as the directory has it.
        path: Of the file, for messages.
        ends: Where each entry has to end, by its name; where the file does if None.

    Raises:
        CheckpointError: The local header contradicts the directory.
    """
    end = file.seek(0, 2)
    if not 0 <= info.header_offset <= end - _LOCAL_HEADER:
        raise damaged(path, f"the zip entry {info.filename!r} lies outside the file")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
        raise damaged(path, f"the zip entry {info.filename!r} has no header")
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER + name_length + extra_length
    if start + info.file_size > end:
        raise damaged(path, f"the zip entry {info.filename!r} runs past the end of the file")
    if ends is not None and start + info.file_size > ends[info.filename]:
        raise damaged(path, f"the zip entry {info.filename!r} runs into the next one")
    if not _agrees(info, header, file.read(name_length)):
        raise damaged(path, f"the zip entry {info.filename!r} contradicts the zip's directory")
    return start


def _agrees(info: zipfile.ZipInfo, header: bytes, name: bytes) -> bool:
    """Whether a local header says the same as the directory: readers differ in which they trust."""
    flags = int.from_bytes(header[6:8], "little")
    size = int.from_bytes(header[18:22], "little")
    encoding = "utf-8" if info.flag_bits & _UTF8 else "cp437"
    same_size = flags & _SIZES_FOLLOW or size in (info.compress_size, _ELSEWHERE)
    return bool(same_size) and name == info.orig_filename.encode(encoding)


def _ends(archive: zipfile.ZipFile) -> dict[str, int]:
    """Where each entry has to end: where the next one begins, or the directory."""
    ordered = sorted(archive.infolist(), key=lambda info: info.header_offset)
    begins = [*(info.header_offset for info in ordered[1:]), archive.start_dir]
    return {info.filename: end for info, end in zip(ordered, begins, strict=True)}


def _content(file: Any, info: zipfile.ZipInfo, path: str) -> bytes:
    """The bytes of a stored entry. Checksums are not looked at: torch can be told to omit them."""
    file.seek(data_offset(file, info, path))
    content: bytes = file.read(info.file_size)
    return content


def _entries(path: str, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The archive's entries without the folder inside it that holds them all."""
    names = [info.filename for info in infos]
    pickles = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    if not pickles:
        raise damaged(path, "it is a zip file, but not one of torch.save")
    prefix = pickles[0][: -len("data.pkl")]
    if prefix + "constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript archive, not a checkpoint",
            "Save the module's state_dict() with torch.save and average that.",
        )
    if len(set(names)) < len(names):
        raise damaged(path, "two of its zip entries have one name")
    return {i.filename[len(prefix) :]: i for i in infos if i.filename.startswith(prefix)}


def _check_entries(path: str, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    """Refuse what could mislead: a huge or compressed pickle, entries that share bytes."""
    for read in filter(None, (entries["data.pkl"], entries.get(PROVENANCE_RECORD))):
        if read.file_size > inert_pickle.MAX_PICKLE:
            raise damaged(path, f"{read.filename!r} claims {read.file_size} bytes")
        if read.compress_type != zipfile.ZIP_STORED:
            raise damaged(path, f"{read.filename!r} is compressed, which torch.save never does")
    if any(info.flag_bits & _ENCRYPTED for info in entries.values()):
        raise damaged(path, "it is encrypted, which torch.save never does")
    ordered = sorted(entries.values(), key=lambda info: info.header_offset)
    for before, after in pairwise(ordered):
        least = before.header_offset + _LOCAL_HEADER + before.compress_size
        if least > after.header_offset:
            raise damaged(path, f"the zip entries {before.filename!r} and its neighbour overlap")


def _why(path: str, error: Exception) -> str:
    with storage.open_binary(path) as file:
        start = file.read(16)
    if start.startswith(b"PK\x03\x04"):
        return f"a zip file cut short or damaged ({error})"
    return f"{error}"
