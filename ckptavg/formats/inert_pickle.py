"""An unpickler that runs nothing.

It understands every opcode, builds plain values, and records what it will not build: a global is a
name, and calling one gives an ``Opaque`` placeholder, except for the few functions below that
torch and the standard library use to describe tensors and containers. Nothing is imported and no
code of the file's choosing is called, so a hostile pickle is only data.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ckptavg.formats.table import DTYPES, DType

MAX_PICKLE = 256 * 2**20
_MARK = object()


class MalformedPickle(ValueError):
    """A pickle that does not follow its own protocol."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
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
class Refused:
    """A tensor that is not a plain strided one, and why it cannot be averaged."""

    why: str


def loads(data: bytes) -> Any:
    """Read a pickle without running anything.

    Returns:
        Plain values (dicts, lists, tuples, strings, numbers), with ``TensorView``, ``Refused``,
        ``Global`` and ``Opaque`` where the file holds tensors and other objects.

    Raises:
        MalformedPickle: The data is not a pickle, or a damaged one.
    """
    if len(data) > MAX_PICKLE:
        raise MalformedPickle(f"it is larger than {MAX_PICKLE >> 20} MiB")
    machine = _Machine(budget=len(data))
    try:
        for opcode, arg, _ in pickletools.genops(data):
            machine.step(opcode.name, arg)
    except MalformedPickle:
        raise
    except Exception as error:  # anything a hostile stream provokes: it is damage all the same
        raise MalformedPickle(str(error)[:200] or type(error).__name__) from error
    return machine.result


class _Machine:
    """The pickle virtual machine: a stack, the marks on it and the memo.

    Args:
        budget: Elements that calls may copy in all. An honest pickle holds every element that it
            has copied; one that copies the same list again and again would exhaust the memory.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, arg: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self.stack.append(arg)
            return
        handler = _OPCODES.get(name)
        if name in _IGNORED:
            return
        if handler is None:
            raise MalformedPickle(f"it uses the opcode {name}")
        handler(self, arg)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedPickle("its stack runs empty")
        return value

    def pop_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise MalformedPickle("a mark is missing")

    def drop_to_mark(self) -> None:
        self.pop_mark()

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise MalformedPickle("its stack runs empty")
        return value

    def remember(self, index: int | None = None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def stop(self) -> None:
        self.result = self.pop()

    def pop_one(self) -> None:
        self.stack.pop()

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Opaque):
            target.items.extend(values)
        else:
            raise MalformedPickle(f"it appends to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        pairs = list(zip(values[::2], values[1::2], strict=True))
        if isinstance(target, dict):
            target.update((_key(k), v) for k, v in pairs)
        elif isinstance(target, Opaque):
            target.items.extend(pairs)
        else:
            raise MalformedPickle(f"it stores items in a {type(target).__name__}")

    def add_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise MalformedPickle(f"it adds items to a {type(target).__name__}")
        target.update(map(_key, values))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedPickle("a global is not named by strings")
        self.stack.append(Global(module, name))

    def spend(self, values: Any) -> None:
        parts = values if isinstance(values, tuple) else (values,)
        self.budget -= sum(len(part) for part in parts if hasattr(part, "__len__"))
        if self.budget < 0:
            raise MalformedPickle("it copies its contents over and over")

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.spend(args)
        self.stack.append(_call(function, args))

    def new_object(self, with_keywords: bool) -> None:
        keywords = self.pop() if with_keywords else None
        args, cls = self.pop(), self.pop()
        self.spend(args)
        made = _call(cls, args)
        if keywords and isinstance(made, Opaque):
            made.state = keywords
        self.stack.append(made)

    def build(self) -> None:
        state = self.pop()
        self.spend(state)
        target = self.top()
        if isinstance(target, Opaque):
            target.state = _merged_state(state)

    def object_from_mark(self) -> None:
        cls, *args = self.pop_mark()
        self.stack.append(_call(cls, tuple(args)))

    def persistent(self, pid: Any) -> None:
        self.stack.append(_storage(pid))


def _simple(push: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(push())


_IGNORED = ("PROTO", "FRAME")  # they only frame the stream
_PUSH_ARGUMENT = frozenset(
    [
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "UNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
    ]
)

_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _simple(lambda: _MARK),
    "NONE": _simple(lambda: None),
    "NEWTRUE": _simple(lambda: True),
    "NEWFALSE": _simple(lambda: False),
    "EMPTY_LIST": _simple(list),
    "EMPTY_TUPLE": _simple(tuple),
    "EMPTY_DICT": _simple(dict),
    "EMPTY_SET": _simple(set),
    "STOP": lambda m, _: m.stop(),
    "POP": lambda m, _: m.pop_one(),
    "POP_MARK": lambda m, _: m.drop_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(_key, m.pop_mark()))),
    "DICT": lambda m, _: m.stack.append(_pairs(m.pop_mark())),
    "APPEND": lambda m, _: m.append([m.pop()]),
    "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items([m.pop(), m.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add_items(m.pop_mark()),
    "PUT": lambda m, arg: m.remember(arg),
    "BINPUT": lambda m, arg: m.remember(arg),
    "LONG_BINPUT": lambda m, arg: m.remember(arg),
    "MEMOIZE": lambda m, _: m.remember(),
    "GET": lambda m, arg: m.recall(arg),
    "BINGET": lambda m, arg: m.recall(arg),
    "LONG_BINGET": lambda m, arg: m.recall(arg),
    "GLOBAL": lambda m, arg: m.stack.append(Global(*arg.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(with_keywords=False),
    "NEWOBJ_EX": lambda m, _: m.new_object(with_keywords=True),
    "INST": lambda m, arg: m.stack.append(_call(Global(*arg.split(" ", 1)), tuple(m.pop_mark()))),
    "OBJ": lambda m, _: m.object_from_mark(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, arg: m.persistent(arg),
    "BINPERSID": lambda m, _: m.persistent(m.pop()),
}


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return {_key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}


_SCALARS = (str, int, float, bool, bytes, type(None))


def _key(value: Any) -> Any:
    """The value where it hashes in bounded time, a placeholder where it does not.

    Nested tuples can share their parts, which makes hashing them exponential in the input.
    """
    if isinstance(value, (*_SCALARS, Global, Opaque)):
        return value
    if isinstance(value, tuple) and all(isinstance(v, _SCALARS) for v in value):
        return value
    return Opaque(type(value).__name__, (value,))


def _merged_state(state: Any) -> Any:
    """Object state as one value: (attributes, slots) pairs become one dict."""
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        return {**(state[0] if isinstance(state[0], dict) else {}), **state[1]}
    return state


def _call(function: Any, args: Any) -> Any:
    """What a call stands for: a plain value for the functions known here, else a placeholder."""
    if not isinstance(args, tuple):
        raise MalformedPickle("a call has no argument tuple")
    handler = _KNOWN.get((function.module, function.name)) if isinstance(function, Global) else None
    if handler is None:
        return Opaque(function, args)
    try:
        return handler(*args)
    except MalformedPickle:
        raise
    except Exception as error:
        raise MalformedPickle(f"{function} is called with unfit arguments") from error


def _storage(pid: Any) -> Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise MalformedPickle("a persistent id is not a tensor storage")
    _, kind, key, _, numel = pid[:5]
    if not isinstance(kind, Global) or not isinstance(key, str) or not _natural(numel):
        raise MalformedPickle("a tensor storage is malformed")
    if kind.name in ("UntypedStorage", "_UntypedStorage"):
        return Storage(key, None, numel)
    if kind.name not in _STORAGE_DTYPES:
        raise MalformedPickle(f"a tensor has the unknown storage type {kind}")
    return Storage(key, _STORAGE_DTYPES[kind.name], numel)


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
    capacity = storage.numel // (dtype.size if storage.dtype is None else 1)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= capacity:
        raise MalformedPickle("a tensor runs past the end of its storage")
    return TensorView(storage, dtype, offset, shape, stride)


def _tensor_v1(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _tensor_v2(
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
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Any:
    name = dtype.name if isinstance(dtype, Global) else ""
    if name not in DTYPES:
        return Refused(f"its element type {name or dtype!r} has no arithmetic")
    return _view(storage, DTYPES[name], offset, shape, stride, metadata)


def _from_type(function: Any, _type: Any, args: Any, _state: Any) -> Any:
    return _call(function, args)


def _numpy_scalar(dtype: Any, raw: Any = None) -> Any:
    """A NumPy number as a Python one: metrics are often recorded so."""
    code = dtype.args[0] if isinstance(dtype, Opaque) and dtype.args else None
    layouts = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}
    layout = layouts.get(code) if isinstance(code, str) else None
    big = isinstance(dtype, Opaque) and isinstance(dtype.state, tuple) and ">" in dtype.state
    if layout is None or not isinstance(raw, bytes):
        return Opaque(Global("numpy", "generic"), (dtype, raw))
    return struct.unpack(layout.replace("<", ">") if big else layout, raw)[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin-1" if encoding == "latin1" else "utf-8")


def _refuse(why: str) -> Callable[..., Refused]:
    return lambda *_: Refused(why)


def _mapping(*args: Any) -> dict[Any, Any]:
    """A dict, from nothing or from a list of pairs, as OrderedDict is pickled."""
    return _pairs([part for pair in args[0] for part in pair]) if args else {}


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _mapping,
    ("collections", "defaultdict"): lambda *_: {},
    ("builtins", "dict"): _mapping,
    ("builtins", "list"): lambda values=(): list(values),
    ("builtins", "tuple"): lambda values=(): tuple(values),
    ("builtins", "set"): lambda values=(): set(map(_key, values)),
    ("__builtin__", "set"): lambda values=(): set(map(_key, values)),
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda values=(): tuple(values),
    ("torch._utils", "_rebuild_tensor"): _tensor_v1,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch._utils", "_rebuild_qtensor"): _refuse("a quantized tensor"),
    ("torch._utils", "_rebuild_sparse_tensor"): _refuse("a sparse tensor"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): _refuse("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): _refuse("a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _refuse("a meta tensor without data"),
    ("torch._utils", "_rebuild_wrapper_subclass"): _refuse("a tensor subclass without plain bytes"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refuse("a tensor kept as NumPy bytes"),
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
