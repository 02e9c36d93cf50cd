"""Directory of a zip file, read as torch reads the entries.

Readers of zip files disagree about unusual files: which of two directories counts, whether bytes
before an archive shift it, which of two entries with nearly the same name is meant. torch has its
own reader (miniz). Another reader may find other weights in the same file. This module reads what
miniz reads. Where miniz would guess, the file is refused.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

# Compression method of an entry that is not compressed.
STORED = 0
# Bytes of a local header before the name.
LOCAL_HEADER = 30
# Offset in a local header at which the lengths of name and extra field are stored.
_LENGTHS = 26
# Bytes. A directory is read whole, and real ones are far smaller.
MAX_DIRECTORY = 64 * 2**20
# Flag of an entry whose local header was written before the sizes were known.
SIZES_FOLLOW = 0x8
# Flags of encryption: of the contents, strong, of the headers.
_ENCRYPTED = 0x1 | 0x40 | 0x2000
# Flag of an entry whose contents are a difference to another file.
_PATCH = 0x20

_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END64, _LOCATOR = b"PK\x06\x06", b"PK\x06\x07"
_END_SIZE, _END64_SIZE, _LOCATOR_SIZE, _CENTRAL_SIZE = 22, 56, 20, 46
_LONGEST_COMMENT = 0xFFFF
# Placeholders: the number itself is in a zip64 field.
_MOST16, _MOST32 = 0xFFFF, 0xFFFFFFFF
# Kind of the extra field that holds large numbers.
_ZIP64 = 1


_NOT_ONE = "it is not one archive from its first byte to its directory"


class MalformedZip(ValueError):
    """Error for a zip file that is damaged or ambiguous."""


class CutShort(MalformedZip):
    """Error for a zip file without a directory, which is written last."""


class FileSlice:
    """Part of a file, with a limit on the bytes per read.

    Use the slice as a context manager, which closes the file.

    Args:
        file: The whole file.
        within: Offset and length of the part in bytes; None for the whole file.

    Attributes:
        length: Number of bytes.
    """

    def __init__(self, file: BinaryIO, within: tuple[int, int] | None = None) -> None:
        self._file = file
        if within is None:
            within = 0, file.seek(0, io.SEEK_END)
        self._start, self.length = within

    def __enter__(self) -> FileSlice:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def read_at(self, offset: int, size: int) -> bytes:
        """Read bytes at an offset within the part; fewer at the end of the part.

        Raises:
            MalformedZip: The offset is negative, or the size above the limit.
        """
        if offset < 0:
            raise MalformedZip("it begins before its beginning")
        if size > MAX_DIRECTORY:
            raise MalformedZip(f"a part of it claims {size} bytes")
        self._file.seek(self._start + offset)
        return self._file.read(max(min(size, self.length - offset), 0))


@dataclass(frozen=True, slots=True)
class Entry:
    """Entry of a zip file, as the directory lists it.

    Attributes:
        name: The entry's name. Bytes that are no UTF-8 are escaped as surrogates.
        header: Offset of the local header.
        size: Bytes of the contents.
        packed_size: Bytes that the contents take in the file.
        method: Method of compression; ``STORED`` where there is none.
        crc: CRC-32 of the contents; 0 where torch was set to omit the checksum.
        flags: Flags of the writer, such as ``SIZES_FOLLOW``.
    """

    name: str
    header: int
    size: int
    packed_size: int
    method: int
    crc: int
    flags: int

    @property
    def raw_name(self) -> bytes:
        """Bytes of the name as stored in the file."""
        return self.name.encode("utf-8", "surrogateescape")

    @property
    def header_length(self) -> int:
        """Bytes of the local header, up to the end of the name."""
        return LOCAL_HEADER + len(self.raw_name)

    @property
    def descriptor_length(self) -> int:
        """Bytes behind the contents that repeat CRC and sizes (64-bit above 4 GiB)."""
        if not self.flags & SIZES_FOLLOW:
            return 0
        return 24 if self.size >> 32 else 16

    @property
    def stored(self) -> bool:
        """True if the contents are stored uncompressed."""
        return self.method == STORED and self.packed_size == self.size


@dataclass(frozen=True)
class Directory:
    """Entries of a zip file as listed, and the offset at which the list begins."""

    entries: Sequence[Entry]
    start: int

    def ends(self) -> dict[str, int]:
        """Return the offset before which each entry ends: the next entry, or the list.

        Returns:
            Name of an entry → the offset.
        """
        ordered = sorted(self.entries, key=lambda entry: entry.header)
        begins = [*(entry.header for entry in ordered[1:]), self.start]
        return {entry.name: end for entry, end in zip(ordered, begins, strict=True)}


@dataclass(frozen=True, slots=True)
class _End:
    """Record at the end of a zip file: number of entries, bytes and offset of the directory."""

    count: int
    size: int
    start: int


def read_directory(file: FileSlice) -> Directory:
    """Read the directory of a zip file.

    Raises:
        CutShort: The file has no directory.
        MalformedZip: The file is damaged, or readers would differ about it.
    """
    end = _read_end(file)
    if end.size > MAX_DIRECTORY:
        raise MalformedZip(f"its directory claims {end.size} bytes")
    entries = _parse(file.read_at(end.start, end.size), end.count)
    _check_names(entries)
    _check_places(entries, end.start)
    return Directory(entries, end.start)


def read_offset(file: FileSlice, entry: Entry, end: int) -> int:
    """Read the offset of an entry's contents from the local header.

    Args:
        file: The archive.
        entry: The entry, as the directory has it.
        end: Offset before which the contents have to end.

    Raises:
        MalformedZip: The local header contradicts the directory.
    """
    header = file.read_at(entry.header, entry.header_length)
    if len(header) < LOCAL_HEADER or not header.startswith(_LOCAL):
        raise MalformedZip(f"the zip entry {entry.name!r} has no header")
    flags, size = struct.unpack_from("<6xH10xI", header)
    lengths: tuple[int, int] = struct.unpack_from("<HH", header, _LENGTHS)
    name_length, extra_length = lengths
    start = entry.header + LOCAL_HEADER + name_length + extra_length
    if start + entry.packed_size > end:
        raise MalformedZip(f"the zip entry {entry.name!r} runs into the next one")
    same_size = flags & SIZES_FOLLOW or size in (entry.packed_size, _MOST32)
    same_name = header[LOCAL_HEADER : LOCAL_HEADER + name_length] == entry.raw_name
    if not (same_size and same_name):
        raise MalformedZip(f"the zip entry {entry.name!r} contradicts the zip's directory")
    return start


def lengths_before(entry: Entry, start: int) -> tuple[int, bytes]:
    """Encode the lengths of name and extra field in a local header that ends at ``start``.

    Returns:
        Offset of the lengths in the file, and the bytes.
    """
    name_length = len(entry.raw_name)
    extra_length = start - entry.header - LOCAL_HEADER - name_length
    return entry.header + _LENGTHS, struct.pack("<HH", name_length, extra_length)


def _read_tail(file: FileSlice) -> bytes:
    """Read the last bytes of a file, which contain the record at the end of the zip."""
    record = file.read_at(max(0, file.length - _END_SIZE), _END_SIZE)
    # Without a comment, as torch writes it, the record is the end itself.
    if record.rfind(_END) == 0:
        return record
    longest = _END_SIZE + _LONGEST_COMMENT
    return file.read_at(max(0, file.length - longest), longest)


def _read_end(file: FileSlice) -> _End:
    """Read the last end record in a file, as torch does, even within a comment."""
    tail = _read_tail(file)
    within = tail.rfind(_END)
    if within < 0:
        raise CutShort("it has no directory, which is written last")
    at = file.length - len(tail) + within
    record = tail[within : within + _END_SIZE]
    if len(record) < _END_SIZE:
        raise CutShort("its directory is cut short")
    disk, first_disk, disk_count, count, size, start = struct.unpack_from("<4xHHHHII", record)
    if disk or first_disk or disk_count != count:
        raise MalformedZip("it is one of several volumes")
    end, begin = _End(count, size, start), at
    if at >= _LOCATOR_SIZE:
        locator = file.read_at(at - _LOCATOR_SIZE, _LOCATOR_SIZE)
        if locator.startswith(_LOCATOR):
            end, begin = _read_end64(file, locator, end, at)
    # Bytes between the two would be a second archive, or would shift the first.
    if end.start + end.size != begin:
        raise MalformedZip(_NOT_ONE)
    return end


def _read_end64(file: FileSlice, locator: bytes, small: _End, at: int) -> tuple[_End, int]:
    """Read the zip64 end record.

    Returns:
        The record, and the offset of the record.
    """
    disk, begin, disks = struct.unpack_from("<4xIQI", locator)
    if disk or disks > 1 or begin != at - _LOCATOR_SIZE - _END64_SIZE:
        raise MalformedZip(_NOT_ONE)
    record = file.read_at(begin, _END64_SIZE)
    if len(record) < _END64_SIZE or not record.startswith(_END64):
        raise MalformedZip("its directory is elsewhere than it says")
    disk, first_disk, disk_count, count, size, start = struct.unpack_from("<16xIIQQQQ", record)
    if disk or first_disk or disk_count != count:
        raise MalformedZip("it is one of several volumes")
    large = _End(count, size, start)
    pairs = ((small.count, count, _MOST16), (small.size, size, _MOST32))
    # A small field either repeats the large one or holds the number that refers to it.
    for value, large_value, placeholder in (*pairs, (small.start, start, _MOST32)):
        if value not in (large_value, placeholder):
            raise MalformedZip("it has two directories")
    return large, begin


def _parse(content: bytes, count: int) -> list[Entry]:
    """Parse the entries of a directory, and refuse a wrong count or bytes in between."""
    entries: list[Entry] = []
    position = 0
    while position < len(content):
        entry, position = _parse_entry(content, position)
        entries.append(entry)
    if len(entries) != count:
        raise MalformedZip(f"its directory lists {len(entries)} entries where it says {count}")
    return entries


def _parse_entry(content: bytes, position: int) -> tuple[Entry, int]:
    """Parse the entry at a position of the directory.

    Returns:
        The entry, and the position behind the entry.
    """
    record = content[position : position + _CENTRAL_SIZE]
    if len(record) < _CENTRAL_SIZE or not record.startswith(_CENTRAL):
        raise MalformedZip("its directory is damaged")
    flags, method, crc, packed, size = struct.unpack_from("<8xHH4xIII", record)
    name_length, extra_length, comment_length, disk = struct.unpack_from("<28xHHHH", record)
    (header,) = struct.unpack_from("<42xI", record)
    if disk:
        raise MalformedZip("it is one of several volumes")
    names = position + _CENTRAL_SIZE
    extras = names + name_length
    behind = extras + extra_length + comment_length
    if behind > len(content):
        raise MalformedZip("its directory is damaged")
    size, packed, header = _resolve_zip64(
        content[extras : extras + extra_length], [size, packed, header]
    )
    name = content[names:extras].decode("utf-8", "surrogateescape")
    return Entry(name, header, size, packed, method, crc, flags), behind


def _resolve_zip64(extra: bytes, numbers: list[int]) -> list[int]:
    """Replace placeholders for size, packed size and offset by numbers of the zip64 field."""
    missing = numbers.count(_MOST32)
    if not missing:
        return numbers
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        field = extra[position + 4 : position + 4 + length]
        if kind == _ZIP64 and len(field) == length >= 8 * missing:
            values = list(struct.unpack_from(f"<{missing}Q", field))
            for i in reversed(range(len(numbers))):
                if numbers[i] == _MOST32:
                    numbers[i] = values.pop()
            return numbers
        position += 4 + length
    raise MalformedZip("the size of an entry is missing")


def _check_names(entries: Sequence[Entry]) -> None:
    """Refuse entries whose names differ only in case, since torch ignores case."""
    names = {entry.raw_name.lower() for entry in entries}
    if len(names) < len(entries):
        raise MalformedZip("two of its zip entries have one name")


def _check_places(entries: Sequence[Entry], end: int) -> None:
    """Refuse entries that are encrypted, share bytes, or are not before the directory.

    Args:
        entries: All entries of the file.
        end: Offset of the directory.
    """
    for entry in entries:
        if entry.flags & (_ENCRYPTED | _PATCH):
            raise MalformedZip("it is encrypted, which torch.save never does")
        if entry.header + LOCAL_HEADER + entry.packed_size > end:
            raise MalformedZip(f"the zip entry {entry.name!r} is outside the file")
    ordered = sorted(entries, key=lambda entry: entry.header)
    for before, after in pairwise(ordered):
        if before.header + LOCAL_HEADER + before.packed_size > after.header:
            raise MalformedZip(f"the zip entries {before.name!r} and its neighbour overlap")
