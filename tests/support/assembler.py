"""Pickles and the tensors in them, put together opcode by opcode."""

from __future__ import annotations

import struct
from pickle import (
    BINPERSID,
    BINUNICODE,
    GLOBAL,
    LONG1,
    LONG_BINGET,
    LONG_BINPUT,
    MARK,
    NONE,
    REDUCE,
    TUPLE,
)


def glob(module: str, name: str) -> bytes:
    return GLOBAL + f"{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    raw = value.encode()
    return BINUNICODE + struct.pack("<I", len(raw)) + raw


def put(index: int) -> bytes:
    return LONG_BINPUT + struct.pack("<I", index)


def get(index: int) -> bytes:
    return LONG_BINGET + struct.pack("<I", index)


def storage(kind="FloatStorage", key="0", numel=4) -> bytes:
    parts = text("storage") + glob("torch", kind) + text(key) + text("cpu") + number(numel)
    return MARK + parts + TUPLE + BINPERSID


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return LONG1 + bytes([len(raw)]) + raw


def numbers(values) -> bytes:
    return MARK + b"".join(map(number, values)) + TUPLE


def tensor(offset=0, shape=(4,), stride=(1,), dtype: str | None = None, **kept) -> bytes:
    """A tensor as ``torch.save`` pickles it, whatever it claims."""
    version = 2 if dtype is None else 3
    end = b"" if dtype is None else glob("torch", dtype)
    return (
        glob("torch._utils", f"_rebuild_tensor_v{version}") + MARK + storage(**kept)
        + number(offset) + numbers(shape) + numbers(stride) + NONE + NONE + end + TUPLE + REDUCE
    )  # fmt: skip
