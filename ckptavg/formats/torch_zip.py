"""The files of ``torch.save``: the pickle read inertly, the storages as byte ranges."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, BinaryIO

from ckptavg.errors import CheckpointError
from ckptavg.formats import inert_pickle, storage, torch_legacy
from ckptavg.formats.inert_values import MalformedPickle, Storage, TensorView
from ckptavg.formats.storage import Location
from ckptavg.formats.table import Piece, Tensor

_LOCAL_HEADER = 30
_ALIGNMENT = 64  # of what torch.save stores


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
        piece = Piece(self.path, start, view.shape, view.stride, (0,) * len(view.shape))
        return Tensor(view.dtype, view.shape, (piece,))


def read(place: str | Location) -> TorchFile:
    """Open a ``torch.save`` file: its directory and its pickle, no tensor data.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    path = str(place)
    try:
        with storage.open_binary(place) as file:
            if file.read(len(torch_legacy.START)) == torch_legacy.START:
                tree, offsets = torch_legacy.read(place, file.seek(0, 2))
                return TorchFile(path, tree, lambda stored: offsets[stored.key])
            archive = zipfile.ZipFile(file)
            entries = _entries(path, archive.infolist())
            _check_entries(path, entries)
            starts = _packed(file, archive, entries, path) if storage.is_url(path) else {}
            order = entries.get("byteorder")
            if order and order.file_size == 3 and _content(file, order, path) == b"big":
                raise CheckpointError(
                    f"{path} was saved on a big-endian machine", "Load and save it on this one."
                )
            tree = inert_pickle.loads(_content(file, entries["data.pkl"], path))
    except MalformedPickle as error:
        raise damaged(path, f"its pickle is malformed: {error}") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise damaged(path, _why(path, error)) from error
    return TorchFile(path, tree, lambda stored: _locate(path, entries, stored, starts))


def _packed(
    file: BinaryIO, archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], path: str
) -> dict[str, int]:
    """Where entries begin, as far as their neighbours tell: each local header is a request.

    ``torch.save`` leaves no room between entries and begins each at a multiple of 64 bytes; a file
    counts as its own if that holds of its pickle, whose local header is read.
    """
    ordered = sorted(archive.infolist(), key=lambda info: info.header_offset)
    ends = [*(info.header_offset for info in ordered[1:]), archive.start_dir]
    found: dict[str, int] = {}
    for info, end in zip(ordered, ends, strict=True):
        least = info.header_offset + _LOCAL_HEADER + len(info.orig_filename.encode())
        descriptor = (24 if info.file_size >> 32 else 16) if info.flag_bits & 8 else 0
        start = end - descriptor - info.file_size
        if start % _ALIGNMENT == 0 and least <= start < least + 2 * _ALIGNMENT:
            found[info.filename] = start
    pickle = entries["data.pkl"]
    return found if found.get(pickle.filename) == data_offset(file, pickle, path) else {}


def _locate(
    path: str,
    entries: Mapping[str, zipfile.ZipInfo],
    stored: Storage,
    starts: Mapping[str, int],
) -> int:
    """Byte offset of a storage, after its zip entry has been checked."""
    info = entries.get(f"data/{stored.key}")
    if info is None:
        raise damaged(path, f"the storage {stored.key!r} is missing")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise damaged(path, "its tensors are compressed, which torch.save never does")
    element = stored.dtype.size if stored.dtype else 1
    if stored.numel * element > info.file_size:
        raise damaged(path, f"the storage {stored.key!r} is shorter than it claims")
    if info.filename in starts:
        return starts[info.filename]
    with storage.open_binary(path) as file:
        return data_offset(file, info, path)


def checksums(path: str | Location) -> list[tuple[str, int, int]] | None:
    """Name, size and CRC of every storage; None for other files and where CRCs were left out."""
    with storage.open_binary(path) as file:
        if not zipfile.is_zipfile(file):
            return None
        with zipfile.ZipFile(file) as archive:
            found = [(i.filename, i.file_size, i.CRC) for i in archive.infolist()]
    storages = sorted((n.split("/", 1)[-1], s, c) for n, s, c in found if "/data/" in n)
    return storages if any(crc for _, _, crc in storages) else None


def looks_like(start: bytes) -> bool:
    """Whether a file that begins so was written by ``torch.save``."""
    return start.startswith((b"PK\x03\x04", torch_legacy.START[:8]))


def damaged(path: str | Location, why: str) -> CheckpointError:
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
    return start


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
    return {i.filename[len(prefix) :]: i for i in infos if i.filename.startswith(prefix)}


def _check_entries(path: str, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    """Refuse what could mislead: a huge or compressed pickle, entries that share bytes."""
    pickle = entries["data.pkl"]
    if pickle.file_size > inert_pickle.MAX_PICKLE:
        raise damaged(path, f"its pickle claims {pickle.file_size} bytes")
    if pickle.compress_type != zipfile.ZIP_STORED:
        raise damaged(path, "its pickle is compressed, which torch.save never does")
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
