"""Whether two checkpoints hold the same weights, found out by reading as little as possible."""

from __future__ import annotations

import bisect
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ckptavg.formats import storage, torch_zip
from ckptavg.formats.table import Checkpoint, Piece, Tensor

_HEAD = 4096  # bytes of each tensor that are looked at first: most differ there already
_BLOCK = 1 << 20


def same_weights(one: Checkpoint, other: Checkpoint, sums: Checksums) -> bool:
    """Whether two checkpoints hold the same tensors, whatever else their files hold.

    Args:
        one: A checkpoint.
        other: Another one.
        sums: The checksums that zip files keep; where they do not tell, every byte is compared.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if one.tensors.keys() != other.tensors.keys() or one.refused != other.refused:
        return False
    if _is_said_to_be_the_same(one, other):
        return True
    pairs: dict[tuple[_Range, _Range], None] = {}
    for name, tensor in one.tensors.items():
        ranges = _ranges(tensor, other.tensors[name])
        if ranges is None:
            return False
        pairs.update(dict.fromkeys(ranges))
    undecided: list[tuple[_Range, _Range]] = []
    for pair in pairs:
        equal = sums.tell(*pair)
        if equal is False:
            return False
        undecided += [pair] if equal is None else []
    return _same_bytes(undecided, _HEAD) and _same_bytes(undecided, None)


def _is_said_to_be_the_same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether a remote store knows the files to be the same."""
    contents = [[storage.content_of(s.token) for s in c.files] for c in (one, other)]
    return all(contents[0]) and contents[0] == contents[1]


@dataclass(frozen=True, slots=True)
class _Range:
    """The bytes that a piece of a tensor spans in its file."""

    file: str
    start: int
    size: int


def _ranges(one: Tensor, other: Tensor) -> list[tuple[_Range, _Range]] | None:
    """What has to be equal for two tensors to be; None where they are not laid out alike."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return None
    if [_form(piece) for piece in one.pieces] != [_form(piece) for piece in other.pieces]:
        return None
    size = one.dtype.size
    return [
        (_Range(a.file, a.offset, _span(a) * size), _Range(b.file, b.offset, _span(b) * size))
        for a, b in zip(one.pieces, other.pieces, strict=True)
        if 0 not in a.shape
    ]


def _form(piece: Piece) -> object:
    """Equal for pieces whose elements follow each other alike: some strides mean nothing."""
    strides = [s for n, s in zip(piece.shape, piece.stride, strict=True) if n > 1]
    return piece.shape, piece.start, [] if 0 in piece.shape else strides


def _span(piece: Piece) -> int:
    """Elements from a piece's first to its last, in the file."""
    return 1 + sum((n - 1) * s for n, s in zip(piece.shape, piece.stride, strict=True))


class Checksums:
    """The checksums in zip files. Of each file the directory is read once."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[list[int], list[zipfile.ZipInfo]]] = {}
        self._starts: dict[tuple[str, int], int] = {}

    def tell(self, one: _Range, other: _Range) -> bool | None:
        """Whether two ranges are equal; None where the checksums do not tell."""
        a, b = self._storage(one), self._storage(other)
        if a is None or b is None:
            return None
        if a == b:
            return True
        whole = a[:2] == (0, one.size) and b[:2] == (0, other.size)
        return False if whole else None

    def _storage(self, part: _Range) -> tuple[int, int, int] | None:
        """Where in its storage a range begins, and the storage's size and checksum."""
        if part.file not in self._entries:
            found = torch_zip.storages(part.file)
            self._entries[part.file] = [info.header_offset for info in found], found
        offsets, entries = self._entries[part.file]
        i = bisect.bisect_right(offsets, part.start) - 1
        if i < 0:
            return None
        key, info = (part.file, i), entries[i]
        if key not in self._starts:
            with storage.open_binary(part.file) as file:
                self._starts[key] = torch_zip.data_offset(file, info, part.file)
        within = part.start - self._starts[key]
        fits = within >= 0 and within + part.size <= info.file_size
        return (within, info.file_size, info.CRC) if fits else None


def _same_bytes(pairs: Iterable[tuple[_Range, _Range]], limit: int | None) -> bool:
    """Whether the ranges of each pair are equal, or begin with equal bytes."""
    for one, other in pairs:
        blocks = zip(_blocks(one, limit), _blocks(other, limit), strict=True)
        if any(a != b for a, b in blocks):
            return False
    return True


def _blocks(part: _Range, limit: int | None) -> Iterator[bytes]:
    size = part.size if limit is None else min(part.size, limit)
    with storage.open_binary(part.file) as file:
        file.seek(part.start)
        for done in range(0, size, _BLOCK):
            yield file.read(min(_BLOCK, size - done))
