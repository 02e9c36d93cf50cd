"""Import of users' files, where files of one directory import each other by plain names.

A file is a module of its own name if an import by this name finds the file and its imports, in
other processes too. Otherwise the file is a submodule of this module, with the path in the name.
Then the name alone is enough for an import, which spawned worker processes need.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from contextvars import ContextVar
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import ckptavg

# Makes this module a package, whose submodules ``_Finder`` finds.
__path__: list[str] = []
# Held while users' code is imported or called: threads share ``sys.path`` and ``sys.modules``.
_lock = threading.RLock()
# Directories that this module has added to ``sys.path``, by the number of contexts that need each.
_added: Counter[str] = Counter()
# Directories that the current context of ``keep_imports`` needs; None outside such a context.
_needed: ContextVar[set[str] | None] = ContextVar("needed", default=None)
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_LIBRARIES.add(str(Path(ckptavg.__file__).parent))
# Per directory, the modules whose names other modules have; out of ``sys.modules`` between imports.
_set_aside: dict[str, dict[str, ModuleType]] = {}


@contextmanager
def keep_imports() -> Iterator[None]:
    """Keep the directories of users' modules on ``sys.path`` until the context ends.

    Users' functions may import neighbours when they are called, and processes that are started
    anew import the files again. Afterwards ``sys.path`` is as before. Contexts may be nested, and
    open in several threads at once.
    """
    needed: set[str] = set()
    token = _needed.set(needed)
    try:
        yield
    finally:
        _needed.reset(token)
        with _lock:
            for directory in needed:
                _release(directory)


@contextmanager
def users_code() -> Iterator[None]:
    """Run users' code alone among threads, with output to stderr, since stdout is for results."""
    with _lock, redirect_stdout(sys.stderr):
        yield


def import_module_by_name(name: str) -> ModuleType:
    """Import a module, also from the working directory.

    A console script has its own directory on ``sys.path`` instead.
    """
    with _lock, _kept():
        _add_to_path(str(Path.cwd()), first=True)
        return import_module(name)


def import_file(path: Path) -> ModuleType:
    """Import a Python file, once.

    Within a context of ``keep_imports``, the directory of the file stays on ``sys.path``.
    """
    path = path.resolve()
    with imports_from(path.parent) as in_use:
        return _loaded(path) or _load(path, in_use)


@contextmanager
def imports_from(home: Path) -> Iterator[Collection[str]]:
    """Make imports find the files of a directory first, within a context.

    A user's module from elsewhere is set aside if the directory has a file of the same name, and is
    restored on exit. The directory's own modules of such names are kept for the next context.
    Libraries are never set aside.

    Args:
        home: The directory.

    Yields:
        Names of the directory's modules that modules from elsewhere have, or would have once
        imported.
    """
    home = home.resolve()
    with _lock, _kept():
        _add_to_path(str(home))
        names = {name for name in _list_modules(home) if _is_in_use(name, home)}
        displaced = _take_out(names)
        outer = _FINDER.siblings
        _FINDER.siblings = _files_of(home, names)
        own_modules = _set_aside.setdefault(str(home), {})
        sys.modules.update(own_modules)
        # First, for the time being: the entry from above may come after other directories.
        sys.path.insert(0, str(home))
        try:
            yield names
        finally:
            _FINDER.siblings = outer
            _remove_from_path(str(home))
            own_modules.update(_take_out(names))
            sys.modules.update(displaced)


def is_library(filename: str) -> bool:
    """Return True for a file of Python, an installed package or ckptavg; False for users' code."""
    parents = map(str, Path(filename).parents)
    return filename[:1] == "<" or "dist-packages" in filename or not _LIBRARIES.isdisjoint(parents)


def _loaded(path: Path) -> ModuleType | None:
    for name in (_name_below(path), path.stem):
        if getattr(module := sys.modules.get(name), "__file__", None) == str(path):
            return module
    return None


def _load(path: Path, in_use: Collection[str]) -> ModuleType:
    name = path.stem
    if in_use or name in sys.modules:
        name = _name_below(path)
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = module_from_spec(spec)
    # Other files of the directory import this file by the plain name.
    names = {name, path.stem} - {*sys.modules}
    sys.modules.update(dict.fromkeys(names, module))
    try:
        spec.loader.exec_module(module)
    # A failed import leaves no half-initialized module behind, as with ``import`` itself.
    except BaseException:
        for added in names:
            sys.modules.pop(added, None)
        raise
    return module


def _name_below(path: Path) -> str:
    """Return a file's name as a submodule of this module, with the path in the name."""
    # Hexadecimal, since a path may hold characters that a module name cannot.
    stem = re.sub(r"\W", "_", path.stem)
    return f"{__name__}.{stem}_{os.fsencode(path).hex()}"


class _Finder(MetaPathFinder):
    """Finder of the submodules of this module, and of plain names within a directory."""

    siblings: Mapping[str, Path] = {}

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a submodule of this module, or a file of the current directory by plain name.

        Args:
            name: Full name of the module.
            _path: Unused; the search path of the parent package.
            _target: Unused; the module to reload.

        Returns:
            The spec of the module; None for other modules.
        """
        if name in self.siblings:
            return ModuleSpec(name, _Sibling(self.siblings[name]))
        if not name.startswith(f"{__name__}."):
            return None
        file = os.fsdecode(bytes.fromhex(name.rpartition("_")[2]))
        return spec_from_file_location(name, file, loader=_Loader(name, file))


class _Loader(SourceFileLoader):
    """Loader of a file that may import files whose names are in use."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the file with imports from the directory of the file."""
        with imports_from(Path(self.path).parent):
            super().exec_module(module)


class _Sibling(Loader):
    """Loader that returns the submodule of this module for an import by plain name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._spec: ModuleSpec | None = None

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        """Import the submodule and return it in place of a new module."""
        module = import_module(_name_below(self._file))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the spec of the submodule, which the import system has replaced."""
        module.__spec__ = self._spec


_FINDER = _Finder()
# Before Python's own finders, which might find a file of the same name elsewhere.
sys.meta_path.insert(0, _FINDER)


def _kept() -> AbstractContextManager[None]:
    """Return a context of ``keep_imports``, unless there is one already."""
    if _needed.get() is None:
        return keep_imports()
    return nullcontext()


def _add_to_path(directory: str, *, first: bool = False) -> None:
    """Add a directory to ``sys.path`` for the current context of ``keep_imports``.

    Args:
        directory: The directory. An entry of the calling program is left as it is.
        first: True for the first place; otherwise the directory comes after the user's directories
            and before the libraries.
    """
    needed = _needed.get()
    if needed is None or directory in needed:
        return
    if directory not in sys.path:
        position = 0
        if not first:
            position = _end_of_users_path()
        sys.path.insert(position, directory)
    elif not _added[directory]:
        return
    _added[directory] += 1
    needed.add(directory)


def _release(directory: str) -> None:
    """Remove a directory from ``sys.path`` if no context needs it any more."""
    _added[directory] -= 1
    if not _added[directory]:
        del _added[directory]
        _remove_from_path(directory)


def _remove_from_path(directory: str) -> None:
    # The user's code may have changed sys.path.
    with suppress(ValueError):
        sys.path.remove(directory)


def _end_of_users_path() -> int:
    """Return the position of the first library's directory on ``sys.path``."""
    for i, path in enumerate(sys.path):
        if is_library(f"{path}/__init__.py"):
            return i
    return len(sys.path)


def _forget_threads() -> None:
    """Make a new lock in a forked process: a thread of the parent may have held the old one."""
    global _lock  # noqa: PLW0603 - a lock cannot be reset
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _list_modules(home: Path) -> list[str]:
    with os.scandir(home) as entries:
        names = [entry.name.removesuffix(".py") for entry in entries]
    return [name for name in names if name.isidentifier() and not name.startswith("__")]


def _files_of(home: Path, names: Collection[str]) -> dict[str, Path]:
    """Find the files of modules in a directory, by name; packages are left out."""
    files: dict[str, Path] = {}
    for name in names:
        file = home / f"{name}.py"
        if file.is_file():
            files[name] = file
    return files


def _is_in_use(name: str, home: Path) -> bool:
    """Return True if a directory's module has the same name as a user's module from elsewhere.

    A module that is not loaded counts, too, if an import finds it before the directory's module.
    """
    if name in sys.modules:
        path = _location_of(sys.modules[name])
        if path is None or path.resolve().parent == home or is_library(str(path)):
            return False
        return _has_module(home, name)
    if not _has_module(home, name):
        return False
    for entry in sys.path[: sys.path.index(str(home))]:
        if _has_module(Path(entry), name):
            return Path(entry).resolve() != home
    return False


def _location_of(module: ModuleType) -> Path | None:
    """Find the file of a module, or the directory of a package; None without either."""
    directories = [*getattr(module, "__path__", ()), getattr(module, "__file__", None)]
    if not isinstance(directories[0], str):
        return None
    return Path(directories[0])


def _has_module(home: Path, name: str) -> bool:
    with suppress(OSError):
        return (home / f"{name}.py").is_file() or any((home / name).glob("*.py"))
    return False


def _take_out(names: Collection[str]) -> dict[str, ModuleType]:
    """Remove modules and submodules from ``sys.modules`` and return the removed modules."""
    removed: dict[str, ModuleType] = {}
    for name in list(sys.modules):
        if name.partition(".")[0] in names:
            removed[name] = sys.modules.pop(name)
    return removed
