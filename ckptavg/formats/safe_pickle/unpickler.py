"""Unpickler that runs no code of a pickle.

The unpickler understands every opcode that ``torch.save`` writes, and builds plain values. A global
is recorded as a name. The call of a global gives an ``Opaque`` placeholder. The exceptions are the
few functions in ``calls`` that torch and the standard library use to describe tensors and
containers. Nothing is imported, and no code that the file names is called. A hostile pickle is
therefore only data.
"""

from __future__ import annotations

import io
import pickletools
from collections import deque
from collections.abc import Callable
from typing import Any, BinaryIO

from ckptavg.errors.printable import size_text
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safe_pickle import arrays
from ckptavg.formats.safe_pickle.calls import known_call
from ckptavg.formats.safe_pickle.mappings import unfold_mappings
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    NumpyArray,
    Opaque,
    OrderedEntries,
    PickleCutShort,
    Span,
    Storage,
    name_of,
    storage_of,
)

# Bytes of a pickle that are read at most.
MAX_PICKLE = 64 * 2**20
# One byte of a pickle can make a container of 200 bytes in memory.
_MOST_CONTAINERS = 5_000_000
# Elements that may be copied or hashed beyond one per byte of the pickle.
_SPARE_BUDGET = 1_000_000
# Bits. Different integers above this size can be made to have the same hash.
_LARGE_INTEGER = 60
# Bits. A pickle can refer to one integer many times, and an output would repeat it each time.
_LONGEST_INTEGER = 4096
_INTEGER = Global("builtins", "int")
_MOST_COLLISIONS = 1000
# Texts and bytes, at most, between the contents of an array and the call that makes the array.
_RECENT = 16
_MARK = object()
_SCALARS = (str, int, float, bool, bytes, type(None))
_FROM_TYPE = (("torch._tensor", "_rebuild_from_type_v2"), ("torch._tensor", "_rebuild_from_type"))
_SIZED = (str, bytes, list, tuple, dict, set, frozenset)


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
    """Read one pickle from the current position of a file, and stop right behind the pickle.

    Returns:
        The object as in ``loads``; and the storages of the pickle, by key.

    Raises:
        MalformedPickle: There is no pickle, or a damaged one.
    """
    source = _Bounded(file)
    machine = _Machine(source)
    try:
        for opcode, arg, start in pickletools.genops(source):  # type: ignore[arg-type]
            machine.step(opcode.name, arg, start or 0)
    except MalformedPickle:
        raise
    # A hostile stream can provoke any exception. All of them count as damage.
    except Exception as error:
        kind = PickleCutShort if source.exhausted else MalformedPickle
        raise kind(str(error)[:200] or type(error).__name__) from error
    tree = unfold_mappings(machine.result) if machine.filled else machine.result
    return tree, machine.storages


class _Bounded:
    """File reader that stops at the largest size of a pickle.

    Attributes:
        done: Number of bytes read so far.
        exhausted: True if the file ended before the last read was complete.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.done = 0
        self.exhausted = False

    def read(self, size: int) -> bytes:
        """Read at most ``size`` bytes."""
        if size > MAX_PICKLE - self.done:
            raise MalformedPickle(f"it is larger than {size_text(MAX_PICKLE)}, or cut short")
        data = self._file.read(size)
        self.exhausted = len(data) < size
        return self._count(data)

    def readline(self) -> bytes:
        """Read a line."""
        line = self._file.readline(MAX_PICKLE - self.done + 1)
        self.exhausted = not line.endswith(b"\n")
        return self._count(line)

    def tell(self) -> int:
        """Return the number of bytes read so far, which is the position in the pickle."""
        return self.done

    def _count(self, data: bytes) -> bytes:
        """Count the bytes that were read, and refuse a pickle that is too large."""
        self.done += len(data)
        if self.done > MAX_PICKLE:
            raise MalformedPickle(f"it is larger than {size_text(MAX_PICKLE)}")
        return data


class _Machine:
    """Pickle virtual machine: a stack with marks, and a memo.

    Args:
        source: File that the pickle is read from. The number of elements that may be copied or
            hashed is limited to the bytes read, plus a spare budget. An honest pickle writes out
            nearly every element. A hostile pickle that copies the same list again and again would
            exhaust the memory.
    """

    def __init__(self, source: _Bounded) -> None:
        self.source = source
        self.spent = 0
        self.storages: dict[str, Storage] = {}
        self.containers = 0
        self.hashes: dict[int, Any] = {}
        self.collisions = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None
        # True once an object of an unknown class got items by name.
        self.filled = False
        # Places of the last few texts and bytes. Those of length 1 are all kept, since Python has
        # one object for each, which may come again at any time.
        self.recent: deque[tuple[Any, Span]] = deque(maxlen=_RECENT)
        self.single: dict[Any, Span] = {}

    def step(self, name: str, arg: Any, start: int) -> None:
        """Execute an opcode.

        Args:
            name: Name of the opcode.
            arg: Decoded argument of the opcode, if any.
            start: Position of the opcode in the pickle, in bytes.

        Raises:
            MalformedPickle: The opcode is unknown, or the pickle holds too many containers.
        """
        if name in _PUSH_ARGUMENT:
            huge = isinstance(arg, int) and arg.bit_length() > _LONGEST_INTEGER
            self.stack.append(Opaque(_INTEGER) if huge else arg)
            if name in _LENGTH_BYTES:
                data = start + 1 + _LENGTH_BYTES[name]
                self.keep_span(arg, Span(data, self.source.done - data))
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

    def keep_span(self, value: Any, span: Span) -> None:
        """Remember the place of a text or bytes in the pickle."""
        self.recent.append((value, span))
        if len(value) == 1 and not isinstance(value, bytearray):
            self.single[value] = span

    def span(self, value: Any) -> Span | None:
        """Return the place of a text or bytes in the pickle; None if read too long ago."""
        spans = (span for candidate, span in reversed(self.recent) if candidate is value)
        single = self.single.get(value) if isinstance(value, (str, bytes)) else None
        return next(spans, single)

    def pop(self) -> Any:
        """Pop the top of the stack."""
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedPickle("its stack runs empty")
        return value

    def pop_mark(self) -> list[Any]:
        """Pop all values down to the last mark, and the mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise MalformedPickle("a mark is missing")

    def drop_to_mark(self) -> None:
        """Discard all values down to the last mark, and the mark."""
        self.pop_mark()

    def top(self) -> Any:
        """Return the top of the stack."""
        value = self.stack[-1]
        if value is _MARK:
            raise MalformedPickle("its stack runs empty")
        return value

    def remember(self, index: int | None = None) -> None:
        """Store the top of the stack in the memo, under the next free index by default."""
        if index is not None and not 0 <= index < 2**32:
            raise MalformedPickle("a memo index is out of range")
        if len(self.memo) >= _MOST_CONTAINERS:
            raise MalformedPickle(f"it remembers more than {_MOST_CONTAINERS} values")
        self.memo[len(self.memo) if index is None else index] = self.top()

    def recall(self, index: int) -> None:
        """Push a value of the memo."""
        self.stack.append(self.memo[index])

    def stop(self) -> None:
        """Take the top of the stack as the result."""
        self.result = self.pop()

    def pop_one(self) -> None:
        """Discard the top of the stack."""
        self.stack.pop()

    def tuple_of(self, count: int) -> None:
        """Replace the last ``count`` values on the stack by a tuple."""
        self.stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def append(self, values: list[Any]) -> None:
        """Append values to the list, or to the placeholder, at the top of the stack."""
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Opaque):
            target.items.extend(values)
        else:
            raise MalformedPickle(f"it appends to a {type(target).__name__}")

    def set_items(self, values: list[Any]) -> None:
        """Add keys and values by turns to the container at the top of the stack."""
        target = self.top()
        if isinstance(target, dict):
            target.update(self.pairs(values))
        elif isinstance(target, Opaque):
            self.filled = True
            target.items.extend(zip(values[::2], values[1::2], strict=True))
        else:
            raise MalformedPickle(f"it stores items in a {type(target).__name__}")

    def add_items(self, values: list[Any]) -> None:
        """Add values to the set at the top of the stack."""
        target = self.top()
        if not isinstance(target, set):
            raise MalformedPickle(f"it adds items to a {type(target).__name__}")
        target.update(map(self.key, values))

    def stack_global(self) -> None:
        """Push the global whose module and name are on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedPickle("a global is not named by strings")
        self.stack.append(Global(module, name))

    def spend(self, count: int) -> None:
        """Count elements that are copied or hashed, and refuse a pickle beyond the budget."""
        self.spent += count
        if self.spent > self.source.done + _SPARE_BUDGET:
            raise MalformedPickle("it copies its contents over and over")

    def key(self, value: Any) -> Any:
        """Return a dict key: the value if hashing takes bounded time, else a placeholder.

        Nested tuples can share parts, and hashing then takes time exponential in the input.
        """
        flat = isinstance(value, tuple)
        parts = value if flat else (value,)
        self.spend(len(parts))
        for part in parts:
            if isinstance(part, int) and part.bit_length() > _LARGE_INTEGER:
                # The cost of hashing the integer.
                self.spend(part.bit_length() // 64)
                self.check_collision(part)
        if flat and all(isinstance(part, _SCALARS) for part in value):
            # Tuples of small numbers can already be made to have the same hash.
            self.check_collision(value)
            return value
        if isinstance(value, (*_SCALARS, Global, Opaque)):
            return value
        return Opaque(type(value).__name__, (value,))

    def check_collision(self, value: Any) -> None:
        """Refuse keys that were made to share a hash, which makes a dict as slow as a list."""
        if self.hashes.setdefault(hash(value), value) != value:
            self.collisions += 1
        if self.collisions > _MOST_COLLISIONS:
            raise MalformedPickle("its keys are made to collide")

    def pairs(self, values: list[Any]) -> dict[Any, Any]:
        """Make a dict from keys and values by turns."""
        return {self.key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}

    def call(self, function: Any, args: Any) -> Any:
        """Evaluate a call: a plain value if the function is known, else a placeholder.

        Raises:
            MalformedPickle: The arguments do not fit the function.
        """
        if not isinstance(args, tuple):
            raise MalformedPickle("a call has no argument tuple")
        if name_of(function) in _FROM_TYPE and len(args) == 4:
            return self.call(args[0], args[2])
        handler = known_call(function)
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
        """Call a function with arguments, both from the stack."""
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def new_object(self, with_keywords: bool) -> None:
        """Create an object of a class with arguments from the stack."""
        keywords = self.pop() if with_keywords else None
        args, cls = self.pop(), self.pop()
        instance = self.call(cls, args)
        if keywords and isinstance(instance, Opaque):
            instance.state = keywords
        self.stack.append(instance)

    def build(self) -> None:
        """Set a state from the stack on the object below."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = self._merged(state)
        elif isinstance(target, NumpyArray):
            arrays.set_state(self, target, state)
        elif isinstance(target, OrderedEntries) and isinstance(state, dict):
            account = state.get(PROVENANCE)
            target.account = account if isinstance(account, str) else None

    def _merged(self, state: Any) -> Any:
        """Merge a state that is a pair of attributes and slots into one dict."""
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            attributes = state[0] if isinstance(state[0], dict) else {}
            self.spend(len(attributes) + len(state[1]))
            return {**attributes, **state[1]}
        return state

    def object_from_mark(self) -> None:
        """Create an object from a class and arguments above the last mark."""
        cls, *args = self.pop_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def persistent(self, pid: Any) -> None:
        """Push the storage that a persistent id names."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            # Before torch 1.6, the class of a module was stored together with the source code.
            self.stack.append(pid[1])
            return
        storage = storage_of(pid)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise MalformedPickle(f"the storage {storage.key!r} is described in two ways")
        self.stack.append(storage)


def _simple(push: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    """Return an opcode handler that pushes a fresh value."""
    return lambda m, _: m.stack.append(push())


# Opcodes that make a new object, whose number is limited.
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
        "PERSID",
        "BINPERSID",
    ]
)
# Opcodes that only frame the stream.
_IGNORED = ("PROTO", "FRAME")
# Opcodes that push their argument on the stack.
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

# Bytes of the length field of texts and bytes that are stored raw or in UTF-8.
_LENGTH_BYTES = {
    "SHORT_BINSTRING": 1, "BINSTRING": 4, "SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8,
    "SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8,
}  # fmt: skip
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
