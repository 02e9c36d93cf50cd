"""Protocol buffers: models recognized by the first fields of a file."""

from __future__ import annotations

from dataclasses import dataclass

# Encodings of a value: the wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Bytes of the longest number: 64 bits, of which each byte holds 7.
_LONGEST_VARINT = 10
# Highest version of ONNX's format that is accepted. ONNX has reached little more than ten.
_LAST_VERSION = 64
# Most bytes in the name and in the version of an ONNX model's producer.
_LONGEST_NAME = 200
# Field number → encoding, for the fields of ONNX's ModelProto.
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}


@dataclass(frozen=True, slots=True)
class _Field:
    """A field: the number, the encoding, and the value or the value's length in bytes."""

    number: int
    encoding: int
    value: int


def is_onnx(start: bytes) -> bool:
    """Return True if the first bytes of a file are those of an ONNX model."""
    fields = _fields(start)
    if len(fields) < 2 or fields[0].number != 1 or not 0 < fields[0].value <= _LAST_VERSION:
        return False
    # A few bytes of any file can pass for fields, so the encodings and lengths are checked too.
    valid_encodings = all(_ONNX_FIELDS.get(f.number) == f.encoding for f in fields)
    short_names = all(f.value <= _LONGEST_NAME for f in fields if f.number in (2, 3))
    return valid_encodings and short_names


def is_saved_model(start: bytes) -> bool:
    """Return True if a file begins like a TensorFlow SavedModel: a version, then a graph."""
    fields = _fields(start)
    version = fields[:1] == [_Field(1, _VARINT, 1)]
    return version and len(fields) > 1 and fields[1].number == 2 and fields[1].encoding == _BYTES


def _fields(start: bytes) -> list[_Field]:
    """Parse the fields at the beginning of a message; return an empty list for other bytes."""
    fields: list[_Field] = []
    position = 0
    while position < len(start):
        tag, position = _varint(start, position)
        number, encoding = tag >> 3, tag & 7
        if not number or encoding not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            return []
        value = 0
        if encoding in (_VARINT, _BYTES):
            value, position = _varint(start, position)
        fields.append(_Field(number, encoding, value))
        position += {_FIXED64: 8, _FIXED32: 4, _BYTES: value}.get(encoding, 0)
    return fields


def _varint(start: bytes, position: int) -> tuple[int, int]:
    """Parse a number of variable length; return the number and the end position."""
    value = 0
    for i, byte in enumerate(start[position : position + _LONGEST_VARINT]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    return value, len(start)
