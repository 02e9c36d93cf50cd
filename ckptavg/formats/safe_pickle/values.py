"""What an inert pickle is made of: placeholders and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ckptavg.formats.checkpoint import DTYPES, DType


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


class OrderedEntries(dict[Any, Any]):
    """What stands for an OrderedDict.

    Attributes:
        account: How ckptavg made the state dict that it is, as JSON, if it carries that.
    """

    account: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that a pickle itself holds.

    Attributes:
        start: Offset in the pickle of the first.
        length: How many bytes of the pickle they take.
        escaped: Whether they are kept as UTF-8 text, each byte as the character of that number.
    """

    start: int
    length: int
    escaped: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """A flat run of elements in the file, by its key.

    ``dtype`` is None for an untyped one. With a ``span`` they lie in the pickle itself.
    """

    key: str
    dtype: DType | None
    numel: int
    span: Span | None = None


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


@dataclass(eq=False, repr=False, slots=True)
class NumpyArray:
    """A NumPy array. ``view`` is None until its state is set, and where it holds no numbers."""

    view: TensorView | Refused | None = None


class Unpickler(Protocol):
    """What the calls need to know of the pickle that they stand in."""

    def key(self, value: Any) -> Any:
        """The value, or a placeholder for it that is hashed in bounded time."""

    def span(self, value: str | bytes | bytearray) -> Span | None:
        """Where in the pickle a value lies that was read a moment ago."""

    def keep_span(self, value: bytes, span: Span) -> None:
        """Remember that for a value that was made of another."""


def name_of(function: Any) -> tuple[str, str]:
    """Module and name of a global; Python 2's name of the builtins counts as ours."""
    if not isinstance(function, Global):
        return "", ""
    return {"__builtin__": "builtins"}.get(function.module, function.module), function.name


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
    if not isinstance(kind, Global) or not isinstance(key, str) or not is_natural(numel):
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


def is_natural(value: Any) -> bool:
    """Whether a value is a count or a size that may be computed with."""
    return type(value) is int and 0 <= value < 2**62
