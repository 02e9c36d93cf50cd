"""Archive of ``torch.save``: entries of a zip file by name, with checks before each use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ckptavg.errors import CheckpointError
from ckptavg.errors.printable import size_text
from ckptavg.formats import unsupported_files
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.values import Storage
from ckptavg.formats.torch_save import zip_directory
from ckptavg.formats.torch_save.zip_directory import Entry, FileSlice, MalformedZip

# Bytes. torch.save begins each entry at a multiple of this.
_ALIGNMENT = 64


@dataclass(frozen=True)
class SavedArchive:
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
    def of(cls, path: str, file: FileSlice) -> SavedArchive:
        """Read the directory of a file.

        Args:
            path: Name of the file for messages.
            file: The archive.

        Raises:
            MalformedZip: The file is damaged, or ``torch.save`` did not write it.
            CheckpointError: The file is an archive of another kind.
        """
        directory = zip_directory.read_directory(file)
        names = [entry.name for entry in directory.entries]
        if foreign_kind := unsupported_files.identify_archive(names):
            raise foreign_kind.refusal(path)
        prefix = "".join(names[:1]).partition("/")[0] + "/"
        if prefix + "data.pkl" not in names:
            raise MalformedZip("it is a zip file, but not one of torch.save")
        entries: dict[str, Entry] = {}
        for entry in directory.entries:
            if entry.name.startswith(prefix):
                entries[entry.name.removeprefix(prefix)] = entry
        return cls(path, entries, directory.ends())

    def check_byte_order(self, file: FileSlice) -> None:
        """Refuse a file whose numbers are big-endian.

        Raises:
            CheckpointError: The numbers are big-endian.
        """
        order = self.entries.get("byteorder")
        if order and order.size == len("big") and self.content(file, "byteorder") == b"big":
            raise CheckpointError(
                f"{self.path} was saved on a big-endian machine", "Load and save it on this one."
            )

    def content(self, file: FileSlice, name: str) -> bytes:
        """Read the bytes of a small entry.

        Checksums are not compared, since torch can be set to omit them.

        Raises:
            MalformedZip: The entry is compressed.
            CheckpointError: The entry is larger than a pickle may be.
        """
        entry = self.entries[name]
        if entry.size > unpickler.MAX_PICKLE:
            if not entry.stored:
                raise MalformedZip(f"{entry.name!r} claims {entry.size} bytes")
            raise CheckpointError(
                f"{self.path} has {size_text(entry.size)} in {entry.name!r}, of which at most "
                f"{size_text(unpickler.MAX_PICKLE)} are read: NumPy's arrays are stored there, "
                "torch's tensors are not",
                "Load it, and save torch.from_numpy of each array in its place.",
            )
        if not entry.stored:
            raise MalformedZip(f"{entry.name!r} is compressed, which torch.save never does")
        return file.read_at(self.offset(file, entry), entry.size)

    def offset(self, file: FileSlice, entry: Entry) -> int:
        """Return the offset of an entry's first byte.

        Raises:
            MalformedZip: The local header contradicts the directory.
        """
        return zip_directory.read_offset(file, entry, self.ends[entry.name])

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
        if stored.nbytes > entry.size:
            raise MalformedZip(f"the storage {stored.key!r} is shorter than it claims")
        if stored.nbytes < entry.size:
            raise MalformedZip(f"the storage {stored.key!r} is longer than it claims")
        return entry

    def guess_starts(self, file: FileSlice) -> dict[str, int]:
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
            least = entry.header + entry.header_length
            start = self.ends[entry.name] - entry.descriptor_length - entry.size
            if start % _ALIGNMENT == 0 and least <= start < least + 2 * _ALIGNMENT:
                starts[entry.name] = start
        pickle = self.entries["data.pkl"]
        if starts.get(pickle.name) != self.offset(file, pickle):
            return {}
        return starts
