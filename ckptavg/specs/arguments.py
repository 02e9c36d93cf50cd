"""``key=value`` arguments of the command line, converted to the types of parameters."""

from __future__ import annotations

import ast
import inspect
import json
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, Union

from ckptavg.errors import SpecError, UsageError

Arguments = Mapping[str, Any]
"""Keywords of a function: plain values, or ``Argument`` for values from the command line."""

_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_NONE = ("none", "null")
_LISTS = (list, tuple, Sequence, Iterable, Collection)
# Errors of the readers for malformed, very long or deeply nested text.
_UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


@dataclass(frozen=True)
class Argument:
    """Argument value as typed.

    Attributes:
        text: The characters after ``=``.
    """

    text: str

    @property
    def value(self) -> Any:
        """Value of the text where no type is expected."""
        return read_value(self.text)


def parse_arguments(pairs: Iterable[str]) -> dict[str, Argument]:
    """Split ``key=value`` strings.

    Raises:
        UsageError: A string has no ``=``, or no identifier before ``=``.
    """
    arguments: dict[str, Argument] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"an argument is expected to be key=value but got {pair!r}")
        arguments[key] = Argument(text)
    return arguments


def read_value(text: str) -> Any:
    """Read a value without an expected type: yes, no, none, a Python or JSON literal, else text."""
    word = text.strip().lower()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    if word in _NONE:
        return None
    with warnings.catch_warnings():
        # The compiler warns of unknown escapes, such as those in Windows paths.
        warnings.simplefilter("ignore")
        # JSON knows true and null within lists; _read_list takes any words and comes last.
        for read in (ast.literal_eval, _read_json, _read_list):
            try:
                return read(text)
            except _UNREADABLE:
                continue
    return text


def plain_value(value: Any) -> Any:
    """Return the plain value of an argument."""
    if isinstance(value, Argument):
        return value.value
    return value


def text_of(value: Any) -> str:
    """Return an argument as text, unconverted."""
    if isinstance(value, Argument):
        return value.text
    return str(value)


def fit_arguments(function: Callable[..., Any], arguments: Arguments) -> dict[str, Any]:
    """Convert typed arguments to the types that a function's parameters expect.

    The expected type is the annotation, else the type of the default. Without either,
    ``read_value`` decides.

    Args:
        function: The function to be called.
        arguments: Keywords of the function.

    Raises:
        SpecError: A text cannot be read as its parameter's type.
    """
    parameters = _parameters(function)
    fitted: dict[str, Any] = {}
    for name, value in arguments.items():
        if not isinstance(value, Argument):
            fitted[name] = value
        elif name not in parameters:
            fitted[name] = value.value
        else:
            fitted[name] = _Expectation.of(parameters[name]).read(value.text)
    return fitted


@dataclass(frozen=True)
class _Expectation:
    """Expected type of a parameter.

    Attributes:
        name: Name of the parameter.
        kinds: Admitted types; empty if unknown.
        choices: Values of a ``Literal``; empty for other types.
        strict: True for an annotation, which excludes other types; a default is only a hint.
        default: The default; ``inspect.Parameter.empty`` where there is none.
        of_texts: True where a list of texts is expected.
    """

    name: str
    kinds: tuple[Any, ...]
    choices: tuple[Any, ...]
    strict: bool
    default: Any
    of_texts: bool = False

    @classmethod
    def of(cls, parameter: inspect.Parameter) -> _Expectation:
        """Derive the expected type from annotation and default."""
        default = parameter.default
        kinds, choices = _split_hint(parameter.annotation)
        strict = bool(kinds or choices)
        has_default = default is not inspect.Parameter.empty
        if not strict and has_default and default is not None:
            kinds = (type(default),)
        elif strict and default is None:
            # A default of None beside an annotation is an old way to write "| None".
            kinds += (type(None),)
        return cls(
            parameter.name, kinds, choices, strict, default, _has_texts(parameter.annotation)
        )

    def read(self, text: str) -> Any:
        """Read a text as the expected type.

        Raises:
            SpecError: The text cannot be read as this type.
        """
        value = read_value(text)
        for choice in self.choices:
            # As text first: a choice such as "1" would be read as a number.
            if text == str(choice) or (type(value) is type(choice) and value == choice):
                return choice
        if not self.kinds and not self.choices:
            return value
        if value is None and self._admits_none(text):
            return None
        if self.of_texts and isinstance(value, (str, bool, int, float, type(None))):
            value = _split_list(text)
        for read in (_read_truth, _read_number, _read_sequence, _read_text):
            if (reading := read(text, value, self.kinds)) is not None:
                return reading
        is_kind = _is_instance_of_any(value, self.kinds)
        plain = {bool, int, float, str, list, tuple, type(None)}
        is_checked = bool in self.kinds or self.choices or (self.strict and {*self.kinds} <= plain)
        # A word may be meant where numbers are expected, such as "auto". A broken number is a typo.
        is_mistyped = {int, float} & {*self.kinds} and _begins_a_number(value)
        if (is_checked or is_mistyped) and not is_kind:
            raise SpecError(f"{self.name} is expected to be {self._wanted()} but got {text!r}")
        return value

    def _admits_none(self, text: str) -> bool:
        """Return True if a text means None; without an annotation only the exact text ``None``."""
        if type(None) in self.kinds:
            return True
        return text == "None" and not self.strict and bool not in self.kinds

    def _wanted(self) -> str:
        words = [repr(choice) for choice in self.choices]
        for kind in self.kinds:
            if kind is bool:
                words += ["yes", "no"]
            elif kind is type(None):
                words.append("none")
            else:
                words.append(f"{getattr(kind, '__name__', kind)}")
        wanted = " or ".join(dict.fromkeys(words))
        if type(self.default) in self.kinds:
            wanted += f" (its default is {self.default!r})"
        return wanted


def _read_truth(text: str, value: Any, kinds: tuple[Any, ...]) -> bool | None:
    if bool not in kinds:
        return None
    if isinstance(value, bool):
        return value
    # 0 and 1 are not truth values where numbers are expected, too.
    if type(value) is int and value in (0, 1) and not {int, float} & {*kinds}:
        return bool(value)
    del text
    return None


def _read_number(text: str, value: Any, kinds: tuple[Any, ...]) -> float | None:
    """Read a number of an expected kind: ``1e3`` may be whole, ``inf`` and ``nan`` are floats."""
    is_whole = (
        isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds
    )
    if is_whole:
        return int(value)
    if type(value) in (int, float) and (type(value) in kinds or float in kinds):
        number: float = value
        return number
    if float in kinds and isinstance(value, str):
        try:
            return float(text)
        except ValueError:
            return None
    return None


def _read_sequence(
    text: str, value: Any, kinds: tuple[Any, ...]
) -> list[Any] | tuple[Any, ...] | None:
    """Read ``1,2``, ``a,b`` or a single value where a sequence is expected."""
    sequences = [kind for kind in kinds if kind in _LISTS]
    if not sequences or (str in kinds and not isinstance(value, (list, tuple))):
        return None
    if not isinstance(value, (list, tuple)):
        value = list(map(read_value, text.split(",")))
    if sequences[0] is list:
        return list(value)
    return tuple(value)


def _read_text(text: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    """Read a text or a path, without surrounding quotes."""
    if not any(map(_is_text_or_path, kinds)):
        return None
    if type(value) is not str and type(value) in kinds:
        return value
    if isinstance(value, str):
        text = value
    if str in kinds:
        return text
    return Path(text)


def _is_text_or_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, (str, PurePath))


def _begins_a_number(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("+-.")[:1].isdigit()


def _is_instance_of_any(value: Any, kinds: Iterable[Any]) -> bool:
    for kind in kinds:
        # Some kinds, such as protocols, take no part in ``isinstance``.
        with suppress(TypeError):
            if isinstance(value, kind):
                return True
    return False


def _split_hint(hint: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split an annotation into admitted types and the choices of a ``Literal``."""
    # Annotations stay strings if their evaluation failed.
    if isinstance(hint, str):
        hint = _BY_NAME.get(hint, hint)
    unknown = hint in (Any, object, inspect.Parameter.empty)
    if unknown or isinstance(hint, (str, typing.TypeVar)):
        return (), ()
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _split_hint(typing.get_args(hint)[0])
    if origin is Literal:
        return (), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kinds: tuple[Any, ...] = ()
        choices: tuple[Any, ...] = ()
        for part in typing.get_args(hint):
            more_kinds, more_choices = _split_hint(part)
            # An unknown part may admit any type, so nothing is known of the union.
            if not more_kinds and not more_choices:
                return (), ()
            kinds, choices = kinds + more_kinds, choices + more_choices
        return kinds, choices
    return (origin or hint,), ()


def _has_texts(hint: Any) -> bool:
    """Return True for an annotation of several texts, such as ``list[str] | None``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(map(_has_texts, arguments)) and str not in arguments
    return origin in _LISTS and arguments[0] is str


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be passed by name; empty without a known signature."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except (TypeError, ValueError):
        return {}
    # Annotations may hold names that only a type checker knows, and fail on evaluation.
    except Exception:
        parameters = inspect.signature(function).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in parameters.items() if p.kind in named}


_BY_NAME = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple)}


def _read_json(text: str) -> Any:
    if not text.lstrip().startswith(("[", "{")):
        raise ValueError(text)
    return json.loads(text)


def _read_list(text: str) -> list[Any]:
    """Read ``[a,b]``, where words need no quotes."""
    inner = text.strip()
    if not (inner.startswith("[") and inner.endswith("]")) or {*"[]{}"} & {*inner[1:-1]}:
        raise ValueError(text)
    return list(map(read_value, _split_list(inner[1:-1])))


def _split_list(text: str) -> list[str]:
    """Split a text at commas, without the blanks around."""
    return [part.strip() for part in text.split(",")]
