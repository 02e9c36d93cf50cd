"""Values of an inert pickle: placeholders and tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ckptavg.formats.checkpoint import DTYPES, DType


class MalformedPickle(ValueError):
    """Error for a pickle that violates the pickle protocol."""


class PickleCutShort(MalformedPickle):
    """Error for a pickle that is cut short."""


@dataclass(frozen=True, slots=True)
class Global:
    """Class or function in a pickle, by name only."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Compared and hashed by identity, since a comparison of shared contents may never end.
@dataclass(eq=False, repr=False, slots=True)
class Opaque:
    """Placeholder for an object that was not built.

    Attributes:
        type: Function or class that the pickle calls.
        args: Arguments of the call.
        state: State that the pickle sets on the object (usually the attributes).
        items: Elements, or pairs of key and value, that the pickle adds to the object.
    """

    type: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        """Name the type alone.

        Contents can share parts so often that printing all of them would never end.
        """
        return f"<{self.type if isinstance(self.type, Global) else 'object'}>"


class OrderedEntries(dict[Any, Any]):
    """Stand-in for an ``OrderedDict``.

    Attributes:
        account: Record of how ckptavg made the state dict, as JSON, if present.
    """

    account: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Range of bytes in a pickle that are the contents of a value.

    Attributes:
        start: Offset of the first byte in the pickle.
        length: Number of bytes in the pickle.
        escaped: True if the contents are stored as UTF-8 text, with the character of the same
            number for each byte.
    """

    start: int
    length: int
    escaped: bool = False


@dataclass(frozen=True, slots=True)
class Storage:
    """Flat range of elements in a file, identified by a key.

    ``dtype`` is None for an untyped storage. With a ``span``, the elements are stored in the pickle
    itself.
    """

    key: str
    dtype: DType | None
    numel: int
    span: Span | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the elements; the elements of an untyped storage are bytes."""
        if self.dtype is None:
            return self.numel
        return self.dtype.nbytes(self.numel)


@dataclass(eq=False, slots=True)
class TensorView:
    """Tensor as a view of a storage; offset and strides in elements."""

    storage: Storage
    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sharded:
    """Tensor whose pieces are stored in several files, by full name in the checkpoint."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Tensor that is not plain and strided, with the reason against averaging."""

    why: str


@dataclass(eq=False, repr=False, slots=True)
class NumpyArray:
    """NumPy array in a pickle.

    ``view`` is None until the state is set, and for an array without numbers.
    """

    view: TensorView | Refused | None = None


class Unpickler(Protocol):
    """Interface of the unpickler for the stand-ins of calls."""

    def make_key(self, value: Any) -> Any:
        """Return a dict key: the value if hashing takes bounded time, else a placeholder."""

    def find_span(self, value: str | bytes | bytearray) -> Span | None:
        """Return the place of a recently read value in the pickle; None if not known."""

    def keep_span(self, value: bytes, span: Span) -> None:
        """Remember the place of a value that was made from another value of the pickle."""


def name_of(function: Any) -> tuple[str, str]:
    """Return module and name of a global, with Python 2's ``__builtin__`` as ``builtins``."""
    if not isinstance(function, Global):
        return "", ""
    return {"__builtin__": "builtins"}.get(function.module, function.module), function.name


def storage_of(pid: Any) -> Storage:
    """Parse the storage that a persistent id describes.

    Raises:
        MalformedPickle: The id describes no storage.
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


# Storages that count bytes, or whose elements never reach a plain tensor (the quantized ones).
_UNTYPED = (
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
    """Return True if a value is a count or a size that is safe to compute with."""
    return type(value) is int and 0 <= value < 2**62
