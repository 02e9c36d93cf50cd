"""Reader for files of ``torch.save`` before version 1.6.

Such a file is several pickles, followed by all storages in a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ckptavg.errors import CheckpointError
from ckptavg.formats.damage import cut_short
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.arrays import name_arrays
from ckptavg.formats.safe_pickle.values import MalformedPickle, PickleCutShort, Storage
from ckptavg.io.paths import Location, is_url, open_binary

_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLED_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# The beginning under pickle protocol 2. Later protocols put a frame between the two parts.
START = b"\x80\x02" + _PICKLED_MAGIC
# Bytes at the beginning that suffice to recognize such a file.
HEAD = 32
_PROTOCOL = 1001


def looks_like(start: bytes) -> bool:
    """Return True if the first bytes are those of a ``torch.save`` file before version 1.6."""
    framed = start[:1] == b"\x80" and _PICKLED_MAGIC in start[:HEAD]
    return framed or (START.startswith(start[: len(START)]) and len(start) > 2)


@dataclass(frozen=True)
class LegacyFile:
    """Contents of a ``torch.save`` file before version 1.6.

    Attributes:
        tree: The saved object.
        pickle_start: Byte offset of the pickle of the object.
        offsets: Key of a storage → byte offset of the elements.
        arrays: True if the tensors are NumPy arrays.
    """

    tree: Any
    pickle_start: int
    offsets: Mapping[str, int]
    arrays: bool

    def offset(self, stored: Storage) -> int:
        """Return the byte offset of a storage's elements."""
        if stored.span is not None:
            return self.pickle_start + stored.span.start
        return self.offsets[stored.key]


def read(place: str | Location, size: int) -> LegacyFile:
    """Read the pickles and find the storages; no tensor data is moved.

    Args:
        place: The file.
        size: Size of the file in bytes.

    Raises:
        MalformedPickle: A pickle or the row of storages is damaged.
        CheckpointError: The file ends too early, or was saved on a machine of the other byte order.
    """
    try:
        return _read(place, size)
    except PickleCutShort as error:
        raise cut_short(place, f"it ends within its pickles or storages: {error}") from error


def _read(place: str | Location, size: int) -> LegacyFile:
    with open_binary(place) as file:
        # Three small pickles come first, and then the object.
        magic, protocol, system = (unpickler.load(file)[0] for _ in range(3))
        if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
            raise MalformedPickle("its protocol is unknown")
        if system.get("little_endian") is not True:
            raise CheckpointError(
                f"{place} was saved on a big-endian machine", "Load and save it on this one."
            )
        start = file.tell()
        tree, storages = unpickler.load(file)
        keys, _ = unpickler.load(file)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise MalformedPickle("its list of storages is malformed")
        counted = not is_url(str(place))
        offsets = _locate(file, size, keys, storages, counted=counted)
        return LegacyFile(tree, start, offsets, name_arrays(tree))


def _locate(
    file: BinaryIO, size: int, keys: list[str], storages: dict[str, Storage], *, counted: bool
) -> dict[str, int]:
    """Find the offset of each storage in the row after the pickles.

    A storage is its number of elements (8 bytes), followed by the bytes of the elements.

    Args:
        file: The file, positioned behind the last pickle.
        size: Size of the file in bytes.
        keys: Keys of the storages, in the order of the row.
        storages: Key → storage, as the pickle describes it.
        counted: True to read and compare the numbers of elements. On a remote file each number
            would cost a request. There it is enough that the storages end where the file ends.
    """
    offsets: dict[str, int] = {}
    position = file.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in offsets:
            raise MalformedPickle("its list of storages does not fit its tensors")
        count = storage.numel
        if counted:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little", signed=True)
        end = position + 8 + storage.nbytes
        if count != storage.numel or end > size:
            raise PickleCutShort(f"the storage {key!r} runs past the end of the file")
        offsets[key] = position + 8
        position = end
    if offsets.keys() != storages.keys() or position != size:
        raise MalformedPickle("its storages do not end where the file does")
    return offsets
