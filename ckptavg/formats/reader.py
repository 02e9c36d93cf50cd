"""Reading of tensor elements from files into the caller's buffer."""

from __future__ import annotations

import io
import math
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch

from ckptavg.errors import CheckpointError, PlacementError
from ckptavg.errors.system import guard_reads
from ckptavg.formats.checkpoint import Piece, Tensor
from ckptavg.io.paths import is_url, open_unbuffered
from ckptavg.io.range_cache import RangeCache
from ckptavg.io.remote import Range

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Files that a reader keeps open, where the system's limit allows as many.
_MOST_OPEN_FILES = 128
# Bytes of decoded texts that are kept.
_MOST_DECODED = 64 * 2**20
# Bytes. In a shorter span, reading the gaps costs less than skipping them.
_SMALL_SPAN = 1 << 16


class Reader:
    """A reader of ranges of tensors.

    Each thread needs a reader of its own, since a reader keeps files open. Ranges of remote files
    should be announced with ``fetch`` first, which gets many at once.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, io.FileIO] = OrderedDict()
        self._most_open = _most_open_files()
        self._fetched = RangeCache()
        self._decoded: OrderedDict[object, bytearray] = OrderedDict()

    def close(self) -> None:
        """Close all files, and drop all cached bytes."""
        while self._files:
            self._close_one()
        self._fetched.clear()
        self._decoded.clear()

    def fetch(self, wanted: Iterable[tuple[Tensor, int, int]]) -> None:
        """Fetch the ranges of remote files that are going to be read, all at once.

        Ranges that were fetched before are dropped.

        Args:
            wanted: Tensor, start and count of each later call of ``read``.

        Raises:
            CheckpointError: A file cannot be read.
        """
        ranges: list[Range] = []
        for tensor, start, count in wanted:
            ranges += _ranges(tensor, start, count)
        self._fetched.fetch(ranges)

    def advise(self, tensor: Tensor, start: int, count: int) -> None:
        """Advise the system that elements of a contiguous tensor are going to be read soon.

        Args:
            tensor: A contiguous tensor.
            start: The first element's index in the flattened tensor.
            count: Number of elements.
        """
        piece, size = tensor.pieces[0], tensor.dtype.size
        if hasattr(os, "posix_fadvise") and not is_url(piece.file):
            handle = self._open(piece.file).fileno()
            offset = piece.offset + start * size
            # The advice is only a hint: not every file system takes it.
            with suppress(OSError):
                os.posix_fadvise(handle, offset, count * size, os.POSIX_FADV_WILLNEED)

    def read(self, tensor: Tensor, start: int, count: int, out: memoryview) -> None:
        """Read ``count`` elements, in row-major order from element ``start``.

        Args:
            tensor: Any tensor. Unless contiguous, the range must be a box, as cut by ``boxes``.
            start: The first element's index in the flattened tensor.
            count: Number of elements.
            out: Buffer of bytes, at least ``count`` elements long; filled from the beginning.

        Raises:
            CheckpointError: The file is shorter than when it was opened, or cannot be read.
            PlacementError: A remote file stores the tensor elsewhere than assumed.
        """
        size = tensor.dtype.size
        if tensor.contiguous:
            if start == 0:
                self._check_guards(tensor)
            piece = tensor.pieces[0]
            self._read_bytes(piece.file, piece.offset + start * size, out[: count * size])
            return
        self._fetched.fetch_missing(_ranges(tensor, start, count))
        if start == 0:
            self._check_guards(tensor)
        low, extent = box_of(tensor.shape, start, count)
        target = torch.frombuffer(out, dtype=torch.uint8)[: count * size].view(*extent, size)
        # Elements that no piece covers are zero.
        if tensor.stored_bytes < tensor.nbytes:
            target.zero_()
        for piece in tensor.pieces:
            self._read_overlap(piece, low, extent, target)

    def _check_guards(self, tensor: Tensor) -> None:
        """Make sure that pieces in remote files are stored at the assumed offsets.

        Raises:
            PlacementError: A piece is stored elsewhere.
        """
        for piece in tensor.pieces:
            guard = piece.guard
            if guard and guard.content != self._fetched.read(piece.file, guard.offset, guard.end):
                raise PlacementError(
                    f"{piece.file} is packed in a way that needs all of it to be read",
                    "Download it, and name the copy.",
                )

    def _read_overlap(
        self, piece: Piece, low: tuple[int, ...], extent: tuple[int, ...], target: torch.Tensor
    ) -> None:
        """Read the part of a piece that is inside a box of the tensor.

        Args:
            piece: A piece of the tensor.
            low: Index of the box's first element.
            extent: The box's extent, in elements.
            target: The box's bytes, with one dimension more than the box: the bytes of an element.
        """
        size = target.shape[-1]
        begin, end, skipped = overlap(piece, low, extent)
        if any(a >= b for a, b in zip(begin, end, strict=True)):
            return
        for dimension, (a, b, origin) in enumerate(zip(begin, end, low, strict=True)):
            target = target.narrow(dimension, a - origin, b - a)
        offset = piece.offset + skipped * size
        if piece.text is None:
            self._read_strided(piece.file, offset, piece.stride, target)
            return
        data = self._decode(piece)
        steps = tuple(step * size for step in piece.stride)
        if offset + _span(target.shape[:-1], piece.stride) * size > len(data):
            raise _cut_short(piece.file, sum(piece.text))
        flat = torch.frombuffer(data, dtype=torch.uint8)
        target.copy_(flat.as_strided(target.shape, (*steps, 1), offset))

    def _decode(self, piece: Piece) -> bytearray:
        """Decode the bytes that a piece stores as text; the last few results are cached."""
        cache_key = (piece.file, piece.text)
        if cache_key not in self._decoded:
            start, length = piece.text or (0, 0)
            text = bytearray(length)
            self._read_bytes(piece.file, start, memoryview(text))
            try:
                # Latin-1 gives each character below 256 the byte of the same number.
                data = bytearray(text.decode().encode("latin-1"))
            except UnicodeError as error:
                raise _cut_short(piece.file, start + length) from error
            while self._decoded and sum(map(len, self._decoded.values())) > _MOST_DECODED:
                self._decoded.popitem(last=False)
            self._decoded[cache_key] = data
        return self._decoded[cache_key]

    def _read_strided(
        self, path: str, offset: int, stride: tuple[int, ...], target: torch.Tensor
    ) -> None:
        """Read a strided box: at once if dense or small, else in slices of the longest stride."""
        *shape, size = target.shape
        # The stride of a dimension of extent 1 does not matter, and may be any number.
        steps = [s if n > 1 else 0 for n, s in zip(shape, stride, strict=True)]
        span = _span(shape, steps)
        # Expanded dimensions have stride 0 and repeat the same bytes.
        distinct = math.prod(n for n, s in zip(shape, steps, strict=True) if s)
        if span <= distinct or span * size <= _SMALL_SPAN:
            raw = bytearray(span * size)
            self._read_bytes(path, offset, memoryview(raw))
            flat = torch.frombuffer(raw, dtype=torch.uint8)
            target.copy_(flat.as_strided(target.shape, (*(s * size for s in steps), 1)))
            return
        widest = max(range(len(shape)), key=steps.__getitem__)
        for i in range(shape[widest]):
            at = offset + i * stride[widest] * size
            self._read_strided(path, at, stride, target.narrow(widest, i, 1))

    def _read_bytes(self, path: str, offset: int, out: memoryview) -> None:
        if is_url(path):
            content = self._fetched.read(path, offset, offset + len(out))
            if len(content) < len(out):
                raise _cut_short(path, offset + len(out))
            out[:] = content
            return
        file = self._open(path)
        bytes_read = 0
        with guard_reads(path):
            while bytes_read < len(out):
                # A system call may return fewer bytes than were asked for.
                got = _read_at(file, out[bytes_read:], offset + bytes_read)
                if not got:
                    raise _cut_short(path, offset + len(out))
                bytes_read += got

    def _close_one(self) -> None:
        """Close the file that was used longest ago."""
        # An error on closing loses nothing: all wanted bytes have been read.
        with suppress(OSError):
            self._files.popitem(last=False)[1].close()

    def _open(self, path: str) -> io.FileIO:
        # Taken out and put back, so that the file used last is also the last in order.
        file = self._files.pop(path, None)
        if file is None:
            if len(self._files) >= self._most_open:
                self._close_one()
            file = open_unbuffered(path)
        self._files[path] = file
        return file


def _span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Count the elements from the first to the last of a strided box, gaps included.

    Args:
        shape: The box's extent, in elements; no dimension is empty.
        stride: Step between neighbours along each dimension, in elements.
    """
    span = 1
    for n, step in zip(shape, stride, strict=True):
        span += (n - 1) * step
    return span


def _most_open_files() -> int:
    """Choose how many files a reader keeps open: other readers and outputs need files too."""
    if resource is None:
        return _MOST_OPEN_FILES
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < 0:
        return _MOST_OPEN_FILES
    return max(1, min(_MOST_OPEN_FILES, limit // 8))


def _cut_short(path: str, end: int) -> CheckpointError:
    return CheckpointError(
        f"{path} ends before byte {end}: it changed while being read",
        "Wait until the training run has finished writing it, then try again.",
    )


def _ranges(tensor: Tensor, start: int, count: int) -> list[Range]:
    """List the ranges of remote files that hold elements of a tensor."""
    remote = [piece for piece in tensor.pieces if is_url(piece.file)]
    size = tensor.dtype.size
    ranges: list[Range] = []
    for piece in remote:
        if piece.guard and start == 0:
            ranges.append((piece.file, piece.guard.offset, piece.guard.end))
    if remote and tensor.contiguous:
        at = remote[0].offset + start * size
        return [*ranges, (remote[0].file, at, at + count * size)]
    for piece in remote:
        if piece.text is not None:
            # A text can only be decoded as a whole.
            first, length = piece.text
            ranges.append((piece.file, first, first + length))
            continue
        begin, end, skipped = overlap(piece, *box_of(tensor.shape, start, count))
        extent = [b - a for a, b in zip(begin, end, strict=True)]
        if min(extent, default=1) > 0:
            at = piece.offset + skipped * size
            ranges.append((piece.file, at, at + _span(extent, piece.stride) * size))
    return ranges


def overlap(
    piece: Piece, low: tuple[int, ...], extent: tuple[int, ...]
) -> tuple[list[int], list[int], int]:
    """Intersect a piece with a box of the tensor.

    Args:
        piece: A piece of the tensor.
        low: Index of the box's first element.
        extent: The box's extent, in elements.

    Returns:
        First index and end of the common part in the tensor, and the number of elements from the
        piece's first element to that of the common part. The part is empty where an end is not
        above the first index.
    """
    begin: list[int] = []
    end: list[int] = []
    skipped = 0
    for i, first in enumerate(piece.start):
        begin.append(max(low[i], first))
        end.append(min(low[i] + extent[i], first + piece.shape[i]))
        skipped += (begin[i] - first) * piece.stride[i]
    return begin, end, skipped


def boxes(shape: tuple[int, ...], start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut a range of a flattened tensor into (start, count) ranges, each a box of the tensor.

    Args:
        shape: The tensor's extent.
        start: The range's first element.
        end: One past the range's last element.
        limit: Most elements per box; at least 1.
    """
    # Elements per row: of the whole tensor, then of slices with ever fewer dimensions, then one.
    rows = [math.prod(shape[i:]) for i in range(len(shape) + 1)]
    while start < end:
        stop = min(end, start + limit)
        most = max(1, stop - start)
        larger_row = rows[0]
        # Each box is made of the largest whole rows that begin at the start and fit.
        for row in rows:
            if start % row == 0 and row <= most:
                break
            larger_row = row
        # A box ends where the larger row around it ends.
        stop = min(stop, start - start % larger_row + larger_row)
        count = (stop - start) // row * row
        yield start, count
        start += count


def box_of(
    shape: tuple[int, ...], start: int, count: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Compute the first index and the extent of the box that a flat range covers.

    Args:
        shape: The tensor's extent.
        start: The range's first element in the flattened tensor.
        count: Number of elements.
    """
    low: list[int] = []
    extent: list[int] = []
    row = math.prod(shape)
    for n in shape:
        row //= n
        low.append(start // row)
        start %= row
        if count >= row:
            extent.append(count // row)
            count = row
        else:
            extent.append(1)
    return tuple(low), tuple(extent)


# One call reads at an offset where the system has preadv. Windows lacks preadv.
if hasattr(os, "preadv"):

    def _read_at(file: io.FileIO, out: memoryview, offset: int) -> int:
        return os.preadv(file.fileno(), [out], offset)

else:

    def _read_at(file: io.FileIO, out: memoryview, offset: int) -> int:
        file.seek(offset)
        return int(file.readinto(out) or 0)
