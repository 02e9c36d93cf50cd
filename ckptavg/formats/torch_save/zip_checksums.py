"""Checksums of the entries of ``torch.save`` files, which torch writes but does not compare."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ckptavg.errors.system import guard_reads
from ckptavg.formats.damage import damaged
from ckptavg.formats.torch_save import zip_directory
from ckptavg.formats.torch_save.zip_directory import Directory, Entry, FileSlice, MalformedZip
from ckptavg.io import paths

# Bytes of an entry that are read at a time.
_CHUNK = 2**20


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
            with guard_reads(path), FileSlice(paths.open_binary(path)) as file:
                return zip_directory.read_offset(file, self.entry, self.end)
        except MalformedZip as error:
            raise damaged(path, str(error)) from error


def storages(path: str) -> list[StoredEntry]:
    """List the entries that hold storages, in the order of the file.

    The list is empty where the file is not one archive with checksums.

    Raises:
        CheckpointError: The file cannot be read.
    """
    with guard_reads(path), FileSlice(paths.open_binary(path)) as file:
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
    with FileSlice(paths.open_binary(path)) as file:
        directory = _checked_directory(file)
        if directory is None:
            return None
        ends = directory.ends()
        names: list[str] = []
        try:
            for entry in directory.entries:
                if entry.stored and _crc(file, entry, ends[entry.name]) != entry.crc:
                    names.append(entry.name)
        except MalformedZip as error:
            raise damaged(path, str(error)) from error
    return names


def _checked_directory(file: FileSlice) -> Directory | None:
    """Read the directory of a zip file with checksums; None for any other file."""
    try:
        directory = zip_directory.read_directory(file)
    except MalformedZip:
        return None
    if any(entry.crc for entry in directory.entries if entry.stored):
        return directory
    return None


def _crc(file: FileSlice, entry: Entry, end: int) -> int:
    """Compute the CRC-32 of a stored entry."""
    start = zip_directory.read_offset(file, entry, end)
    crc, done = 0, 0
    while done < entry.size:
        content = file.read_at(start + done, min(entry.size - done, _CHUNK))
        if not content:
            raise MalformedZip(f"{entry.name!r} is cut short")
        crc = zlib.crc32(content, crc)
        done += len(content)
    return crc
