"""What an output is before a byte of it is written: its tensors, and where everything will lie."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptavg.formats.checkpoint import DType
from ckptavg.io.stamp import FileStamp


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written.

    Attributes:
        name: Under which it is stored.
        dtype: Element type.
        shape: Extent.
        tied_to: Name of an earlier tensor with the very same contents, if it shares them.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.dtype.nbytes(self.numel)


@dataclass
class FileLayout:
    """One file of an output.

    Attributes:
        name: Its name in the output directory; empty if the output is this file.
        size: Bytes in all.
        parts: Offset and contents of everything that is no tensor.
        offsets: Byte offset of each tensor.
        checksums: Tensor name → offsets at which the CRC-32 of its bytes is stored, little-endian.
    """

    name: str
    size: int
    parts: list[tuple[int, bytes]]
    offsets: dict[str, int]
    checksums: dict[str, list[int]] = field(default_factory=dict)

    @property
    def places(self) -> object:
        """Equal for files that differ in the contents of their parts alone."""
        parts = [(offset, len(content)) for offset, content in self.parts]
        return self.name, self.size, parts, self.offsets, self.checksums


@dataclass
class Layout:
    """A whole output.

    Attributes:
        directory: Whether it is a directory.
        files: Its files with tensors.
        companions: Contents of the other files, by path below the directory.
        copies: Files of the input that go along as they are, by the same.
        notes: What of the input is not in it.
    """

    directory: bool
    files: list[FileLayout]
    companions: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, FileStamp] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def put(self, companions: Mapping[str, bytes]) -> None:
        """Add files by their contents, in the place of what is called the same."""
        self.companions |= companions
        self.copies = {n: stamp for n, stamp in self.copies.items() if n not in companions}

    @property
    def names(self) -> list[str]:
        """Paths of all files below the directory."""
        return [*(file.name for file in self.files), *self.copies, *self.companions]

    def fits(self, other: Layout) -> bool:
        """Whether everything lies at the same place in another one."""
        return [file.places for file in self.files] == [file.places for file in other.files]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        copied = sum(stamp.size for stamp in self.copies.values())
        written = sum(map(len, self.companions.values()))
        return sum(file.size for file in self.files) + copied + written
