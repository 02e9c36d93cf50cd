"""A checkpoint once opened: tensor name → dtype, shape, and where its bytes lie."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

PROVENANCE = "ckptavg"  # the entry or the metadata that says how an output was made
MOST_ELEMENTS = 2**58  # along all dimensions but empty ones: what torch can compute sizes of
REFRESHED = "none"  # the scheme in the provenance of one checkpoint with new statistics


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Attributes:
        name: As torch spells it, without ``torch.``.
        bits: Size of one element in bits.
        kind: ``float``, ``complex``, ``int`` (bool included) or ``packed`` (float8 and smaller:
            meaningless without their scales).
        code: As a safetensors header spells it; None where that format has no such type.
    """

    name: str
    bits: int
    kind: str
    code: str | None

    @property
    def size(self) -> int:
        """Size of one element in bytes; 0 for types smaller than a byte."""
        return self.bits // 8

    def nbytes(self, count: int) -> int:
        """Bytes that ``count`` elements take."""
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
    """Bytes that a file has to hold, or its pieces lie elsewhere than they were taken to.

    Attributes:
        offset: Byte offset of the first.
        content: The bytes.
    """

    offset: int
    content: bytes

    @property
    def end(self) -> int:
        """Byte offset behind the last."""
        return self.offset + len(self.content)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor and where its elements lie in one file.

    Attributes:
        file: Path of the file.
        offset: Byte offset of the box's first element.
        shape: Extent of the box.
        stride: Step between neighbours along each dimension, in elements.
        start: Index in the tensor of the box's first element.
        guard: Is looked at together with the first element; None where the offset is certain.
        text: Byte offset and length of UTF-8 text in which each byte is kept as the character of
            its number, if it is; the offset is then one into the bytes that the text stands for.
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
    """One tensor of a checkpoint: its type, its shape and its bytes' whereabouts.

    Attributes:
        dtype: Element type.
        shape: Extent along each dimension; ``()`` for a 0-d tensor.
        pieces: Boxes of the tensor, without overlap; what none covers is zero. Two names with
            equal pieces are tied.
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
        """Bytes of the elements that pieces cover."""
        return self.dtype.nbytes(sum(math.prod(piece.shape) for piece in self.pieces))

    @cached_property
    def contiguous(self) -> bool:
        """Whether the bytes lie in one row-major range."""
        if len(self.pieces) != 1 or self.pieces[0].shape != self.shape or self.pieces[0].text:
            return False
        return is_row_major(self.shape, self.pieces[0].stride)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        strides[i] = strides[i + 1] * max(shape[i + 1], 1)
    return tuple(strides)


def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the strides are those of a contiguous tensor, dimensions of extent 1 aside."""
    if 0 in shape:
        return True
    return all(n == 1 or s == r for n, s, r in zip(shape, stride, row_major(shape), strict=True))


def whole(file: str, offset: int, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """A tensor whose bytes lie in one row-major range."""
    return Tensor(dtype, shape, (Piece(file, offset, shape, row_major(shape), (0,) * len(shape)),))


@dataclass(frozen=True, slots=True)
class Record:
    """What training wrote beside the weights.

    Attributes:
        step: Optimizer steps taken, where recorded.
        epoch: Epochs done, where recorded.
        lr: Learning rate of the first parameter group.
        metrics: Every other number that was recorded, by dotted name.
    """

    step: int | None = None
    epoch: float | None = None
    lr: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """One state dict on disk, opened: headers read, no tensor data moved.

    Attributes:
        path: The file or directory.
        layout: ``safetensors``, ``torch`` (torch.save), or of directories ``huggingface``,
            ``peft`` (an adapter), ``deepspeed`` and ``distributed`` (torch.distributed.checkpoint).
        key: Dotted path of the entry that holds the weights; empty if the file itself does.
        networks: Dotted paths below the key of several networks, which their tensors' names begin
            with; empty where there is one state dict.
        tensors: The table, under bare names, in the file's order.
        stored_names: Bare name → the name in the file, where wrappers were dropped.
        refused: Name → why the tensor cannot be averaged, for tensors without plain bytes.
        files: Stamps of the files that hold the bytes.
        record: What training wrote beside the weights.
        provenance: How ckptavg made it, if it did.
        notes: What a person should know about how it was read.
        beside: What else it holds, which is left out of an average.
        step: Position in training: the recorded step, else the epoch; in a run that records
            neither, the number in the name. None where there is none of these.
        metadata: Text of the safetensors headers besides tensors and provenance, by name.
        components: Directory below the path → what it holds, where several directories with
            weights make one model: tensors' names here begin with the directory's and a slash.
            The empty name is that of the path itself.
        momentary: Names of recorded numbers that are of this checkpoint alone: its neighbours have
            others.
    """

    path: Location
    layout: str
    key: str
    tensors: Mapping[str, Tensor]
    stored_names: Mapping[str, str]
    refused: Mapping[str, str]
    files: tuple[FileStamp, ...]
    record: Record = field(default_factory=Record)
    provenance: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    step: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    components: Mapping[str, Checkpoint] = field(default_factory=dict)
    networks: tuple[str, ...] = ()
    momentary: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path}: {len(self.tensors)} tensors, step {self.step}>"

    @property
    def entries(self) -> tuple[str, ...]:
        """Dotted paths of the entries that hold the weights; empty ones for the file itself."""
        below = self.networks or ("",)
        return tuple(".".join(filter(None, (self.key, path))) for path in below)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        return sum({t.pieces: t.nbytes for t in self.tensors.values()}.values())

    @property
    def is_average(self) -> bool:
        """Whether ckptavg wrote it, and not only refreshed the statistics of one checkpoint."""
        return self.provenance is not None and self.provenance.get("scheme") != REFRESHED

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(stamp.size for stamp in self.files)

    @property
    def pattern(self) -> str:
        """Shell pattern of the names that differ from its own in their numbers only."""
        return re.sub(r"\d+", "*", glob.escape(self.path.name))

    def stored_name(self, name: str) -> str:
        """The name that it has for a weight, or would have: with the wrapper of all others."""
        if name in self.stored_names:
            return self.stored_names[name]
        wrappers = {s.removesuffix(bare) for bare, s in self.stored_names.items()}
        return (wrappers.pop() if len(wrappers) == 1 else "") + name

    def ties(self) -> list[list[str]]:
        """Groups of names that share the very same bytes."""
        groups: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            if tensor.numel:
                groups.setdefault((tensor.dtype.name, tensor.pieces), []).append(name)
        return [names for names in groups.values() if len(names) > 1]
