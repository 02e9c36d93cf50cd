"""What ``torch.save`` wrote before version 1.6: several pickles, then the storages in a row."""

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
START = b"\x80\x02" + _PICKLED_MAGIC  # as protocol 2 begins; later ones put a frame between
HEAD = 32  # bytes that tell such a file
_PROTOCOL = 1001


def looks_like(start: bytes) -> bool:
    """Tell a file of ``torch.save`` before version 1.6 by its beginning."""
    framed = start[:1] == b"\x80" and _PICKLED_MAGIC in start[:HEAD]
    return framed or (START.startswith(start[: len(START)]) and len(start) > 2)


@dataclass(frozen=True)
class LegacyFile:
    """What such a file holds.

    Attributes:
        tree: What was saved.
        pickle_start: Byte offset of its pickle.
        offsets: Byte offset of each storage by its key.
        arrays: Whether its tensors are NumPy arrays.
    """

    tree: Any
    pickle_start: int
    offsets: Mapping[str, int]
    arrays: bool

    def offset(self, stored: Storage) -> int:
        """Byte offset of a storage's elements."""
        if stored.span is not None:
            return self.pickle_start + stored.span.start
        return self.offsets[stored.key]


def read(place: str | Location, size: int) -> LegacyFile:
    """Read the pickles and find the storages; no tensor data is moved.

    Args:
        place: The file.
        size: Its size in bytes.

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
    """Walk the row of storages: each is its number of elements, then their bytes.

    Where every number would be a request of its own, they are not ``counted``: it has to do that
    the storages end where the file does.
    """
    found: dict[str, int] = {}
    position = file.tell()
    for key in keys:
        storage = storages.get(key)
        if storage is None or key in found:
            raise MalformedPickle("its list of storages does not fit its tensors")
        count = storage.numel
        if counted:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little", signed=True)
        nbytes = storage.numel * (storage.dtype.size if storage.dtype else 1)
        if count != storage.numel or position + 8 + nbytes > size:
            raise PickleCutShort(f"the storage {key!r} runs past the end of the file")
        found[key] = position + 8
        position += 8 + nbytes
    if found.keys() != storages.keys() or position != size:
        raise MalformedPickle("its storages do not end where the file does")
    return found
