"""An unpickler that runs nothing.

It understands every opcode, builds plain values, and records what it will not build: a global is a
name, and calling one gives an ``Opaque`` placeholder, except for the few functions below that
torch and the standard library use to describe tensors and containers. Nothing is imported and no
code of the file's choosing is called, so a hostile pickle is only data.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from ckptavg.formats.table import DTYPES, DType

MAX_PICKLE = 64 * 2**20
_MOST_CONTAINERS = 5_000_000  # a byte of pickle can make one of 200 bytes
_SPARE_BUDGET = 1_000_000
_LARGE_INTEGER = 60  # bits; beyond, different integers can be made to have one hash
_MOST_COLLISIONS = 1000
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
    return load(io.BytesIO(data))[0]


def load(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from where a file stands, and leave it right behind the pickle.

    Returns:
        What ``loads`` returns, and the storages that it mentions, by key.

    Raises:
        MalformedPickle: There is no pickle, or a damaged one.
    """
    source = _Bounded(file)
    machine = _Machine(source)
    try:
        for opcode, arg, _ in pickletools.genops(source):  # type: ignore[arg-type]
            machine.step(opcode.name, arg)
    except MalformedPickle:
        raise
    except Exception as error:  # anything a hostile stream provokes: it is damage all the same
        raise MalformedPickle(str(error)[:200] or type(error).__name__) from error
    return machine.result, machine.storages


class _Bounded:
    """A file of which no more is read than a pickle may be long.

    Attributes:
        done: Bytes read so far.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.done = 0

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes."""
        if size > MAX_PICKLE - self.done:
            raise MalformedPickle(f"it is larger than {MAX_PICKLE >> 20} MiB, or cut short")
        return self._count(self._file.read(size))

    def readline(self) -> bytes:
        """A line."""
        return self._count(self._file.readline(MAX_PICKLE - self.done + 1))

    def _count(self, data: bytes) -> bytes:
        self.done += len(data)
        if self.done > MAX_PICKLE:
            raise MalformedPickle(f"it is larger than {MAX_PICKLE >> 20} MiB")
        return data


class _Machine:
    """The pickle virtual machine: a stack, the marks on it and the memo.

    Args:
        source: What the pickle is read from. The elements that may be copied or hashed in all are
            as many as it has bytes, and some: an honest pickle spells nearly every element out; one
            that copies the same list again and again would exhaust the memory.
    """

    def __init__(self, source: _Bounded) -> None:
        self.source = source
        self.spent = 0
        self.storages: dict[str, Storage] = {}
        self.containers = 0
        self.large: dict[int, int] = {}
        self.collisions = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, arg: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self.stack.append(arg)
            return
        if name in _CONTAINERS:
            self.containers += 1
            if self.containers > _MOST_CONTAINERS:
                raise MalformedPickle(f"it holds more than {_MOST_CONTAINERS} containers")
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
        if index is not None and not 0 <= index < 2**32:
            raise MalformedPickle("a memo index is out of range")
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
        if isinstance(target, dict):
            target.update(self.pairs(values))
        elif isinstance(target, Opaque):
            target.items.extend(zip(values[::2], values[1::2], strict=True))
        else:
            raise MalformedPickle(f"it stores items in a {type(target).__name__}")

    def add_items(self, values: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise MalformedPickle(f"it adds items to a {type(target).__name__}")
        target.update(map(self.key, values))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedPickle("a global is not named by strings")
        self.stack.append(Global(module, name))

    def spend(self, count: int) -> None:
        self.spent += count
        if self.spent > self.source.done + _SPARE_BUDGET:
            raise MalformedPickle("it copies its contents over and over")

    def key(self, value: Any) -> Any:
        """The value where it hashes in bounded time, a placeholder where it does not.

        Nested tuples can share their parts, which makes hashing them exponential in the input.
        """
        flat = isinstance(value, tuple)
        parts = value if flat else (value,)
        self.spend(len(parts))
        for part in parts:
            if isinstance(part, int) and part.bit_length() > _LARGE_INTEGER:
                self.spend(part.bit_length() // 64)  # what hashing it takes
                self.check_collision(part)
        if flat and all(isinstance(part, _SCALARS) for part in value):
            return value
        if isinstance(value, (*_SCALARS, Global, Opaque)):
            return value
        return Opaque(type(value).__name__, (value,))

    def check_collision(self, value: int) -> None:
        """Refuse integers made to have one hash, which turns a dict into a slow list."""
        if self.large.setdefault(hash(value), value) != value:
            self.collisions += 1
        if self.collisions > _MOST_COLLISIONS:
            raise MalformedPickle("its keys are made to collide")

    def pairs(self, values: list[Any]) -> dict[Any, Any]:
        return {self.key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}

    def call(self, function: Any, args: Any) -> Any:
        """What a call stands for: a plain value if the function is known, else a placeholder."""
        if not isinstance(args, tuple):
            raise MalformedPickle("a call has no argument tuple")
        name = _name(function)
        if name == ("torch._tensor", "_rebuild_from_type_v2") and len(args) == 4:
            return self.call(args[0], args[2])
        handler = _KNOWN.get(name)
        if handler is None:
            return Opaque(function, args)
        self.spend(len(args) + sum(len(a) for a in args[:1] if isinstance(a, _SIZED)))
        try:
            return handler(self, *args)
        except MalformedPickle:
            raise
        except Exception as error:
            raise MalformedPickle(f"{function} is called with unfit arguments") from error

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def new_object(self, with_keywords: bool) -> None:
        keywords = self.pop() if with_keywords else None
        args, cls = self.pop(), self.pop()
        made = self.call(cls, args)
        if keywords and isinstance(made, Opaque):
            made.state = keywords
        self.stack.append(made)

    def build(self) -> None:
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = self._merged(state)

    def _merged(self, state: Any) -> Any:
        """Object state as one value: a pair of attributes and slots becomes one dict."""
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            attributes = state[0] if isinstance(state[0], dict) else {}
            self.spend(len(attributes) + len(state[1]))
            return {**attributes, **state[1]}
        return state

    def object_from_mark(self) -> None:
        cls, *args = self.pop_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def persistent(self, pid: Any) -> None:
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            self.stack.append(pid[1])  # a module's class, with its source, before torch 1.6
            return
        storage = _storage(pid)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise MalformedPickle(f"the storage {storage.key!r} is described in two ways")
        self.stack.append(storage)


def _simple(push: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda m, _: m.stack.append(push())


_CONTAINERS = frozenset(
    [
        "EMPTY_LIST",
        "EMPTY_DICT",
        "EMPTY_SET",
        "LIST",
        "DICT",
        "FROZENSET",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "REDUCE",
        "NEWOBJ",
        "NEWOBJ_EX",
        "OBJ",
        "INST",
        "GLOBAL",
        "STACK_GLOBAL",
    ]
)
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
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(m.key, m.pop_mark()))),
    "DICT": lambda m, _: m.stack.append(m.pairs(m.pop_mark())),
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
    "INST": lambda m, arg: m.stack.append(m.call(Global(*arg.split(" ", 1)), tuple(m.pop_mark()))),
    "OBJ": lambda m, _: m.object_from_mark(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, arg: m.persistent(arg),
    "BINPERSID": lambda m, _: m.persistent(m.pop()),
}


_SCALARS = (str, int, float, bool, bytes, type(None))
_SIZED = (str, bytes, list, tuple, dict, set, frozenset)


def _name(function: Any) -> tuple[str, str]:
    """Module and name of a global; Python 2's name of the builtins counts as ours."""
    if not isinstance(function, Global):
        return "", ""
    return {"__builtin__": "builtins"}.get(function.module, function.module), function.name


def _storage(pid: Any) -> Storage:
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
    if math.prod(shape) >= 2**62:
        raise MalformedPickle("a tensor has more elements than can be counted")
    element = 1 if storage.dtype is None else storage.dtype.size
    capacity = storage.numel * element // dtype.size
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if 0 not in shape and last >= capacity:
        raise MalformedPickle("a tensor runs past the end of its storage")
    return TensorView(storage, dtype, offset, shape, stride)


def _tensor_v1(_: _Machine, storage: Any, offset: Any, shape: Any, stride: Any, *_rest: Any) -> Any:
    return _view(storage, getattr(storage, "dtype", None), offset, shape, stride)


def _tensor_v2(
    _: _Machine,
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
    _: _Machine,
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


def _numpy_scalar(_: _Machine, dtype: Any, raw: Any = None) -> Any:
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


def _encode(_: _Machine, text: str, encoding: str) -> bytes:
    return text.encode("latin-1" if encoding == "latin1" else "utf-8")


def _refuse(why: str) -> Callable[..., Refused]:
    return lambda *_: Refused(why)


def _first(_: _Machine, data: Any, *_others: Any) -> Any:
    return data


def _mapping(machine: _Machine, pairs: Any = ()) -> dict[Any, Any]:
    """A dict, from nothing or from a list of pairs, as OrderedDict is pickled."""
    return {machine.key(key): value for key, value in pairs}


def _set(machine: _Machine, values: Any = ()) -> set[Any]:
    return set(map(machine.key, values))


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
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
    ("torch._utils", "_rebuild_wrapper_subclass"): _refuse("a tensor subclass without plain bytes"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _refuse("a tensor kept as NumPy bytes"),
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
}
