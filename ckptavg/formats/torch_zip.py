"""The files of ``torch.save``: the pickle read inertly, the storages as byte ranges."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats import inert_pickle, torch_legacy
from ckptavg.formats.inert_values import MalformedPickle, Storage, TensorView
from ckptavg.formats.table import Piece, Tensor

_LOCAL_HEADER = 30
_MAX_DIRECTORY = 64 * 2**20
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800  # flags of an entry
_ELSEWHERE = 0xFFFFFFFF  # a size that a zip64 field holds


@dataclass
class TorchFile:
    """An opened ``torch.save`` file.

    Attributes:
        path: The file.
        tree: What was saved, as plain values; tensors as ``TensorView`` or ``Refused``.
    """

    path: str
    tree: Any
    _locate: Callable[[Storage], int] = field(repr=False)
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


def read(path: str) -> TorchFile:
    """Open a ``torch.save`` file: its directory and its pickle, no tensor data.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    try:
        with _Sips(io.FileIO(path)) as file:
            if file.read(len(torch_legacy.START)) == torch_legacy.START:
                tree, offsets = torch_legacy.read(path, file.seek(0, 2))
                return TorchFile(path, tree, lambda storage: offsets[storage.key])
            entries = _entries(path, zipfile.ZipFile(file).infolist())
            _check_entries(path, entries)
            order = entries.get("byteorder")
            if order and order.file_size == 3 and _content(file, order, path) == b"big":
                raise CheckpointError(
                    f"{path} was saved on a big-endian machine", "Load and save it on this one."
                )
            tree = inert_pickle.loads(_content(file, entries["data.pkl"], path))
    except MalformedPickle as error:
        raise damaged(path, f"its pickle is malformed: {error}") from error
    except (*_DAMAGE, OSError) as error:
        raise damaged(path, _why(path, error)) from error
    return TorchFile(path, tree, lambda storage: _locate(path, entries, storage))


class _Sips(io.BufferedReader):
    """A file of which no more is read at once than a zip directory may be long."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At most ``size`` bytes."""
        if size is not None and size > _MAX_DIRECTORY:
            raise zipfile.BadZipFile(f"its directory claims {size} bytes")
        return super().read(size)


_DAMAGE = (  # what zipfile raises
    zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, ValueError,
    struct.error,
)  # fmt: skip


def _locate(path: str, entries: Mapping[str, zipfile.ZipInfo], storage: Storage) -> int:
    """Byte offset of a storage, after its zip entry has been checked."""
    info = entries.get(f"data/{storage.key}")
    if info is None:
        raise damaged(path, f"the storage {storage.key!r} is missing")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise damaged(path, "its tensors are compressed, which torch.save never does")
    element = storage.dtype.size if storage.dtype else 1
    if storage.numel * element > info.file_size:
        raise damaged(path, f"the storage {storage.key!r} is shorter than it claims")
    with open(path, "rb") as file:
        return data_offset(file, info, path)


def checksums(path: str | Path) -> list[tuple[str, int, int]] | None:
    """Name, size and CRC of every storage; None for other files and where CRCs were left out."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        found = [(i.filename, i.file_size, i.CRC) for i in archive.infolist()]
    storages = sorted((n.split("/", 1)[-1], s, c) for n, s, c in found if "/data/" in n)
    return storages if any(crc for _, _, crc in storages) else None


def looks_like(start: bytes) -> bool:
    """Whether a file that begins so was written by ``torch.save``."""
    return start.startswith((b"PK\x03\x04", torch_legacy.START[:8]))


def damaged(path: str | Path, why: str) -> CheckpointError:
    """The error for a file that cannot be read as a checkpoint."""
    return CheckpointError(
        f"{path} is not a readable checkpoint: {why}",
        "It may be truncated or still being written; copy it again or leave it out.",
    )


def data_offset(file: Any, info: zipfile.ZipInfo, path: str) -> int:
    """Where the bytes of a stored zip entry begin, by its local header.

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
    pickle = entries["data.pkl"]
    if pickle.file_size > inert_pickle.MAX_PICKLE:
        raise damaged(path, f"its pickle claims {pickle.file_size} bytes")
    if pickle.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, "its pickle is compressed, which torch.save never does")
    if any(info.flag_bits & _ENCRYPTED for info in entries.values()):
        raise damaged(path, "it is encrypted, which torch.save never does")
    ordered = sorted(entries.values(), key=lambda info: info.header_offset)
    for before, after in pairwise(ordered):
        least = before.header_offset + _LOCAL_HEADER + before.compress_size
        if least > after.header_offset:
            raise damaged(path, f"the zip entries {before.filename!r} and its neighbour overlap")


def _why(path: str, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(b"PK\x03\x04"):
        return f"a zip file cut short or damaged ({error})"
    return f"{error}"
