"""Import and call of the objects of ``package.module:name`` and ``path/file.py:name``."""

from __future__ import annotations

import contextlib
import inspect
import os
import traceback
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptavg.errors import SpecError, UsageError
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.specs.arguments import Arguments, fit_arguments
from ckptavg.specs.prefixes import LIGHTNING, OWN_CODE
from ckptavg.specs.user_modules import (
    import_file,
    import_module_by_name,
    imports_from,
    is_library,
    users_code,
)


def split_spec(spec: str, expected: str, remedy: str = "") -> tuple[str, str]:
    """Split a specification at its colon.

    Args:
        spec: The specification.
        expected: The permitted forms, for the message.
        remedy: A suggestion for a specification without these forms.

    Returns:
        The texts before and after the colon.

    Raises:
        UsageError: There is no colon, or no text on one side.
    """
    kind, separator, name = partition_spec(spec)
    if not separator or not kind or not name:
        raise UsageError(f"expected {expected} but got {spec!r}", remedy)
    return kind, name


def file_of(spec: str) -> Path | None:
    """Find the Python, text or token file in a specification; None if there is no such file."""
    kind, _, name = partition_spec(spec.removeprefix(f"{LIGHTNING}:"))
    file = Path(name)
    if kind.endswith(".py"):
        file = Path(kind)
    # The text may be invalid as a file name, for instance too long.
    with contextlib.suppress(OSError):
        if file.is_file():
            return file
    return None


def partition_spec(spec: str) -> tuple[str, str, str]:
    """Partition a specification at the colon before the name."""
    # The path of a file may hold colons itself, so the last colon counts there.
    if ".py:" in spec and not spec.startswith(f"{LIGHTNING}:"):
        return spec.rpartition(":")
    return spec.partition(":")


def find_object(home: str, name: str) -> Any:
    """Import the object of ``package.module:name`` or ``path/file.py:name``.

    Args:
        home: The module or file.
        name: The attribute, with dots for nested attributes.

    Raises:
        SpecError: The module is not found or fails on import, or has no such attribute.
    """
    module = _import_home(home)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise SpecError(f"{home} has no attribute {name!r}", similar(name, _offered(module)))
        value = getattr(value, part)
    return value


def _offered(module: ModuleType) -> list[str]:
    """List the public callables of a module: its own, or the imported ones if it has none."""
    public: list[str] = []
    defined: list[str] = []
    for name, value in vars(module).items():
        if callable(value) and not name.startswith("_"):
            public.append(name)
            if getattr(value, "__module__", "") == module.__name__:
                defined.append(name)
    return defined or public


def find_factory(home: str, name: str) -> Callable[..., Any]:
    """Import the function or class of ``package.module:name`` or ``path/file.py:name``.

    Raises:
        SpecError: The object is not found, the module fails on import, or the object cannot be
            called.
    """
    value = find_object(home, name)
    if not callable(value):
        raise SpecError(f"{home}:{name} is expected to be callable but is a {type(value).__name__}")
    factory: Callable[..., Any] = value
    return factory


def find_forward(spec: str) -> Callable[..., Any]:
    """Import the function ``fn(model, batch)`` of a specification.

    Raises:
        UsageError: The specification has no colon, or no text on one side.
        SpecError: The function cannot be found, or does not take a model and a batch.
    """
    home, name = split_spec(spec, "path/file.py:function or package.module:function")
    function = find_factory(home, name)
    if inspect.isclass(function) or not _takes(function, 2):
        takes = ", ".join(parameters_of(function))
        raise SpecError(
            f"{spec} is expected to be a function of a model and a batch but takes ({takes})",
            "Define it as fn(model, batch), which returns what the model returns.",
        )
    return function


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return True if a callable takes ``count`` positional arguments or has no signature."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    # Compiled functions may have no signature.
    except ValueError:
        return True
    return True


def _import_home(home: str) -> ModuleType:
    if home.endswith(".py"):
        return _module_from_file(Path(home))
    return _module_by_name(home)


def _module_by_name(name: str) -> ModuleType:
    try:
        with users_code():
            return import_module_by_name(name)
    except ModuleNotFoundError as error:
        # The module itself was found, and fails on an import of its own.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(name, error) from error
        raise SpecError(
            f"no module named {error.name!r} is found",
            "Run from the directory that holds it, or set PYTHONPATH.",
        ) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(name, error) from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = close_names(path.name, _python_files(path.parent), 1)
        remedy = did_you_mean([str(path.with_name(name)) for name in near]) or "Check the path."
        raise SpecError(f"the file {path} does not exist", remedy)
    try:
        with users_code():
            return import_file(path)
    # A script without a main guard may end the program on import.
    except (Exception, SystemExit) as error:
        raise _failed_import(str(path), error) from error


def _python_files(directory: Path) -> list[str]:
    try:
        return [path.name for path in directory.iterdir() if path.suffix == ".py"]
    except OSError:
        return []


def _imports_for(spec: str) -> AbstractContextManager[Any]:
    """Allow imports from the directory of a specification's file, if there is a file."""
    kind, _, _ = partition_spec(spec.removeprefix(f"{LIGHTNING}:"))
    if not kind.endswith(".py"):
        return contextlib.nullcontext()
    return imports_from(Path(kind).parent)


def _failed_import(name: str, error: BaseException) -> SpecError:
    if isinstance(error, SystemExit):
        return SpecError(
            f"importing {name} ended the program{_line_of(error)}",
            'Put what it runs as a script below if __name__ == "__main__":.',
        )
    return SpecError(f"importing {name} failed: {describe_failure(error)}")


def describe_failure(error: BaseException) -> str:
    """Word an error from users' code: type, message, and the line of users' code."""
    description = type(error).__name__
    if str(error):
        description += f": {error}"
    return description + _line_of(error)


def _line_of(error: BaseException) -> str:
    """Name the innermost line of users' own code in the traceback of an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not is_library(frame.filename):
            path = os.path.relpath(frame.filename)
            if path.startswith(os.pardir):
                path = frame.filename
            line = f"{path}:{frame.lineno}"
            if not frame.name.startswith("<"):
                line += f" in {frame.name}"
            return f" ({line})"
    return ""


def call_factory(spec: str, arguments: Arguments | None = None) -> Any:
    """Call the function or class of ``package.module:name`` or ``path/file.py:name``.

    Raises:
        SpecError: The function or class cannot be found, or the call fails.
    """
    home, name = split_spec(spec, OWN_CODE)
    return call_named(spec, find_factory(home, name), (), arguments or {})


def take_or_call(spec: str, arguments: Arguments, is_product: Callable[[Any], bool]) -> Any:
    """Return the object of a specification, or call the function or class of a specification.

    Args:
        spec: ``package.module:name`` or ``path/file.py:name``.
        arguments: Keywords of the function or class.
        is_product: Returns True for a finished object, False for a function that makes the object.

    Raises:
        SpecError: The object cannot be found or called, the call fails, or a finished object is
            given arguments.
    """
    home, name = split_spec(spec, OWN_CODE)
    value = find_object(home, name)
    if isinstance(value, type) or not is_product(value):
        if not callable(value):
            kind = type(value).__name__
            raise SpecError(f"{spec} is expected to be callable but is a {kind}")
        return call_named(spec, value, (), arguments)
    if arguments:
        raise SpecError(
            f"{spec} is a {type(value).__name__} that is made already, and takes no arguments",
            "Name a function or a class to pass some.",
        )
    return value


def call_named(
    spec: str, factory: Callable[..., Any], args: tuple[Any, ...], arguments: Arguments
) -> Any:
    """Call the function or class of a specification.

    Args:
        spec: The specification, for messages.
        factory: The function or class.
        args: Positional arguments.
        arguments: Keywords, converted to the types of the factory's parameters.

    Raises:
        SpecError: The call fails, or an argument has the wrong type. The remedy lists the
            parameters if a keyword is unknown.
    """
    try:
        keywords = fit_arguments(factory, arguments)
    except SpecError as error:
        raise SpecError(f"{spec}: {error.message}", error.remedy) from error
    try:
        with users_code(), _imports_for(spec):
            return factory(*args, **keywords)
    # An error of ckptavg's own has a better remedy than the general one below.
    except SpecError:
        raise
    except (Exception, SystemExit) as error:
        remedy = _call_remedy(factory, args, keywords, error)
        raise SpecError(f"{spec} failed: {describe_failure(error)}", remedy) from error


def _call_remedy(
    factory: Callable[..., Any],
    args: tuple[Any, ...],
    keywords: Arguments,
    error: BaseException,
) -> str:
    """Word the remedy for a failed call: unknown or missing arguments; empty for other errors."""
    accepted = parameters_of(factory)
    # Python reports unknown and missing arguments as TypeError.
    if not isinstance(error, TypeError) or not accepted:
        return ""
    unknown = set(keywords) - set(accepted)
    if unknown and "kwargs" not in accepted:
        close: list[str] = []
        for keyword in sorted(unknown):
            close += close_names(keyword, accepted, 1)
        return did_you_mean(close) or f"It takes {', '.join(accepted)}."
    needed = required_parameters(factory)[len(args) :]
    missing = [f"{name}=VALUE" for name in needed if name not in keywords]
    if missing:
        return f"Pass {' and '.join(missing)} among its arguments."
    return ""


def parameters_of(factory: Callable[..., Any]) -> list[str]:
    """List the names of a callable's parameters; empty without a known signature."""
    return [*_signature(factory)]


def required_parameters(factory: Callable[..., Any]) -> list[str]:
    """List a callable's parameters without default; empty without a known signature."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names: list[str] = []
    for name, parameter in _signature(factory).items():
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variable:
            names.append(name)
    return names


def _signature(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return {}


def similar(name: str, names: Iterable[str]) -> str:
    """Word the remedy for an unknown name by similar names."""
    return did_you_mean(close_names(name, names)) or "Check the name."
