"""The table of an opened checkpoint: tensor name → element type, shape and byte ranges."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ckptavg.formats.provenance import Provenance
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

if TYPE_CHECKING:
    from ckptavg.formats.format import Format

# Bound on the product of all nonzero dimensions: torch can compute the sizes of smaller tensors.
MOST_ELEMENTS = 2**58


Kind = Literal["float", "complex", "int", "packed"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: The name in torch, without ``torch.``.
        bits: Size of one element in bits.
        kind: ``float``, ``complex``, ``int`` (bool included) or ``packed`` (float8 and smaller:
            meaningless without their scales).
        code: The name in a safetensors header; None if safetensors lacks the type.
    """

    name: str
    bits: int
    kind: Kind
    code: str | None

    @property
    def size(self) -> int:
        """Size of an element in bytes; 0 for types smaller than a byte."""
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Compute the number of bytes of ``count`` elements, rounded up."""
        return (count * self.bits + 7) // 8


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float64", 64, "float", "F64"),
        DType("float32", 32, "float", "F32"),
        DType("float16", 16, "float", "F16"),
        DType("bfloat16", 16, "float", "BF16"),
        DType("complex128", 128, "complex", None),
        DType("complex64", 64, "complex", "C64"),
        DType("complex32", 32, "complex", None),
        DType("int64", 64, "int", "I64"),
        DType("int32", 32, "int", "I32"),
        DType("int16", 16, "int", "I16"),
        DType("int8", 8, "int", "I8"),
        DType("uint64", 64, "int", "U64"),
        DType("uint32", 32, "int", "U32"),
        DType("uint16", 16, "int", "U16"),
        DType("uint8", 8, "int", "U8"),
        DType("bool", 8, "int", "BOOL"),
        DType("float8_e5m2", 8, "packed", "F8_E5M2"),
        DType("float8_e4m3fn", 8, "packed", "F8_E4M3"),
        DType("float8_e5m2fnuz", 8, "packed", "F8_E5M2FNUZ"),
        DType("float8_e4m3fnuz", 8, "packed", "F8_E4M3FNUZ"),
        DType("float8_e8m0fnu", 8, "packed", "F8_E8M0"),
        DType("float6_e2m3", 6, "packed", "F6_E2M3"),
        DType("float6_e3m2", 6, "packed", "F6_E3M2"),
        DType("float4_e2m1", 4, "packed", "F4"),
    )
}


@dataclass(frozen=True, slots=True)
class Guard:
    """Bytes that confirm an assumed layout: a file with other bytes stores a piece elsewhere.

    Attributes:
        offset: Byte offset of the first byte in the file.
        content: The expected bytes.
    """

    offset: int
    content: bytes

    @property
    def end(self) -> int:
        """Byte offset behind the last byte."""
        return self.offset + len(self.content)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor, with the location of the elements in a file.

    Attributes:
        file: Path or URL of the file.
        offset: Byte offset of the box's first element.
        shape: Extent of the box along each dimension, in elements.
        stride: Step between neighbours along each dimension, in elements.
        start: Index in the tensor of the box's first element.
        guard: Bytes to check when the tensor's first element is read; None if the offset is
            certain.
        text: Byte offset and length of the UTF-8 text that stores the bytes, one character of the
            same number (0 to 255) per byte; None for plain bytes. With a text, ``offset`` counts
            in the decoded bytes.
    """

    file: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: tuple[int, ...]
    guard: Guard | None = None
    text: tuple[int, int] | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: element type, shape, and the pieces with the bytes.

    Attributes:
        dtype: Element type.
        shape: Extent along each dimension; ``()`` for a 0-d tensor.
        pieces: Boxes of the tensor, without overlap. Elements outside all boxes are zero. Two names
            with equal pieces are tied.
    """

    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once."""
        return self.dtype.nbytes(self.numel)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the elements that the pieces cover."""
        return self.dtype.nbytes(sum(math.prod(piece.shape) for piece in self.pieces))

    @cached_property
    def contiguous(self) -> bool:
        """True if the bytes are stored in a single row-major range."""
        if len(self.pieces) != 1 or self.pieces[0].shape != self.shape or self.pieces[0].text:
            return False
        return is_row_major(self.shape, self.pieces[0].stride)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Compute the strides, in elements, of a contiguous tensor of a shape."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        # An empty dimension counts as 1, as in torch.
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return True if the strides are row-major, without regard to dimensions of extent 1."""
    if 0 in shape:
        return True
    return all(n == 1 or s == r for n, s, r in zip(shape, stride, row_major(shape), strict=True))


def contiguous_tensor(file: str, offset: int, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """Make a tensor whose bytes are stored in a single row-major range.

    Args:
        file: Path or URL of the file.
        offset: Byte offset of the first element.
        dtype: Element type.
        shape: Extent along each dimension, in elements.
    """
    return Tensor(dtype, shape, (Piece(file, offset, shape, row_major(shape), (0,) * len(shape)),))


@dataclass(frozen=True, slots=True)
class Record:
    """The numbers that training recorded beside the weights.

    Attributes:
        step: Optimizer steps taken; None if not recorded.
        epoch: Epochs done; None if not recorded.
        lr: Learning rate of the first parameter group; None if not recorded.
        metrics: All other recorded numbers, by dotted name.
    """

    step: int | None = None
    epoch: float | None = None
    lr: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def position(self) -> float | None:
        """Position in training: the step, else the epoch; None if neither is recorded."""
        return self.epoch if self.step is None else self.step


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A state dict on disk, opened: the headers are read, no tensor data is moved.

    Attributes:
        path: The file or directory.
        format: The checkpoint's format.
        key: Dotted path of the entry that holds the weights; empty if the file is the state dict.
        networks: Dotted paths of several networks below the key. The names of a network's tensors
            begin with the path. Empty if there is a single state dict.
        tensors: Bare name → tensor, in the file's order.
        stored_names: Bare name → the name in the file.
        refused: Name → reason, for tensors that cannot be averaged since they lack plain bytes.
        files: Stamps of the files that hold the bytes.
        record: The numbers that training recorded beside the weights.
        provenance: The record of how ckptavg made the checkpoint; None for other checkpoints.
        notes: Remarks for the user about the way the checkpoint was read.
        other_entries: Descriptions of the other entries, which are left out of an average.
        step: Position in training: the recorded step, else the epoch. In a run without either, the
            number in the file's name. None if all of these are missing.
        metadata: Text of the safetensors headers besides tensors and provenance, by name.
        components: Directory below the path → opened weights, for a model of several directories.
            The tensors' names here begin with the directory's name and a slash. The empty name
            stands for the path itself.
        momentary: Names of recorded numbers that differ in neighbouring checkpoints.
    """

    path: Location
    format: Format
    key: str
    tensors: Mapping[str, Tensor]
    stored_names: Mapping[str, str]
    refused: Mapping[str, str]
    files: tuple[FileStamp, ...]
    record: Record = field(default_factory=Record)
    provenance: Provenance | None = None
    notes: tuple[str, ...] = ()
    other_entries: tuple[str, ...] = ()
    step: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, Checkpoint] = field(default_factory=dict)
    networks: tuple[str, ...] = ()
    momentary: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self.tensors)} tensors, step {self.step}>"

    @property
    def layout(self) -> str:
        """Name of the format: ``safetensors`` or ``torch`` (torch.save) for a file.

        For a directory ``huggingface``, ``peft`` (an adapter), ``deepspeed`` or ``distributed``
        (torch.distributed.checkpoint).
        """
        return self.format.name

    @property
    def entries(self) -> tuple[str, ...]:
        """Dotted paths of the entries that hold the weights; an empty path is the file itself."""
        below = self.networks or ("",)
        return tuple(".".join(filter(None, (self.key, path))) for path in below)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Tied tensors count once."""
        return sum({t.pieces: t.nbytes for t in self.tensors.values()}.values())

    @property
    def is_average(self) -> bool:
        """True for outputs of ckptavg, except a single checkpoint with refreshed statistics."""
        return self.provenance is not None and self.provenance.is_average

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(stamp.size for stamp in self.files)

    @property
    def pattern(self) -> str:
        """Shell pattern that matches the checkpoint's name with any numbers."""
        return re.sub(r"\d+", "*", glob.escape(self.path.name))

    def stored_name(self, name: str) -> str:
        """Return the name under which the file stores a weight.

        A weight without a stored name gets the wrapper of all other names, if there is only one.
        """
        if name in self.stored_names:
            return self.stored_names[name]
        wrappers = {s.removesuffix(bare) for bare, s in self.stored_names.items()}
        return (wrappers.pop() if len(wrappers) == 1 else "") + name

    def ties(self) -> list[list[str]]:
        """Group the names of tied tensors, which share the same bytes."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            # Empty tensors have equal pieces without being tied.
            if tensor.numel:
                groups.setdefault((tensor.dtype.name, tensor.pieces), []).append(name)
        return [names for names in groups.values() if len(names) > 1]
