"""Sinks for a stream's blocks: a state dict in memory, or the files of an output."""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from ckptavg.errors import OutputError
from ckptavg.errors.system import unwritable
from ckptavg.formats.file_layout import FileLayout, Layout, OutputTensor
from ckptavg.io import copying

StateDict = dict[str, torch.Tensor]


class Sink(Protocol):
    """Receiver of the blocks of an average, from several threads and in any order."""

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes of a tensor.

        Args:
            name: The tensor.
            offset: Position in the tensor of the first byte, in bytes.
            data: The bytes, valid only during the call.
        """


class MemorySink:
    """Sink that collects a state dict.

    Args:
        tensors: The tensors that will be written.

    Attributes:
        state_dict: Name → tensor, filled as blocks arrive; tied names share their tensor.
    """

    def __init__(self, tensors: Iterable[OutputTensor]) -> None:
        self.state_dict: StateDict = {}
        self._bytes: dict[str, torch.Tensor] = {}
        # Ordinary tensors of the CPU, whatever mode and default device the caller has.
        with torch.inference_mode(mode=False):
            for t in tensors:
                self._allocate(t)

    def _allocate(self, t: OutputTensor) -> None:
        if t.tied_to is not None:
            self.state_dict[t.name] = self.state_dict[t.tied_to].view(t.shape)
            return
        tensor = torch.empty(t.shape, dtype=getattr(torch, t.dtype.name), device="cpu")
        self.state_dict[t.name] = tensor
        if tensor.numel():
            self._bytes[t.name] = tensor.view(-1).view(torch.uint8)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Copy bytes into the tensor of the state dict.

        Args:
            name: The tensor.
            offset: Position in the tensor of the first byte, in bytes.
            data: The bytes, valid only during the call.
        """
        source = torch.frombuffer(data, dtype=torch.uint8)
        self._bytes[name][offset : offset + len(data)].copy_(source)


class FileSink:
    """Sink that writes the files of a layout, preallocated to full size at the start.

    Use the sink as a context manager, which opens and closes the files.

    Args:
        layout: The files, and the position of each tensor in the files.
        root: The output file, or the directory of the layout's files.
        tensors: The tensors that will be written. A tied name is written at each place that the
            layout has for it.
        path: Path of the output in error messages; ``root`` where None.
        join: True to open files that another process has created, and to write a part of them.

    Attributes:
        root: The output file, or the directory of the layout's files.
    """

    def __init__(
        self,
        layout: Layout,
        root: Path,
        tensors: Iterable[OutputTensor],
        *,
        path: Path | None = None,
        join: bool = False,
    ) -> None:
        self.root = root
        self._path = path or root
        self._layout = layout
        self._join = join
        self._tied: dict[str, list[str]] = {}
        # Name → the tensor whose bytes it has: itself, or the first of the tied names.
        self._first: dict[str, OutputTensor] = {}
        by_name = {tensor.name: tensor for tensor in tensors}
        for tensor in by_name.values():
            first = by_name[tensor.tied_to or tensor.name]
            self._first[tensor.name] = first
            self._tied.setdefault(first.name, []).append(tensor.name)
        self._handles: list[int] = []
        self._targets: dict[str, list[tuple[int, int]]] = {}
        # Tensor → end of a stretch → start and CRC-32 of the stretch. The end is
        # the key, since the block that continues a stretch begins there.
        self._crcs: dict[str, dict[int, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> FileSink:
        try:
            for file in self._layout.files:
                self._prepare(file)
            if not self._join:
                self._write_companions()
        except BaseException:
            with suppress(OutputError):
                self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # An error while closing must not hide the error that ended the work.
        with suppress(OutputError) if error is not None else nullcontext():
            self._close()

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes at every place of a tensor and of the names that are tied to the tensor.

        Args:
            name: The tensor.
            offset: Position in the tensor of the first byte, in bytes.
            data: The bytes, valid only during the call.

        Raises:
            OutputError: The bytes cannot be written.
        """
        for tied in self._tied[name]:
            for handle, start in self._targets.get(tied, ()):
                try:
                    self._write_at(handle, data, start + offset)
                except OSError as error:
                    raise unwritable(self._path, error) from error
        if name in self._crcs:
            stretches = self._crcs[name]
            # A thread's blocks follow each other: each block mostly continues a known stretch.
            start, crc = stretches.pop(offset, (offset, 0))
            stretches[offset + len(data)] = start, zlib.crc32(data, crc)

    def replace(self, layout: Layout) -> None:
        """Rewrite the bytes outside tensors, before ``finish``.

        Args:
            layout: A layout that fits the present one: the same sizes and positions.
        """
        for handle, before, now in zip(
            self._handles, self._layout.files, layout.files, strict=True
        ):
            for old, (offset, content) in zip(before.parts, now.parts, strict=True):
                if old != (offset, content):
                    self._write_at(handle, memoryview(content), offset)

    def begin_anew(self, layout: Layout) -> None:
        """Change the layout of the files, while no tensor has been written.

        Args:
            layout: The new layout, of the same files and companions.

        Raises:
            OutputError: There is not enough room.
        """
        self._close()
        self._layout = layout
        self._targets, self._crcs = {}, {}
        try:
            # Emptied first, since posix_fallocate never makes a file shorter.
            for file in layout.files:
                os.truncate(self.root / file.name if file.name else self.root, 0)
                self._prepare(file)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def flush(self) -> None:
        """Flush the bytes of this process to the disk, so that other hosts see the bytes."""
        for handle in self._handles:
            os.fsync(handle)

    def checksums(self) -> dict[str, list[tuple[int, int, int]]]:
        """Return the checksums of the bytes of this process.

        Returns:
            Tensor → offset in bytes, length in bytes and CRC-32 of each stretch.
        """
        return {name: _joined(parts) for name, parts in self._crcs.items() if parts}

    def take_checksums(self, checksums: Mapping[str, Iterable[tuple[int, int, int]]]) -> None:
        """Add the checksums of the bytes that another process has written."""
        for name, parts in checksums.items():
            self._crcs[name] |= {start + length: (start, crc) for start, length, crc in parts}

    def finish(self) -> None:
        """Store the checksums in the files, once every byte has been written."""
        for handle, file in zip(self._handles, self._layout.files, strict=True):
            self._store_checksums(handle, file)

    def _write_companions(self) -> None:
        for name, stamp in self._layout.copies.items():
            _make_directory((self.root / name).parent)
            copying.copy(stamp, self.root / name)
        copying.verify_settled(self._layout.copies.values())
        for name, content in self._layout.companions.items():
            path = self.root / name
            _make_directory(path.parent)
            path.write_bytes(content)

    def _prepare(self, file: FileLayout) -> None:
        path = self.root / file.name if file.name else self.root
        # O_BINARY exists on Windows alone, which would translate line ends without it.
        flags = os.O_WRONLY | getattr(os, "O_BINARY", 0)
        if not self._join:
            _make_directory(path.parent)
            flags |= os.O_CREAT
        handle = os.open(path, flags, 0o666)
        self._handles.append(handle)
        if not self._join:
            _preallocate(handle, file.size)
            for offset, content in file.parts:
                self._write_at(handle, memoryview(content), offset)
        for name, offset in file.offsets.items():
            self._targets.setdefault(name, []).append((handle, offset))
        self._crcs |= {self._first[name].name: {} for name in file.checksums}

    def _close(self) -> None:
        """Close the files, and report errors of closing.

        Network file systems report failed writes only when a file is closed.
        """
        errors: list[OSError] = []
        while self._handles:
            try:
                os.close(self._handles.pop())
            except OSError as error:
                errors.append(error)
        if errors:
            raise unwritable(self._path, errors[0]) from errors[0]

    def _store_checksums(self, handle: int, file: FileLayout) -> None:
        for name, offsets in file.checksums.items():
            first = self._first[name]
            stretches = _joined(self._crcs[first.name])
            expected = [(0, first.nbytes)] if first.nbytes else []
            if [(start, length) for start, length, _ in stretches] != expected:
                raise RuntimeError(f"not all of {name} has been written")
            crc = stretches[0][2] if stretches else 0
            for offset in offsets:
                self._write_at(handle, memoryview(struct.pack("<I", crc)), offset)

    def _write_at(self, handle: int, data: memoryview, offset: int) -> None:
        written = 0
        while written < len(data):
            if hasattr(os, "pwrite"):
                written += os.pwrite(handle, data[written:], offset + written)
            else:
                # Windows has no pwrite, and a seek moves the position for all threads.
                with self._lock:
                    os.lseek(handle, offset + written, os.SEEK_SET)
                    written += os.write(handle, data[written:])


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)


def _joined(stretches: Mapping[int, tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Join adjacent stretches.

    Args:
        stretches: End → start and CRC-32 of each stretch.

    Returns:
        Offset in bytes, length in bytes and CRC-32 of as few stretches as possible, in order.
    """
    joined: list[tuple[int, int, int]] = []
    for start, end, crc in sorted((start, end, crc) for end, (start, crc) in stretches.items()):
        before, size, first = joined[-1] if joined else (0, 0, 0)
        if joined and before + size == start:
            joined[-1] = (before, end - before, crc32_combine(first, crc, end - start))
        else:
            joined.append((start, end - start, crc))
    return joined


def _preallocate(handle: int, size: int) -> None:
    """Reserve a file's bytes, so that a full disk is noticed before the work and not after."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            # These say that the file system cannot reserve bytes, not that the disk is full.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    os.truncate(handle, size)


def crc32_combine(first: int, second: int, length: int) -> int:
    """Compute the CRC-32 of two concatenated byte strings from the CRC-32 of each string.

    Appending n bytes multiplies the first checksum by x^(8n) modulo the CRC's polynomial over
    GF(2). Bits are reflected: the top bit stands for x^0.

    Args:
        first: CRC-32 of the first string.
        second: CRC-32 of the second string.
        length: Length of the second string in bytes.
    """
    return _multiply(_power_of_x(8 * length), first) ^ second


# The polynomial of CRC-32, with reflected bits.
_POLYNOMIAL = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    product = 0
    bit = 1 << 31
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    if exponent not in _CACHE:
        result, square = 1 << 31, 1 << 30  # x^0, x^1
        remaining = exponent
        while remaining:
            if remaining & 1:
                result = _multiply(square, result)
            square = _multiply(square, square)
            remaining >>= 1
        _CACHE[exponent] = result
    return _CACHE[exponent]


# Exponent → power of x. Stretches have few different lengths, so that few powers are computed.
_CACHE: dict[int, int] = {}
