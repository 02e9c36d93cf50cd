"""The layout of an output before writing: tensors, files, and the offset of every part."""

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
        name: Name under which the tensor is stored.
        dtype: Element type.
        shape: Extent.
        tied_to: Name of an earlier tensor whose bytes this tensor shares; None without one.
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
    """The layout of a file of an output.

    Attributes:
        name: The file's name in the output directory; empty if the output is this file.
        size: The file's size in bytes.
        parts: Byte offset and contents of each part that is no tensor.
        offsets: Byte offset of each tensor.
        checksums: Tensor name → byte offsets at which the CRC-32 of the tensor's bytes is stored,
            little-endian.
    """

    name: str
    size: int
    parts: list[tuple[int, bytes]]
    offsets: dict[str, int]
    checksums: dict[str, list[int]] = field(default_factory=dict)

    @property
    def positions(self) -> object:
        """Key that is equal for files that differ in the contents of the parts alone."""
        parts = [(offset, len(content)) for offset, content in self.parts]
        return self.name, self.size, parts, self.offsets, self.checksums


@dataclass
class Layout:
    """The layout of a whole output.

    Attributes:
        directory: True if the output is a directory.
        files: The files with tensors.
        companions: Contents of the other files, by path below the directory.
        copies: Files of the input that are copied unchanged, by path below the directory.
        notes: Remarks about parts of the input that the output lacks.
    """

    directory: bool
    files: list[FileLayout]
    companions: dict[str, bytes] = field(default_factory=dict)
    copies: dict[str, FileStamp] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def put(self, companions: Mapping[str, bytes]) -> None:
        """Add files with the given contents, and replace files of the same path."""
        self.companions |= companions
        self.copies = {n: stamp for n, stamp in self.copies.items() if n not in companions}

    @property
    def names(self) -> list[str]:
        """Paths of all files below the directory."""
        return [*(file.name for file in self.files), *self.copies, *self.companions]

    def fits(self, other: Layout) -> bool:
        """Return True if the files with tensors are laid out as in another layout."""
        return [file.positions for file in self.files] == [file.positions for file in other.files]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        size = sum(map(len, self.companions.values()))
        for file in self.files:
            size += file.size
        for stamp in self.copies.values():
            size += stamp.size
        return size
