"""What an output is before a byte of it is written: its tensors, and where everything will lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ckptavg.formats.table import DType


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
        companions: Contents of the other files, by name.
        notes: What of the input is not in it.
    """

    directory: bool
    files: list[FileLayout]
    companions: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def fits(self, other: Layout) -> bool:
        """Whether everything lies at the same place in another one."""
        return [file.places for file in self.files] == [file.places for file in other.files]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.size for f in self.files) + sum(map(len, self.companions.values()))
