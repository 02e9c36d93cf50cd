"""What ``package.module:name`` and ``path/file.py:name`` stand for: found, imported and called."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ckptavg.errors import SpecError, UsageError

Arguments = Mapping[str, Any]

PREFIXES = (
    "torchvision", "timm", "hf", "imagefolder", "cifar10", "cifar100", "text", "tokens",
)  # fmt: skip
"""What stands before the colon of a specification that names no module or file."""


def split_spec(spec: str, expected: str) -> tuple[str, str]:
    """A specification at its colon: what stands before it and after it.

    Raises:
        UsageError: It has no colon, or nothing on one of its sides.
    """
    kind, separator, name = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    if not separator or not kind or not name:
        raise UsageError(f"expected {expected} but got {spec!r}")
    return kind, name


def file_of(spec: str) -> Path | None:
    """The file that a specification names, of Python, text or tokens; None if it names no file."""
    kind, _, name = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    named = Path(kind if kind.endswith(".py") else name)
    with contextlib.suppress(OSError):  # too long for a file's name, for instance
        return named if named.is_file() else None
    return None


def find_factory(home: str, name: str) -> Callable[..., Any]:
    """What ``package.module:name`` or ``path/file.py:name`` names.

    Raises:
        SpecError: The module is not found or fails on import, or has no such attribute.
    """
    module = _module_from_file(Path(home)) if home.endswith(".py") else _module(home)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            offered = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(f"{home} has no attribute {name!r}", similar(name, offered))
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{home}:{name} is expected to be callable but is a {type(found).__name__}")
    factory: Callable[..., Any] = found
    return factory


def find_forward(spec: str) -> Callable[..., Any]:
    """The function ``fn(model, batch)`` that a specification names.

    Raises:
        UsageError: It has no colon, or nothing on one of its sides.
        SpecError: It cannot be found, or does not take a model and a batch.
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
    """Whether a callable takes so many positional arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # compiled, for instance
        return True
    return True


def _module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(name, error) from error
        raise SpecError(
            f"no module named {error.name!r} is found",
            _meant(name) or "Run from the directory that holds it, or set PYTHONPATH.",
        ) from error
    except Exception as error:
        raise _failed_import(name, error) from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecError(f"the file {path} does not exist", "Expected path/file.py:factory.")
    home = str(path.resolve().parent)
    if home not in sys.path:
        sys.path.insert(0, home)  # for its own imports, and for workers that import it again
    names = (path.stem, f"ckptavg_user_{path.stem}")  # the latter where the former is in use
    for name in names:
        loaded = sys.modules.get(name)
        if getattr(loaded, "__file__", None) == str(path.resolve()) and loaded is not None:
            return loaded
    name = next((n for n in names if n not in sys.modules), names[-1])
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} cannot be imported")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module

    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_import(str(path), error) from error
    return module


def _failed_import(name: str, error: Exception) -> SpecError:
    return SpecError(
        f"importing {name} failed: {type(error).__name__}: {error}", "--debug shows where."
    )


def call_factory(spec: str, keywords: Arguments | None = None) -> Any:
    """What ``package.module:name(...)`` or ``path/file.py:name(...)`` gives.

    Raises:
        SpecError: It cannot be found, or fails.
    """
    home, name = split_spec(spec, "package.module:factory or path/file.py:factory")
    return call_named(spec, find_factory(home, name), (), keywords or {})


def call_named(
    spec: str, factory: Callable[..., Any], args: tuple[Any, ...], keywords: Arguments
) -> Any:
    """Call what a specification names.

    Raises:
        SpecError: It fails; the message says what it takes, where a keyword is not among that.
    """
    try:
        return factory(*args, **keywords)
    except SpecError:
        raise
    except Exception as error:
        accepted = parameters_of(factory)
        unknown = isinstance(error, TypeError) and accepted and set(keywords) - set(accepted)
        closed = unknown and "kwargs" not in accepted
        remedy = f"It takes {', '.join(accepted)}." if closed else "--debug shows where."
        raise SpecError(f"{spec} failed: {type(error).__name__}: {error}", remedy) from error


def parameters_of(factory: Callable[..., Any]) -> list[str]:
    """The names of what a callable takes; none where it does not tell."""
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return []


def extra(module: str, package: str) -> Any:
    """A module of a package that not everyone needs.

    Raises:
        SpecError: It cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(
            f"{package} cannot be imported: {error}", f"Install it with pip install {package}."
        ) from error


def _meant(module: str) -> str:
    """The prefix that a mistyped one was meant to be, if it is like one."""
    close = difflib.get_close_matches(module, PREFIXES, 1, 0.7)
    return f"Did you mean {close[0]}:?" if close else ""


def similar(name: str, names: Iterable[str]) -> str:
    """A remedy for a name that is not there: those that are like it."""
    close = difflib.get_close_matches(name, list(names), 3, 0.4)
    return f"Did you mean {', '.join(close)}?" if close else "Check the name."
