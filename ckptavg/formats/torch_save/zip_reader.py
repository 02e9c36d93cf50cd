"""Reader of ``torch.save`` files: the pickle read inertly, the storages as byte ranges."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats.checkpoint import Guard, Piece, Tensor
from ckptavg.formats.damage import cut_short, damaged
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.arrays import name_arrays
from ckptavg.formats.safe_pickle.values import MalformedPickle, Storage, TensorView
from ckptavg.formats.torch_save import legacy_reader, zip_directory
from ckptavg.formats.torch_save.saved_archive import SavedArchive
from ckptavg.formats.torch_save.zip_directory import CutShort, Entry, FileSlice, MalformedZip
from ckptavg.io import paths
from ckptavg.io.paths import Location

# Entry of the zip for the provenance, since a bare state dict has no room for it.
PROVENANCE_RECORD = "ckptavg.json"
START = b"PK\x03\x04"
# Exceptions that reading a damaged zip file raises.
_DAMAGE = (MalformedZip, UnicodeDecodeError)
_NUMBERS = {
    "float64": "d", "float32": "f", "float16": "e", "bfloat16": "f", "int64": "q", "int32": "i",
    "int16": "h", "int8": "b", "uint8": "B",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _StoragePlace:
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
    _locate: Callable[[Storage], _StoragePlace] = field(repr=False)
    provenance: str | None = None
    arrays: bool = False
    _places: dict[Storage, _StoragePlace] = field(default_factory=dict, repr=False)

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
        first = (0,) * len(view.shape)
        stride = _meaningful_strides(view)
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


def _meaningful_strides(view: TensorView) -> tuple[int, ...]:
    """Return the strides of a tensor, with 0 where a stride has no meaning.

    Equal tensors then compare equal.
    """
    strides = list(view.stride)
    for i, extent in enumerate(view.shape):
        if extent == 1 or 0 in view.shape:
            strides[i] = 0
    return tuple(strides)


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
        with FileSlice(paths.open_binary(place), within) as file:
            if within is None and legacy_reader.looks_like(file.read_at(0, legacy_reader.HEAD)):
                return _read_legacy(place, file.length)
            archive = SavedArchive.of(path, file)
            archive.check_byte_order(file)
            tree = unpickler.loads(archive.content(file, "data.pkl"))
            arrays = name_arrays(tree)
            provenance = None
            if PROVENANCE_RECORD in archive.entries:
                provenance = archive.content(file, PROVENANCE_RECORD).decode()
            # Local headers are read only from local files: on a URL each costs a request.
            guesses = archive.guess_starts(file) if paths.is_url(path) else {}
    except MalformedPickle as error:
        raise damaged(path, f"its pickle is malformed: {error}") from error
    except CutShort as error:
        raise cut_short(path, f"a zip file cut short ({error})") from error
    except _DAMAGE as error:
        raise damaged(path, str(error)) from error
    locator = _StorageLocator(place, within, archive, guesses)
    return TorchFile(path, tree, locator.locate, provenance, arrays)


def looks_like(start: bytes) -> bool:
    """Return True if the first bytes are those of a ``torch.save`` file or a zip file."""
    return start.startswith(START) or legacy_reader.looks_like(start)


def _read_legacy(place: str | Location, size: int) -> TorchFile:
    """Open a file of ``torch.save`` before version 1.6."""
    saved = legacy_reader.read(place, size)

    def locate(stored: Storage) -> _StoragePlace:
        """Find the place of a storage in the file."""
        return _StoragePlace(saved.offset(stored))

    return TorchFile(str(place), saved.tree, locate, arrays=saved.arrays)


@dataclass(frozen=True)
class _StorageLocator:
    """Finder of the storages of an archive.

    Attributes:
        place: The file.
        within: As for ``read``.
        archive: The archive in the file.
        guesses: Whole name of an entry → guessed offset of the contents in the archive.
    """

    place: str | Location
    within: tuple[int, int] | None
    archive: SavedArchive
    guesses: Mapping[str, int]

    def locate(self, stored: Storage) -> _StoragePlace:
        """Find the place of a storage in the file.

        Raises:
            CheckpointError: The storage is missing, or the archive is damaged.
        """
        base = self.within[0] if self.within else 0
        try:
            # The contents of a NumPy array are stored in the pickle itself.
            if stored.span is not None:
                pickled = self._read_offset(self.archive.entries["data.pkl"])
                return _StoragePlace(base + pickled + stored.span.start)
            entry = self.archive.storage(stored)
            if start := self.guesses.get(entry.name):
                offset, lengths = zip_directory.lengths_before(entry, start)
                return _StoragePlace(base + start, Guard(base + offset, lengths))
            return _StoragePlace(base + self._read_offset(entry))
        except MalformedZip as error:
            raise damaged(self.place, str(error)) from error

    def _read_offset(self, entry: Entry) -> int:
        """Read the offset of an entry's contents from the local header."""
        with FileSlice(paths.open_binary(self.place), self.within) as file:
            return self.archive.offset(file, entry)
