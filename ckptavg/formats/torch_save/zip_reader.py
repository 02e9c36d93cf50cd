"""Reader of ``torch.save`` files: the pickle read inertly, the storages as byte ranges."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from ckptavg.errors import CheckpointError
from ckptavg.errors.printable import size_text
from ckptavg.errors.system import guard_reads
from ckptavg.formats import foreign
from ckptavg.formats.checkpoint import Guard, Piece, Tensor
from ckptavg.formats.damage import cut_short, damaged
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.arrays import name_arrays
from ckptavg.formats.safe_pickle.values import MalformedPickle, Storage, TensorView
from ckptavg.formats.torch_save import legacy_reader, zip_directory
from ckptavg.formats.torch_save.zip_directory import (
    LOCAL_HEADER,
    CutShort,
    Directory,
    Entry,
    MalformedZip,
)
from ckptavg.io import paths
from ckptavg.io.paths import Location

# Entry of the zip for the provenance, since a bare state dict has no room for it.
PROVENANCE_RECORD = "ckptavg.json"
START = b"PK\x03\x04"
# Bytes of an entry that are read at a time.
_CHUNK = 2**20
# Exceptions that reading a damaged zip file raises.
_DAMAGE = (MalformedZip, UnicodeDecodeError)
# Bytes. torch.save begins each entry at a multiple of this.
_ALIGNMENT = 64
_NUMBERS = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i",
    "int16": "h", "int8": "b", "uint8": "B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Place:
    """Offset of a storage in a file, with a guard to check where the offset is a guess."""

    offset: int
    guard: Guard | None = None


@dataclass
class TorchFile:
    """An opened ``torch.save`` file.

    Attributes:
        path: The file.
        tree: The saved object, as plain values; tensors as ``TensorView`` or ``Refused``.
        provenance: Record of how ckptavg made the file, as JSON, if stored beside the object.
        arrays: True if the tensors are NumPy arrays.
    """

    path: str
    tree: Any
    _locate: Callable[[Storage], _Place] = field(repr=False)
    provenance: str | None = None
    arrays: bool = False
    _places: dict[Storage, _Place] = field(default_factory=dict, repr=False)

    def tensor(self, view: TensorView) -> Tensor:
        """Return the table entry of a tensor in the tree.

        Raises:
            CheckpointError: The storage is missing from the file, compressed or too short.
        """
        stored = view.storage
        if stored not in self._places:
            self._places[stored] = self._locate(stored)
        location, text = self._places[stored], None
        start = view.offset * view.dtype.size
        if stored.span is not None and stored.span.escaped:
            text = location.offset, stored.span.length
        else:
            start += location.offset
        # Strides without meaning are set to 0, so that equal tensors compare equal.
        empty = 0 in view.shape
        stride = tuple(
            0 if empty or n == 1 else s for n, s in zip(view.shape, view.stride, strict=True)
        )
        first = (0,) * len(view.shape)
        piece = Piece(self.path, start, view.shape, stride, first, location.guard, text)
        return Tensor(view.dtype, view.shape, (piece,))

    def number(self, view: TensorView) -> float | None:
        """Read the value of a 0-d tensor; None where the value is no number, or missing."""
        code = _NUMBERS.get(view.dtype.name)
        try:
            piece = self.tensor(view).pieces[0]
        except CheckpointError:
            return None
        if code is None or piece.text is not None:
            return None
        with paths.open_binary(self.path) as file:
            if piece.guard:
                file.seek(piece.guard.offset)
                if file.read(len(piece.guard.content)) != piece.guard.content:
                    return None
            file.seek(piece.offset)
            raw = file.read(view.dtype.size)
        # A bfloat16 is the upper half of a float32.
        if view.dtype.name == "bfloat16":
            raw = bytes(2) + raw
        value: float = struct.unpack("<" + code, raw)[0]
        return value


def read(place: str | Location, within: tuple[int, int] | None = None) -> TorchFile:
    """Open a ``torch.save`` file: read the directory and the pickle, but no tensor data.

    Args:
        place: The file.
        within: Offset and length, in bytes, of the ``torch.save`` file in ``place``; None where
            all of ``place`` is the file.

    Raises:
        CheckpointError: The file is damaged, or of another kind.
    """
    path = str(place)
    try:
        with _open(place, within) as file:
            if within is None and legacy_reader.looks_like(file.read(legacy_reader.HEAD)):
                old = legacy_reader.read(place, file.seek(0, io.SEEK_END))
                return TorchFile(path, old.tree, lambda s: _Place(old.offset(s)), arrays=old.arrays)
            archive = _Archive.of(path, file)
            archive.check_byte_order(file)
            tree = unpickler.loads(archive.content(file, "data.pkl"))
            arrays = name_arrays(tree)
            has_provenance = PROVENANCE_RECORD in archive.entries
            text = archive.content(file, PROVENANCE_RECORD).decode() if has_provenance else None
            # Local headers are read only from local files: on a URL each costs a request.
            guesses = archive.guess_starts(file) if paths.is_url(path) else {}
    except MalformedPickle as error:
        raise damaged(path, f"its pickle is malformed: {error}") from error
    except CutShort as error:
        raise cut_short(path, f"a zip file cut short ({error})") from error
    except _DAMAGE as error:
        raise damaged(path, str(error)) from error
    base = within[0] if within else 0

    def locate(stored: Storage) -> _Place:
        """Find the place of a storage in the file."""
        try:
            # The contents of a NumPy array are stored in the pickle itself.
            if stored.span is not None:
                with _open(place, within) as file:
                    pickled = archive.offset(file, archive.entries["data.pkl"])
                return _Place(base + pickled + stored.span.start)
            entry = archive.storage(stored)
            if start := guesses.get(entry.name):
                return _Place(base + start, _guard(entry, start, base))
            with _open(place, within) as file:
                return _Place(base + archive.offset(file, entry))
        except _DAMAGE as error:
            raise damaged(path, str(error)) from error

    return TorchFile(path, tree, locate, text, arrays)


def _open(place: str | Location, within: tuple[int, int] | None) -> BinaryIO:
    """Open a file, or a part of a file, with limits on reads."""
    file = paths.open_binary(place)
    return cast(BinaryIO, _Part(file, *(within or (0, file.seek(0, io.SEEK_END)))))


class _Part(io.RawIOBase):
    """View of a part of a file as a file, with a limit on the bytes per read."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._at = 0

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset within the part.

        Args:
            offset: Number of bytes from ``whence``.
            whence: ``io.SEEK_SET``, ``io.SEEK_CUR`` or ``io.SEEK_END``.

        Returns:
            The position within the part.
        """
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise MalformedZip("it begins before its beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        """Return the position within the part."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes; all that are left where negative."""
        remaining = max(self._length - self._at, 0)
        size = remaining if size < 0 else size
        if size > zip_directory.MAX_DIRECTORY:
            raise MalformedZip(f"a part of it claims {size} bytes")
        self._file.seek(self._start + self._at)
        data = self._file.read(min(size, remaining))
        self._at += len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@dataclass(frozen=True)
class _Archive:
    """A zip file of ``torch.save``.

    Attributes:
        path: The file.
        entries: Name without the common folder of the archive → entry.
        ends: Whole name of an entry → offset before which the entry has to end.
    """

    path: str
    entries: Mapping[str, Entry]
    ends: Mapping[str, int]

    @classmethod
    def of(cls, path: str, file: BinaryIO) -> _Archive:
        """Read the directory of a file.

        Raises:
            MalformedZip: The file is damaged, or ``torch.save`` did not write it.
            CheckpointError: The file is an archive of another kind.
        """
        directory = _directory(file)
        names = [entry.name for entry in directory.entries]
        prefix = names[0].partition("/")[0] + "/" if names else ""
        if stranger := foreign.identify_archive(names):
            raise stranger.refusal(path)
        if prefix + "data.pkl" not in names:
            raise MalformedZip("it is a zip file, but not one of torch.save")
        entries = {e.name[len(prefix) :]: e for e in directory.entries if e.name.startswith(prefix)}
        return cls(path, entries, directory.ends())

    def check_byte_order(self, file: BinaryIO) -> None:
        """Refuse a file whose numbers are big-endian.

        Raises:
            CheckpointError: The numbers are big-endian.
        """
        order = self.entries.get("byteorder")
        if order and order.size == len("big") and self.content(file, "byteorder") == b"big":
            raise CheckpointError(
                f"{self.path} was saved on a big-endian machine", "Load and save it on this one."
            )

    def content(self, file: BinaryIO, name: str) -> bytes:
        """Read the bytes of a small entry.

        Checksums are not compared, since torch can be set to omit them.

        Raises:
            MalformedZip: The entry is compressed.
            CheckpointError: The entry is larger than a pickle may be.
        """
        entry = self.entries[name]
        if entry.size > unpickler.MAX_PICKLE and not entry.stored:
            raise MalformedZip(f"{entry.name!r} claims {entry.size} bytes")
        if entry.size > unpickler.MAX_PICKLE:
            raise CheckpointError(
                f"{self.path} has {size_text(entry.size)} in {entry.name!r}, of which at most "
                f"{size_text(unpickler.MAX_PICKLE)} are read: NumPy's arrays lie there, torch's "
                "tensors do not",
                "Load it, and save torch.from_numpy of each array in its place.",
            )
        if not entry.stored:
            raise MalformedZip(f"{entry.name!r} is compressed, which torch.save never does")
        file.seek(self.offset(file, entry))
        return file.read(entry.size)

    def offset(self, file: BinaryIO, entry: Entry) -> int:
        """Return the offset of an entry's first byte.

        Raises:
            MalformedZip: The local header contradicts the directory.
        """
        return _data_offset(file, entry, self.ends[entry.name])

    def storage(self, stored: Storage) -> Entry:
        """Return the entry of a storage after checks of presence, compression and size.

        Raises:
            MalformedZip: The entry is missing, compressed, or of another size.
        """
        entry = self.entries.get(f"data/{stored.key}")
        if entry is None:
            raise MalformedZip(f"the storage {stored.key!r} is missing")
        if not entry.stored:
            raise MalformedZip("its tensors are compressed, which torch.save never does")
        nbytes = stored.numel * (stored.dtype.size if stored.dtype else 1)
        if nbytes != entry.size:
            differs = "shorter" if nbytes > entry.size else "longer"
            raise MalformedZip(f"the storage {stored.key!r} is {differs} than it claims")
        return entry

    def guess_starts(self, file: BinaryIO) -> dict[str, int]:
        """Guess the first byte of each entry from the offsets of the neighbours.

        On a remote file each local header would cost a request. ``torch.save`` leaves no room
        between entries and begins each entry at a multiple of 64 bytes. The guess is used only if
        it is right for the pickle, whose local header is read.

        Returns:
            Whole name of an entry → offset in bytes; empty where the guess is not used.

        Raises:
            MalformedZip: That local header contradicts the directory.
        """
        starts: dict[str, int] = {}
        for entry in self.entries.values():
            least = _header_end(entry)
            follows = entry.flags & zip_directory.SIZES_FOLLOW
            # A data descriptor behind the contents repeats CRC and sizes (64-bit above 4 GiB).
            descriptor = (24 if entry.size >> 32 else 16) if follows else 0
            start = self.ends[entry.name] - descriptor - entry.size
            if start % _ALIGNMENT == 0 and least <= start < least + 2 * _ALIGNMENT:
                starts[entry.name] = start
        pickle = self.entries["data.pkl"]
        return starts if starts.get(pickle.name) == self.offset(file, pickle) else {}


def _directory(file: BinaryIO) -> Directory:
    """Read the directory of a whole zip file."""
    return zip_directory.read_directory(file, file.seek(0, io.SEEK_END))


def _guard(entry: Entry, start: int, base: int) -> Guard:
    """Make a guard: the lengths in the local header of an entry that begins at ``start``."""
    offset, lengths = zip_directory.lengths_before(entry, start)
    return Guard(base + offset, lengths)


def _header_end(entry: Entry) -> int:
    """Return the offset behind the name in a local header with the directory's name."""
    return entry.header + LOCAL_HEADER + len(entry.raw_name)


def _data_offset(file: BinaryIO, entry: Entry, end: int) -> int:
    """Read an entry's local header, and return the offset of the contents."""
    file.seek(entry.header)
    header = file.read(_header_end(entry) - entry.header)
    return zip_directory.data_offset(entry, header, end)


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """Entry that holds a storage, and the offset before which the bytes have to end."""

    entry: Entry
    end: int

    def start(self, path: str) -> int:
        """Return the offset of the storage's first byte in the file.

        Raises:
            CheckpointError: The file cannot be read, or the local header contradicts the directory.
        """
        try:
            with guard_reads(path), _open(path, None) as file:
                return _data_offset(file, self.entry, self.end)
        except _DAMAGE as error:
            raise damaged(path, str(error)) from error


def storages(path: str) -> list[StoredEntry]:
    """List the entries that hold storages, in the order of the file.

    The list is empty where the file is not one archive with checksums.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with guard_reads(path), _open(path, None) as file:
        directory = _checked_directory(file)
    if directory is None:
        return []
    ends = directory.ends()
    entries = [e for e in directory.entries if "/data/" in e.name and e.stored]
    # In file order, since callers search by offset.
    entries.sort(key=lambda entry: entry.header)
    return [StoredEntry(entry, ends[entry.name]) for entry in entries]


def damaged_entries(path: str) -> list[str] | None:
    """Find the entries of a file whose CRC-32 differs from the CRC-32 in the directory.

    Returns:
        Names of the entries; None where there is nothing to compare: in files that are no zip
        archive, and where torch was set to omit the checksums.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with _open(path, None) as file:
        directory = _checked_directory(file)
        if directory is None:
            return None
        ends = directory.ends()
        entries = [entry for entry in directory.entries if entry.stored]
        try:
            return [e.name for e in entries if _crc(file, e, ends[e.name]) != e.crc]
        except _DAMAGE as error:
            raise damaged(path, str(error)) from error


def _checked_directory(file: BinaryIO) -> Directory | None:
    """Read the directory of a zip file with checksums; None for any other file."""
    try:
        directory = _directory(file)
    except _DAMAGE:
        return None
    return directory if any(entry.crc for entry in directory.entries if entry.stored) else None


def _crc(file: BinaryIO, entry: Entry, end: int) -> int:
    """Compute the CRC-32 of a stored entry."""
    file.seek(_data_offset(file, entry, end))
    crc, remaining = 0, entry.size
    while remaining:
        content = file.read(min(remaining, _CHUNK))
        if not content:
            raise MalformedZip(f"{entry.name!r} is cut short")
        crc, remaining = zlib.crc32(content, crc), remaining - len(content)
    return crc


def looks_like(start: bytes) -> bool:
    """Return True if the first bytes are those of a ``torch.save`` file or a zip file."""
    return start.startswith(START) or legacy_reader.looks_like(start)
