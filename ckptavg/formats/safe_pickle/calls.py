"""Inert stand-ins for the few calls in a pickle that are understood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ckptavg.formats.checkpoint import DTYPES, MOST_ELEMENTS, DType
from ckptavg.formats.safe_pickle import arrays
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    NumpyArray,
    OrderedEntries,
    Refused,
    Span,
    Storage,
    TensorView,
    Unpickler,
    is_natural,
    name_of,
)


def known_call(function: Any) -> Callable[..., Any] | None:
    """Return the stand-in for a function; None where the function is not understood."""
    module, name = name_of(function)
    # Vendors of devices move their functions between the modules of a package.
    package = module.partition(".")[0]
    return KNOWN_CALLS.get((module, name)) or KNOWN_CALLS.get((package, name))


def _view(
    storage: Any, dtype: DType | None, offset: Any, shape: Any, stride: Any, metadata: Any = None
) -> TensorView | Refused:
    """Check the parts of a pickled tensor, and make a view.

    Args:
        storage: The storage.
        dtype: Element type of the tensor.
        offset: Offset of the first element in the storage, in elements.
        shape: Shape of the tensor.
        stride: Strides in elements.
        metadata: Flags of lazy views (``conj``, ``neg``), if any.

    Raises:
        MalformedPickle: The parts do not fit each other or the storage.
    """
    if not isinstance(storage, Storage) or dtype is None:
        raise MalformedPickle("a tensor has no typed storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise MalformedPickle("a tensor's shape and strides do not match")
    if len(shape) > 64 or not all(map(is_natural, (offset, *shape, *stride))):
        raise MalformedPickle("a tensor's shape, strides or offset are out of range")
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        return Refused("a lazily conjugated or negated view; save it after .resolve_conj()")
    if math.prod(n or 1 for n in shape) >= MOST_ELEMENTS:
        raise MalformedPickle("a tensor has more elements than can be counted")
    capacity = storage.nbytes // dtype.size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= capacity:
        raise MalformedPickle("a tensor runs past the end of its storage")
    return TensorView(storage, dtype, offset, shape, stride)


def _tensor_v1(
    _: Unpickler, storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any
) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor``."""
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _tensor_v2(
    _: Unpickler,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor_v2``."""
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride, metadata)


def _tensor_v3(
    _: Unpickler,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor_v3``, which names the element type."""
    name = _dtype_name(dtype)
    if name not in DTYPES:
        return Refused(f"its element type {name} has no arithmetic")
    return _view(storage, DTYPES[name], offset, shape, stride, metadata)


def _dtype_name(dtype: Any) -> str:
    """Return the name of a pickled element type; "?" for anything else."""
    if not isinstance(dtype, Global):
        return "?"
    return dtype.name


def _device_tensor(_: Unpickler, data: Any, dtype: Any, *_rest: Any) -> Any:
    """Rebuild a tensor of a device without storages from the pickled CPU copy."""
    name = _dtype_name(dtype)
    if isinstance(data, NumpyArray):
        data = data.view
    if not isinstance(data, TensorView) or data.dtype.name == name:
        return data
    if (data.dtype.name, name) != ("float32", "bfloat16"):
        return Refused(f"kept as {data.dtype.name} but meant as {name}")
    # NumPy has no bfloat16, so torch stores the float32 of the same value. The upper half of the
    # float32 is the bfloat16, and comes second in little-endian order.
    stride = tuple(2 * step for step in data.stride)
    return TensorView(data.storage, DTYPES[name], 2 * data.offset + 1, data.shape, stride)


def _wrapper_subclass(_: Unpickler, cls: Any, *_rest: Any) -> Refused:
    """Refuse a tensor subclass without a storage, such as a ``DTensor``."""
    if name_of(cls)[1] == "DTensor":
        return Refused("a DTensor, which is one rank's part of it")
    return Refused(f"a tensor subclass without plain bytes, {cls}")


def _encode(unpickler: Unpickler, text: str, encoding: str) -> bytes:
    """Encode a text, and remember the encoded bytes' place in the pickle."""
    codec = "utf-8"
    if encoding == "latin1":
        codec = "latin-1"
    data = text.encode(codec)
    span = unpickler.find_span(text)
    if span is not None:
        # ASCII characters take one byte in UTF-8, other Latin-1 characters take two.
        escaped = codec == "latin-1" and span.length > len(data)
        unpickler.keep_span(data, Span(span.start, span.length, escaped))
    return data


def _refuse(why: str) -> Callable[..., Refused]:
    """Return a stand-in that refuses a tensor for a reason."""
    return lambda *_: Refused(why)


def _first(_: Unpickler, data: Any, *_others: Any) -> Any:
    """Return the first argument: the tensor that a parameter wraps."""
    return data


def _mapping(machine: Unpickler, pairs: Any = ()) -> dict[Any, Any]:
    """Make a dict from pairs, the form in which ``OrderedDict`` is pickled."""
    return {machine.make_key(key): value for key, value in pairs}


def _ordered_mapping(machine: Unpickler, pairs: Any = ()) -> OrderedEntries:
    """Make the stand-in for an ``OrderedDict`` from pairs."""
    return OrderedEntries(_mapping(machine, pairs))


def _set(machine: Unpickler, values: Any = ()) -> set[Any]:
    """Make a set whose members hash in bounded time."""
    return set(map(machine.make_key, values))


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_mapping,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): _mapping,
    ("builtins", "list"): lambda _, values=(): list(values),
    ("builtins", "tuple"): lambda _, values=(): tuple(values),
    ("builtins", "set"): _set,
    ("builtins", "frozenset"): lambda machine, values=(): frozenset(_set(machine, values)),
    ("builtins", "bytes"): lambda _, value=b"": bytes(memoryview(value)),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda _, values=(): tuple(values),
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_qtensor"): _refuse("a quantized tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"): _refuse("a sparse tensor"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _refuse("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _refuse("a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refuse("a meta tensor without data"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _wrapper_subclass,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _device_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _device_tensor,
    ("torch._utils", "_rebuild_xla_tensor"): _device_tensor,
    ("torch_npu", "_rebuild_npu_tensor"): _tensor_v2,
    ("torch.nn.parameter", "UninitializedParameter"): _refuse("a lazy module's, without shape"),
    ("torch.nn.parameter", "UninitializedBuffer"): _refuse("a lazy module's, without shape"),
}
KNOWN_CALLS = _CALLS | arrays.KNOWN_CALLS
