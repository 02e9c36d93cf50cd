"""The safetensors format: headers read into tables of tensors, and headers for outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ckptavg.errors import UnsupportedTensorError, first_few
from ckptavg.formats.checkpoint import DTYPES, MOST_ELEMENTS, DType, Tensor, contiguous_tensor
from ckptavg.formats.damage import cut_short, damaged
from ckptavg.io import bounded_json, paths
from ckptavg.io.paths import Location

MAX_HEADER = bounded_json.MAX_TEXT
# torch takes no tensor with more dimensions.
MAX_DIMENSIONS = 64
_damaged = partial(damaged, kind="safetensors file")
_cut_short = partial(cut_short, kind="safetensors file")
_WRITE_TORCH = "Write a .pt file instead (`out='OUT.pt'`)."
BY_CODE = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code}


class _Entry(NamedTuple):
    """A tensor in a header; ``start`` and ``end`` are bytes counted from the header's end."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(location: str | Location, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the header of a safetensors file into a table of tensors.

    Args:
        location: The file.
        size: The file's size in bytes. Every range is checked against the size.

    Returns:
        The tensors in the order of their bytes, and the file's metadata.

    Raises:
        CheckpointError: The file is damaged, cut short, or no safetensors file.
    """
    path = str(location)
    with paths.open_binary(location) as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        # Checked before reading: an untrusted header may claim any length.
        if length > MAX_HEADER:
            raise _damaged(path, f"its header claims {length} bytes")
        if len(prefix) < 8 or length > size - 8:
            raise _cut_short(path, "its header runs past the end of the file")
        header = _parse_json(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise _damaged(path, "its metadata is not a map of strings")
    begin = 8 + length
    entries = [_entry(path, name, value) for name, value in header.items()]
    # Sorted by byte range, so that one pass finds overlaps and holes.
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_ranges(path, entries, size - begin)
    tensors: dict[str, Tensor] = {}
    for entry in entries:
        offset = begin + entry.start
        tensors[entry.name] = contiguous_tensor(path, offset, entry.dtype, entry.shape)
    return tensors, metadata


def looks_like(start: bytes) -> bool:
    """Return True if a file begins like safetensors: a header's length, then a JSON object."""
    # The upper half of the 64-bit length is zero for every header below 4 GiB.
    return start[4:9] == b"\0\0\0\0{"


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Build the header of a safetensors file, and place the tensors behind the header.

    The widest element types come first, in the order of the reference implementation. Thus every
    tensor is aligned to the size of an element.

    Args:
        tensors: Name, element type and shape of each.
        metadata: Entries for ``__metadata__``.

    Returns:
        The file's first bytes (length and padded header), and each tensor's byte offset.

    Raises:
        UnsupportedTensorError: The format cannot store an element type or a tensor's name.
    """
    tensors = list(tensors)
    odd = [name for name, _, _ in tensors if name == "__metadata__" or not _is_text(name)]
    if odd:
        raise UnsupportedTensorError(
            f"safetensors cannot store tensors named {first_few([repr(n) for n in odd])}",
            _WRITE_TORCH,
        )
    unknown = [f"{name} ({dtype.name})" for name, dtype, _ in tensors if dtype.code is None]
    if unknown:
        raise UnsupportedTensorError(
            f"safetensors cannot store {first_few(unknown)}",
            _WRITE_TORCH,
        )
    ordered = sorted(tensors, key=lambda t: -t[1].bits)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    position = 0
    for name, dtype, shape in ordered:
        starts[name] = position
        end = position + dtype.nbytes(math.prod(shape))
        header[name] = {
            "dtype": dtype.code,
            "shape": list(shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # Padded to 8 bytes, so that the first tensor is aligned.
    text += b" " * (-len(text) % 8)
    first = len(text).to_bytes(8, "little") + text
    return first, {name: len(first) + start for name, start in starts.items()}


def _parse_json(path: str, raw: bytes) -> dict[str, Any]:
    try:
        header = bounded_json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"its header is not valid JSON ({error})"[:200]) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_text(name: str) -> bool:
    """Return True if a name can be written as UTF-8. JSON's escapes allow lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_natural(value: Any) -> bool:
    # By the exact type: JSON's true would pass for 1.
    return type(value) is int and 0 <= value < 2**63


def _entry(path: str, name: str, value: Any) -> _Entry:
    """Check an entry of an untrusted header.

    Args:
        path: The file, for messages.
        name: The tensor's name.
        value: The entry as parsed.

    Raises:
        CheckpointError: The entry is malformed.
    """
    if not _is_text(name):
        raise _damaged(path, "a name is not valid Unicode")
    if not isinstance(value, dict):
        raise _damaged(path, f"the entry of {name!r} is not an object")
    code, shape, offsets = (value.get(k) for k in ("dtype", "shape", "data_offsets"))
    if not isinstance(code, str) or (dtype := BY_CODE.get(code)) is None:
        raise _damaged(path, f"{name!r} has the unknown dtype {str(code)[:40]!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(map(_is_natural, shape))
        # Empty dimensions count as 1: a zero would hide the extents of the others.
        or math.prod(n or 1 for n in shape) >= MOST_ELEMENTS
    ):
        raise _damaged(path, f"{name!r} has a malformed shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_natural, offsets)):
        raise _damaged(path, f"{name!r} has malformed offsets")
    start, end = offsets
    if end - start != dtype.nbytes(math.prod(shape)):
        raise _damaged(path, f"the bytes of {name!r} do not fit its shape and dtype")
    return _Entry(name, dtype, tuple(shape), start, end)


def _check_ranges(path: str, entries: Sequence[_Entry], available: int) -> None:
    """Make sure that tensors fill the file behind the header.

    Args:
        path: The file, for messages.
        entries: The tensors, in order.
        available: Number of bytes behind the header.

    Raises:
        CheckpointError: Tensors overlap, leave a hole, or end elsewhere than the file.
    """
    position = 0
    for entry in entries:
        if entry.start != position:
            raise _damaged(
                path, f"the bytes of {entry.name!r} overlap another tensor's or leave a hole"
            )
        position = entry.end
    why = f"its tensors take {position} bytes where the file holds {available}"
    if position > available:
        raise _cut_short(path, why)
    if position < available:
        raise _damaged(path, why)
