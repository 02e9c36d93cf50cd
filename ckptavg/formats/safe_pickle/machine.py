"""Virtual machine of the unpickler: a stack, a memo, and limits on what a pickle may cost."""

from __future__ import annotations

from collections import deque
from typing import Any, BinaryIO

from ckptavg.errors.printable import size_text
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safe_pickle import arrays
from ckptavg.formats.safe_pickle.calls import known_call
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    NumpyArray,
    Opaque,
    OrderedEntries,
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
_MOST_COLLISIONS = 1000
# Texts and bytes, at most, between the contents of an array and the call that makes the array.
_RECENT = 16
_MARK = object()
_SCALARS = (str, int, float, bool, bytes, type(None))
_FROM_TYPE = (("torch._tensor", "_rebuild_from_type_v2"), ("torch._tensor", "_rebuild_from_type"))
_SIZED = (str, bytes, list, tuple, dict, set, frozenset)


class BoundedFile:
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


class Machine:
    """Pickle virtual machine: a stack with marks, and a memo.

    The number of elements that may be copied or hashed is limited to the bytes read, plus a spare
    budget. An honest pickle writes out nearly every element. A hostile pickle that copies the same
    list again and again would exhaust the memory.

    Args:
        source: File that the pickle is read from.

    Attributes:
        stack: Values of the pickle, with marks.
        storages: Storages of tensors, by key.
        filled: True once an object of an unknown class got items by name.
        result: The object, once the pickle is read.
    """

    def __init__(self, source: BoundedFile) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self.filled = False
        self.result: Any = None
        self._source = source
        self._memo: dict[int, Any] = {}
        self._containers = 0
        self._spent = 0
        self._hashes: dict[int, Any] = {}
        self._collisions = 0
        # Places of the last few texts and bytes. Those of length 1 are all kept, since Python has
        # one object for each, which may come again at any time.
        self._recent: deque[tuple[Any, Span]] = deque(maxlen=_RECENT)
        self._single: dict[Any, Span] = {}

    def count_container(self) -> None:
        """Count an opcode that makes an object, and refuse a pickle with too many."""
        self._containers += 1
        if self._containers > _MOST_CONTAINERS:
            raise MalformedPickle(f"it holds more than {_MOST_CONTAINERS} containers")

    def push_mark(self) -> None:
        """Push a mark."""
        self.stack.append(_MARK)

    def keep_span(self, value: Any, span: Span) -> None:
        """Remember the place of a text or bytes in the pickle."""
        self._recent.append((value, span))
        if len(value) == 1 and not isinstance(value, bytearray):
            self._single[value] = span

    def find_span(self, value: Any) -> Span | None:
        """Return the place of a text or bytes in the pickle; None if read too long ago."""
        span: Span | None
        for candidate, span in reversed(self._recent):
            if candidate is value:
                return span
        if isinstance(value, (str, bytes)):
            return self._single.get(value)
        return None

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

    def discard_to_mark(self) -> None:
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
        if len(self._memo) >= _MOST_CONTAINERS:
            raise MalformedPickle(f"it remembers more than {_MOST_CONTAINERS} values")
        if index is None:
            index = len(self._memo)
        self._memo[index] = self.top()

    def recall(self, index: int) -> None:
        """Push a value of the memo."""
        self.stack.append(self._memo[index])

    def stop(self) -> None:
        """Take the top of the stack as the result."""
        self.result = self.pop()

    def discard(self) -> None:
        """Discard the top of the stack."""
        self.stack.pop()

    def push_tuple(self, count: int) -> None:
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
            target.update(self.make_dict(values))
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
        target.update(map(self.make_key, values))

    def push_global(self) -> None:
        """Push the global whose module and name are on the stack."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise MalformedPickle("a global is not named by strings")
        self.stack.append(Global(module, name))

    def spend(self, count: int) -> None:
        """Count elements that are copied or hashed, and refuse a pickle beyond the budget."""
        self._spent += count
        if self._spent > self._source.done + _SPARE_BUDGET:
            raise MalformedPickle("it copies its contents over and over")

    def make_key(self, value: Any) -> Any:
        """Return a dict key: the value if hashing takes bounded time, else a placeholder.

        Nested tuples can share parts, and hashing then takes time exponential in the input.
        """
        if isinstance(value, tuple):
            return self._tuple_key(value)
        self.spend(1)
        self._check_integer(value)
        if isinstance(value, (*_SCALARS, Global, Opaque)):
            return value
        return Opaque(type(value).__name__, (value,))

    def _tuple_key(self, value: tuple[Any, ...]) -> Any:
        """Return a dict key for a tuple: the tuple if it is flat, else a placeholder."""
        self.spend(len(value))
        flat = True
        for part in value:
            self._check_integer(part)
            flat = flat and isinstance(part, _SCALARS)
        if not flat:
            return Opaque(type(value).__name__, (value,))
        # Tuples of small numbers can already be made to have the same hash.
        self._check_collision(value)
        return value

    def _check_integer(self, value: Any) -> None:
        """Count the cost of hashing a large integer, and check for a collision."""
        if isinstance(value, int) and value.bit_length() > _LARGE_INTEGER:
            self.spend(value.bit_length() // 64)
            self._check_collision(value)

    def _check_collision(self, value: Any) -> None:
        """Refuse keys that were made to share a hash, which makes a dict as slow as a list."""
        if self._hashes.setdefault(hash(value), value) != value:
            self._collisions += 1
        if self._collisions > _MOST_COLLISIONS:
            raise MalformedPickle("its keys are made to collide")

    def make_dict(self, values: list[Any]) -> dict[Any, Any]:
        """Make a dict from keys and values by turns."""
        return {self.make_key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}

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
        self.spend(len(args))
        if args and isinstance(args[0], _SIZED):
            self.spend(len(args[0]))
        try:
            return handler(self, *args)
        except MalformedPickle:
            raise
        except Exception as error:
            raise MalformedPickle(f"{function} is called with unfit arguments") from error

    def call_function(self) -> None:
        """Call a function with arguments, both from the stack."""
        args, function = self.pop(), self.pop()
        self.stack.append(self.call(function, args))

    def make_object(self, with_keywords: bool) -> None:
        """Create an object of a class with arguments from the stack."""
        keywords = None
        if with_keywords:
            keywords = self.pop()
        args, cls = self.pop(), self.pop()
        instance = self.call(cls, args)
        if keywords and isinstance(instance, Opaque):
            instance.state = keywords
        self.stack.append(instance)

    def set_state(self) -> None:
        """Set a state from the stack on the object below."""
        state = self.pop()
        target = self.top()
        if isinstance(target, Opaque):
            target.state = self._merge_slots(state)
        elif isinstance(target, NumpyArray):
            arrays.set_state(self, target, state)
        elif isinstance(target, OrderedEntries) and isinstance(state, dict):
            account = state.get(PROVENANCE)
            if isinstance(account, str):
                target.account = account

    def _merge_slots(self, state: Any) -> Any:
        """Merge a state that is a pair of attributes and slots into one dict."""
        if not isinstance(state, tuple) or len(state) != 2 or not isinstance(state[1], dict):
            return state
        attributes, slots = state
        if not isinstance(attributes, dict):
            attributes = {}
        self.spend(len(attributes) + len(slots))
        return {**attributes, **slots}

    def make_object_from_mark(self) -> None:
        """Create an object from a class and arguments above the last mark."""
        cls, *args = self.pop_mark()
        self.stack.append(self.call(cls, tuple(args)))

    def push_storage(self, pid: Any) -> None:
        """Push the storage that a persistent id names."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            # Before torch 1.6, the class of a module was stored together with the source code.
            self.stack.append(pid[1])
            return
        storage = storage_of(pid)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise MalformedPickle(f"the storage {storage.key!r} is described in two ways")
        self.stack.append(storage)
