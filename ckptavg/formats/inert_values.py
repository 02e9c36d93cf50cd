"""What an inert pickle is made of: placeholders, tensors, and the few calls that are understood."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ckptavg.formats.table import DTYPES, MOST_ELEMENTS, DType


class MalformedPickle(ValueError):
    """A pickle that does not follow its own protocol."""


class PickleCutShort(MalformedPickle):
    """A pickle that ends before its end."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)
class Opaque:
    """What stands for an object that was not built.

    Attributes:
        type: What would have been called or instantiated.
        args: With which arguments.
        state: What would have been set on it (the attributes, usually).
        items: What would have been appended to it or stored in it.
    """

    type: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        """The type alone: contents can share their parts so often that spelling them never ends."""
        return f"<{self.type if isinstance(self.type, Global) else 'object'}>"


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat run of elements in the file, by its key. ``dtype`` is None for an untyped one."""

    key: str
    dtype: DType | None
    numel: int


@dataclass(eq=False, slots=True)
class TensorView:
    """A tensor as a view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sharded:
    """A tensor whose pieces lie in several files, by its full name in the checkpoint."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor that is not a plain strided one, and why it cannot be averaged."""

    why: str


class Keys(Protocol):
    """What makes a value safe to be hashed, in bounded time."""

    def key(self, value: Any) -> Any:
        """The value, or a placeholder for it."""


def name_of(function: Any) -> tuple[str, str]:
    """Module and name of a global; Python 2's name of the builtins counts as ours."""
    if not isinstance(function, Global):
        return "", ""
    return {"__builtin__": "builtins"}.get(function.module, function.module), function.name


def known_call(function: Any) -> Callable[..., Any] | None:
    """What stands for a call in the tree; None where the function is not understood.

    Vendors move their functions between the modules of a package: of those the package counts.
    """
    module, name = name_of(function)
    package = module.partition(".")[0]
    return KNOWN_CALLS.get((module, name)) or KNOWN_CALLS.get((package, name))


def storage_of(pid: Any) -> Storage:
    """The storage that a persistent id names.

    Raises:
        MalformedPickle: It names none.
    """
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise MalformedPickle("a persistent id is not a tensor storage")
    _, kind, key, _, numel, *view = pid
    if any(part is not None for part in view):
        raise MalformedPickle("it holds views of storages, as torch 0.3 wrote them")
    if not isinstance(kind, Global) or not isinstance(key, str) or not _natural(numel):
        raise MalformedPickle("a tensor storage is malformed")
    if kind.name in _UNTYPED:
        return Storage(key, None, numel)
    if kind.name not in _STORAGE_DTYPES:
        raise MalformedPickle(f"a tensor has the unknown storage type {kind}")
    return Storage(key, _STORAGE_DTYPES[kind.name], numel)


_UNTYPED = (  # the quantized ones never reach a plain tensor
    "UntypedStorage", "_UntypedStorage", "QInt8Storage", "QUInt8Storage", "QInt32Storage",
    "QUInt4x2Storage", "QUInt2x4Storage",
)  # fmt: skip
_STORAGE_DTYPES = {
    f"{prefix}Storage": DTYPES[name]
    for prefix, name in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "ComplexDouble": "complex128",
        "ComplexFloat": "complex64",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _view(
    storage: Any, dtype: DType | None, offset: Any, shape: Any, stride: Any, metadata: Any = None
) -> TensorView | Refused:
    if not isinstance(storage, Storage) or dtype is None:
        raise MalformedPickle("a tensor has no typed storage")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise MalformedPickle("a tensor's shape and strides do not match")
    if len(shape) > 64 or not all(map(_natural, (offset, *shape, *stride))):
        raise MalformedPickle("a tensor's shape, strides or offset are out of range")
    if isinstance(metadata, dict) and (metadata.get("conj") or metadata.get("neg")):
        return Refused("a lazily conjugated or negated view; save it after .resolve_conj()")
    if math.prod(n or 1 for n in shape) >= MOST_ELEMENTS:
        raise MalformedPickle("a tensor has more elements than can be counted")
    element = 1 if storage.dtype is None else storage.dtype.size
    capacity = storage.numel * element // dtype.size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= capacity:
        raise MalformedPickle("a tensor runs past the end of its storage")
    return TensorView(storage, dtype, offset, shape, stride)


def _tensor_v1(_: Keys, storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> Any:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _tensor_v2(
    _: Keys,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> Any:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride, metadata)


def _tensor_v3(
    _: Keys,
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    name = dtype.name if isinstance(dtype, Global) else "?"
    if name not in DTYPES:
        return Refused(f"its element type {name} has no arithmetic")
    return _view(storage, DTYPES[name], offset, shape, stride, metadata)


def _device_tensor(_: Keys, data: Any, dtype: Any, *_rest: Any) -> Any:
    """A tensor from a device whose memory torch cannot reach: a copy for the CPU and its type.

    Where NumPy had no such type, a bfloat16 is kept as the float32 of the same value, whose upper
    half it is.
    """
    name = dtype.name if isinstance(dtype, Global) else "?"
    if not isinstance(data, TensorView) or data.dtype.name == name:
        return data
    if (data.dtype.name, name) != ("float32", "bfloat16"):
        return Refused(f"kept as {data.dtype.name} but meant as {name}")
    stride = tuple(2 * step for step in data.stride)
    return TensorView(data.storage, DTYPES[name], 2 * data.offset + 1, data.shape, stride)


def _wrapper_subclass(_: Keys, cls: Any, *_rest: Any) -> Refused:
    if name_of(cls)[1] == "DTensor":
        return Refused("a DTensor, which is one rank's part of it")
    return Refused(f"a tensor subclass without plain bytes, {cls}")


def _numpy_scalar(_: Keys, dtype: Any, raw: Any = None) -> Any:
    """A NumPy number as a Python one: metrics are often recorded so."""
    code = dtype.args[0] if isinstance(dtype, Opaque) and dtype.args else None
    layout = _NUMPY_LAYOUTS.get(code) if isinstance(code, str) else None
    big = isinstance(dtype, Opaque) and isinstance(dtype.state, tuple) and ">" in dtype.state[:2]
    if layout is None or not isinstance(raw, bytes):
        return Opaque(Global("numpy", "generic"), (dtype, raw))
    return struct.unpack((">" if big else "<") + layout, raw)[0]


_NUMPY_LAYOUTS = {
    "f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
    "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?",
}  # fmt: skip


def _encode(_: Keys, text: str, encoding: str) -> bytes:
    return text.encode("latin-1" if encoding == "latin1" else "utf-8")


def _refuse(why: str) -> Callable[..., Refused]:
    return lambda *_: Refused(why)


def _first(_: Keys, data: Any, *_others: Any) -> Any:
    return data


def _mapping(machine: Keys, pairs: Any = ()) -> dict[Any, Any]:
    """A dict, from nothing or from a list of pairs, as OrderedDict is pickled."""
    return {machine.key(key): value for key, value in pairs}


def _set(machine: Keys, values: Any = ()) -> set[Any]:
    return set(map(machine.key, values))


KNOWN_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _mapping,
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
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
