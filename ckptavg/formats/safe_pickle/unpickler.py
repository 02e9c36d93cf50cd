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
from collections.abc import Callable
from typing import Any, BinaryIO

from ckptavg.formats.safe_pickle.machine import MAX_PICKLE, BoundedFile, Machine
from ckptavg.formats.safe_pickle.mappings import unfold_mappings
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    Opaque,
    PickleCutShort,
    Span,
    Storage,
)

__all__ = ["MAX_PICKLE", "load", "loads"]

# Bits. A pickle can refer to one integer many times, and an output would repeat it each time.
_LONGEST_INTEGER = 4096
_INTEGER = Global("builtins", "int")


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
    source = BoundedFile(file)
    machine = Machine(source)
    try:
        for opcode, arg, start in pickletools.genops(source):  # type: ignore[arg-type]
            _execute(machine, source, opcode.name, arg, start or 0)
    except MalformedPickle:
        raise
    # A hostile stream can provoke any exception. All of them count as damage.
    except Exception as error:
        kind = PickleCutShort if source.exhausted else MalformedPickle
        raise kind(str(error)[:200] or type(error).__name__) from error
    tree = machine.result
    if machine.filled:
        tree = unfold_mappings(tree)
    return tree, machine.storages


def _execute(machine: Machine, source: BoundedFile, name: str, arg: Any, start: int) -> None:
    """Execute an opcode.

    Args:
        machine: The machine.
        source: The pickle.
        name: Name of the opcode.
        arg: Decoded argument of the opcode, if any.
        start: Position of the opcode in the pickle, in bytes.

    Raises:
        MalformedPickle: The opcode is unknown, or the pickle holds too many containers.
    """
    if name in _PUSH_ARGUMENT:
        if isinstance(arg, int) and arg.bit_length() > _LONGEST_INTEGER:
            arg = Opaque(_INTEGER)
        machine.stack.append(arg)
        if name in _LENGTH_BYTES:
            data = start + 1 + _LENGTH_BYTES[name]
            machine.keep_span(arg, Span(data, source.done - data))
        return
    if name in _CONTAINERS:
        machine.count_container()
    handler = _OPCODES.get(name)
    if handler is not None:
        handler(machine, arg)
    elif name not in _IGNORED:
        raise MalformedPickle(f"it uses the opcode {name}")


def _pusher(push: Callable[[], Any]) -> Callable[[Machine, Any], None]:
    """Make an opcode handler that pushes a fresh value."""
    return lambda m, _: m.stack.append(push())


# Opcodes that make a new object, whose number is limited.
_CONTAINERS = {
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "GLOBAL", "STACK_GLOBAL",
    "PERSID", "BINPERSID",
}  # fmt: skip
# Opcodes that only frame the stream.
_IGNORED = ("PROTO", "FRAME")
# Opcodes that push their argument on the stack.
_PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip

# Bytes of the length field of texts and bytes that are stored raw or in UTF-8.
_LENGTH_BYTES = {
    "SHORT_BINSTRING": 1, "BINSTRING": 4, "SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8,
    "SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8,
}  # fmt: skip
_OPCODES: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": lambda m, _: m.push_mark(),
    "NONE": _pusher(lambda: None),
    "NEWTRUE": _pusher(lambda: True),
    "NEWFALSE": _pusher(lambda: False),
    "EMPTY_LIST": _pusher(list),
    "EMPTY_TUPLE": _pusher(tuple),
    "EMPTY_DICT": _pusher(dict),
    "EMPTY_SET": _pusher(set),
    "STOP": lambda m, _: m.stop(),
    "POP": lambda m, _: m.discard(),
    "POP_MARK": lambda m, _: m.discard_to_mark(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "LIST": lambda m, _: m.stack.append(m.pop_mark()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push_tuple(1),
    "TUPLE2": lambda m, _: m.push_tuple(2),
    "TUPLE3": lambda m, _: m.push_tuple(3),
    "FROZENSET": lambda m, _: m.stack.append(frozenset(map(m.make_key, m.pop_mark()))),
    "DICT": lambda m, _: m.stack.append(m.make_dict(m.pop_mark())),
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
    "STACK_GLOBAL": lambda m, _: m.push_global(),
    "REDUCE": lambda m, _: m.call_function(),
    "NEWOBJ": lambda m, _: m.make_object(with_keywords=False),
    "NEWOBJ_EX": lambda m, _: m.make_object(with_keywords=True),
    "INST": lambda m, arg: m.stack.append(m.call(Global(*arg.split(" ", 1)), tuple(m.pop_mark()))),
    "OBJ": lambda m, _: m.make_object_from_mark(),
    "BUILD": lambda m, _: m.set_state(),
    "PERSID": lambda m, arg: m.push_storage(arg),
    "BINPERSID": lambda m, _: m.push_storage(m.pop()),
}
