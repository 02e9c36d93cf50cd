"""Layout of a ``torch.save`` file, planned without the tensors in memory."""

from __future__ import annotations

import binascii
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any

import torch

from ckptavg.formats.checkpoint import DType, row_major

# Bytes. torch.save begins each entry at a multiple of this.
_ALIGNMENT = 64
_PREFIX = "archive/"
_TYPED_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class StorageStub:
    """Stand-in for a storage in a tree to be pickled.

    Args:
        key: Name of the storage in the archive.
        dtype: Element type.
        numel: Number of elements.
    """

    def __init__(self, key: str, dtype: DType, numel: int) -> None:
        self.key, self.dtype, self.numel = key, dtype, numel


class TensorStub:
    """Stand-in for a contiguous tensor that begins at the first byte of a storage."""

    def __init__(self, storage: StorageStub, dtype: DType, shape: tuple[int, ...]) -> None:
        self.storage, self.dtype, self.shape = storage, dtype, shape


def dumps(tree: Any) -> bytes:
    """Pickle a tree of plain values and stubs as the ``data.pkl`` of a file."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue()


class Archive:
    """Plan of a zip file: small entries by value, large entries as reserved ranges.

    Attributes:
        size: Number of bytes planned so far.
        offsets: Tensor name → offset of the first reserved byte.
        checksums: Tensor name → the two offsets at which the CRC-32 of the bytes is stored: in the
            local header and, after ``close``, in the directory.
    """

    def __init__(self) -> None:
        self.size = 0
        self.offsets: dict[str, int] = {}
        self.checksums: dict[str, list[int]] = {}
        self._parts: list[tuple[int, bytes]] = []
        self._directory: list[tuple[bytes, int, int, int, str | None]] = []

    def add(self, name: str, content: bytes) -> None:
        """Append an entry by value."""
        start = self._begin(name, len(content), binascii.crc32(content), None)
        self._parts.append((start, content))

    def reserve(self, name: str, size: int, tensor: str) -> None:
        """Reserve an entry for the bytes of a tensor.

        Args:
            name: Name of the entry.
            size: Number of bytes.
            tensor: Name of the tensor, under which the offsets are recorded.
        """
        self.offsets[tensor] = self._begin(name, size, 0, tensor)

    def close(self) -> list[tuple[int, bytes]]:
        """Append the directory of the zip file.

        Returns:
            Offset and contents of all parts of the file except the reserved ranges.
        """
        start = self.size
        for name, size, crc, at, tensor in self._directory:
            # The zip64 field holds sizes and offset: 32 bits are too few for large tensors.
            large = struct.pack("<HHQQQ", 1, 24, size, size, at)
            header = struct.pack(
                "<IHHHHHHIIIHHHHHII",
                0x02014B50, 45, 45, 0x800, zipfile.ZIP_STORED, 0, 0x21, crc,
                0xFFFFFFFF, 0xFFFFFFFF, len(name), len(large), 0, 0, 0, 0, 0xFFFFFFFF,
            )  # fmt: skip
            # The CRC is known only once the tensor is written, so its place is recorded.
            if tensor is not None:
                self.checksums[tensor].append(self.size + 16)
            self._append(header + name + large)
        self._append(_end_of_directory(start, self.size - start, len(self._directory)))
        return self._parts

    def _begin(self, name: str, size: int, crc: int, tensor: str | None) -> int:
        """Append the local header of an entry, with padding that aligns the contents."""
        at, raw = self.size, (_PREFIX + name).encode()
        large = struct.pack("<HHQQ", 1, 16, size, size)
        # 30 bytes of fixed header, and 4 bytes of kind and length before the padding.
        unpadded = at + 30 + len(raw) + len(large) + 4
        padding = -unpadded % _ALIGNMENT
        extra = large + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        header = struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50, 45, 0x800, zipfile.ZIP_STORED, 0, 0x21, crc,
            0xFFFFFFFF, 0xFFFFFFFF, len(raw), len(extra),
        )  # fmt: skip
        self._append(header + raw + extra)
        self._directory.append((raw, size, crc, at, tensor))
        if tensor is not None:
            self.checksums[tensor] = [at + 14]
        start = self.size
        self.size += size
        return start

    def _append(self, content: bytes) -> None:
        """Append bytes that are kept in memory."""
        self._parts.append((self.size, content))
        self.size += len(content)


def _end_of_directory(start: int, size: int, count: int) -> bytes:
    """Encode the records at the end of a zip file: zip64 record, zip64 locator, end record."""
    end = start + size
    return (
        struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
        + struct.pack("<IIQI", 0x07064B50, 0, end, 1)
        + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )


class _Pickler(pickle.Pickler):
    """Pickler that writes stubs as torch writes tensors and storages."""

    def persistent_id(self, obj: Any) -> Any:
        """Return the persistent id of a storage stub, in the form of torch's own ids."""
        if not isinstance(obj, StorageStub):
            return None
        # Newer dtypes, such as float8, have no storage class: an untyped storage counts bytes.
        name = _TYPED_STORAGES.get(obj.dtype.name)
        if name is None:
            nbytes = obj.dtype.nbytes(obj.numel)
            return ("storage", torch.UntypedStorage, obj.key, "cpu", nbytes)
        return ("storage", getattr(torch, name), obj.key, "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        """Reduce a tensor stub to a call of torch's function that rebuilds a tensor."""
        if not isinstance(obj, TensorStub):
            return NotImplemented
        view: tuple[Any, ...] = (
            obj.storage,
            0,
            obj.shape,
            row_major(obj.shape),
            False,
            OrderedDict(),
        )
        if obj.dtype.name in _TYPED_STORAGES:
            return torch._utils._rebuild_tensor_v2, view
        dtype = getattr(torch, obj.dtype.name)
        return torch._utils._rebuild_tensor_v3, (*view, dtype)
