"""NumPy arrays and numbers, whose bytes are stored in the pickle itself."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

from ckptavg.formats.checkpoint import DTYPES, MOST_ELEMENTS, row_major
from ckptavg.formats.safe_pickle.values import (
    Global,
    NumpyArray,
    Opaque,
    Refused,
    Span,
    Storage,
    TensorView,
    Unpickler,
    is_natural,
)

_MOST_DIMENSIONS = 64
_NUMBERS = {
    "f8": "float64", "f4": "float32", "f2": "float16", "c16": "complex128", "c8": "complex64",
    "i8": "int64", "i4": "int32", "i2": "int16", "i1": "int8",
    "u8": "uint64", "u4": "uint32", "u2": "uint16", "u1": "uint8", "b1": "bool",
    "bfloat16": "bfloat16",
}  # fmt: skip
_LAYOUTS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip
# Element types without numbers: objects, texts, records, times.
_NO_NUMBERS = ("O", "S", "U", "V", "M", "m", "a")


def set_state(unpickler: Unpickler, array: NumpyArray, state: Any) -> None:
    """Set the pickled state of an array.

    Args:
        unpickler: The unpickler of the array's pickle.
        array: The array, without contents so far.
        state: Version, shape, element type, the flag of Fortran's order, and the bytes.
    """
    if isinstance(state, tuple) and len(state) == 5:
        _, shape, dtype, fortran, data = state
        array.view = _view(unpickler, data, dtype, shape, fortran is True)
    else:
        array.view = Refused("an array of a kind that is not known")


def _view(
    unpickler: Unpickler, data: Any, dtype: Any, shape: Any, fortran: bool
) -> TensorView | Refused | None:
    """View an array as a tensor over the bytes of the pickle.

    Returns:
        The view; a refusal where torch has no such tensor; None where the array holds no numbers.
    """
    code, order = _element_type(dtype)
    if code.startswith(_NO_NUMBERS) or isinstance(data, list):
        return None
    if code not in _NUMBERS or order == ">":
        return Refused(f"an array of the element type {order}{code}, which torch has not")
    element = DTYPES[_NUMBERS[code]]
    if not _is_shape(shape):
        return Refused("an array without a shape")
    numel = math.prod(shape)
    if not isinstance(data, (bytes, bytearray, str)) or len(data) != element.nbytes(numel):
        return Refused("an array whose bytes do not fit its shape")
    # Protocol 2 stores bytes as Latin-1 text in UTF-8, where bytes above 127 take two bytes.
    span: Span | None = Span(0, 0)
    if numel:
        span = unpickler.find_span(data)
    if span is None or (span.length != len(data) and not span.escaped):
        return Refused("an array whose bytes the pickle does not hold as such")
    storage = Storage(f"array at {span.start}", element, numel, span)
    return TensorView(storage, element, 0, shape, _strides(shape, fortran))


def _is_shape(shape: Any) -> bool:
    """Tell whether a value is the shape of an array whose elements can be counted."""
    if not isinstance(shape, tuple) or len(shape) > _MOST_DIMENSIONS:
        return False
    return all(map(is_natural, shape)) and math.prod(n or 1 for n in shape) < MOST_ELEMENTS


def name_arrays(tree: Any) -> bool:
    """Replace the arrays in dicts by tensors, if there are no tensors in the tree.

    Among tensors an array is a value like others: a history, or a generator's state.

    Returns:
        True if an array was replaced.
    """
    visited: set[int] = set()
    waiting, named = [tree], list[tuple[dict[Any, Any], Any, NumpyArray]]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, (TensorView, Refused)):
            return False
        # By identity: a small pickle can hold one container very many times.
        if id(value) in visited or not isinstance(value, (dict, list, tuple, Opaque)):
            continue
        visited.add(id(value))
        if isinstance(value, Opaque):
            waiting.append(value.state)
        elif isinstance(value, dict):
            for name, entry in value.items():
                if isinstance(entry, NumpyArray):
                    named.append((value, name, entry))
            waiting.extend(value.values())
        else:
            waiting.extend(value)
    # Only now, since a tensor further on leaves all arrays as they are.
    for holder, name, array in named:
        if array.view is not None:
            holder[name] = array.view
    return any(array.view is not None for _, _, array in named)


def _strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """Return the strides of an array without gaps, in elements."""
    if fortran:
        return row_major(shape[::-1])[::-1]
    return row_major(shape)


def _element_type(dtype: Any) -> tuple[str, str]:
    """Return the NumPy code and the byte order of an element type."""
    if not isinstance(dtype, Opaque) or not dtype.args:
        return "?", "|"
    code: Any = dtype.args[0]
    if isinstance(code, Global):
        code = code.name
    if not isinstance(code, str):
        code = "?"
    order: Any = "|"
    if isinstance(dtype.state, tuple) and len(dtype.state) > 1 and isinstance(dtype.state[1], str):
        order = dtype.state[1]
    return code, order


def _reconstruct(_: Unpickler, *_parts: Any) -> NumpyArray:
    """Return an empty array, as the stand-in for NumPy's ``_reconstruct``."""
    return NumpyArray()


def _from_buffer(
    unpickler: Unpickler, data: Any, dtype: Any, shape: Sequence[int], order: Any = "C", *_: Any
) -> NumpyArray:
    """Return an array over a buffer, as pickle protocol 5 stores arrays."""
    return NumpyArray(_view(unpickler, data, dtype, tuple(shape), order == "F"))


def _scalar(_: Unpickler, dtype: Any, raw: Any = None) -> Any:
    """Convert a NumPy number to Python, since training often records metrics as NumPy numbers."""
    code, order = _element_type(dtype)
    layout = _LAYOUTS.get(code)
    if layout is None or not isinstance(raw, bytes):
        return Opaque(Global("numpy", "generic"), (dtype, raw))
    if order == ">":
        return struct.unpack(">" + layout, raw)[0]
    return struct.unpack("<" + layout, raw)[0]


KNOWN_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    (f"numpy.{core}.{module}", name): call
    for core in ("core", "_core")
    for module, name, call in (
        ("multiarray", "scalar", _scalar),
        ("multiarray", "_reconstruct", _reconstruct),
        ("numeric", "_frombuffer", _from_buffer),
    )
}
