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
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import ckptavg

# Makes this module a package, whose submodules ``_Finder`` finds.
__path__: list[str] = []
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_LIBRARIES.add(str(Path(ckptavg.__file__).parent))
# Per directory, the modules whose names other modules have; out of ``sys.modules`` between imports.
_set_aside: dict[str, dict[str, ModuleType]] = {}


def import_file(path: Path) -> ModuleType:
    """Import a Python file, once.

    The directory of the file stays on ``sys.path``, for processes that import the file again.
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
    _add_to_path(str(home))
    names = {name for name in _list_modules(home) if _is_in_use(name, home)}
    displaced = _take_out(names)
    outer = _FINDER.siblings
    _FINDER.siblings = {n: home / f"{n}.py" for n in names if (home / f"{n}.py").is_file()}
    own_modules = _set_aside.setdefault(str(home), {})
    sys.modules.update(own_modules)
    # First, for the time being: the entry from above may come after other directories.
    sys.path.insert(0, str(home))
    try:
        yield names
    finally:
        _FINDER.siblings = outer
        # The user's code may have changed sys.path.
        with suppress(ValueError):
            sys.path.remove(str(home))
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
    name = _name_below(path) if in_use or path.stem in sys.modules else path.stem
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
sys.meta_path.insert(0, _FINDER)


def _add_to_path(home: str) -> None:
    """Add a directory to ``sys.path``, after the user's directories and before the libraries."""
    if home not in sys.path:
        inside = [f"{path}/__init__.py" for path in sys.path]
        libraries = [i for i, file in enumerate(inside) if is_library(file)]
        sys.path.insert(min(libraries, default=len(sys.path)), home)


def _list_modules(home: Path) -> list[str]:
    with os.scandir(home) as entries:
        names = [
            Path(entry).stem if entry.name.endswith(".py") else entry.name for entry in entries
        ]
    return [name for name in names if name.isidentifier() and not name.startswith("__")]


def _is_in_use(name: str, home: Path) -> bool:
    """Return True if a directory's module has the same name as a user's module from elsewhere.

    A module that is not loaded counts, too, if an import finds it before the directory's module.
    """
    if name in sys.modules:
        path = _place_of(sys.modules[name])
        is_elsewhere = path is not None and path.resolve().parent != home
        return is_elsewhere and not is_library(str(path)) and _has_module(home, name)
    directories = [Path(entry) for entry in sys.path[: sys.path.index(str(home))]]
    first = next((directory for directory in directories if _has_module(directory, name)), home)
    return first.resolve() != home and _has_module(home, name)


def _place_of(module: ModuleType) -> Path | None:
    """Find the file of a module, or the directory of a package; None without either."""
    paths = [*getattr(module, "__path__", ())]
    file = paths[0] if paths else getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) else None


def _has_module(home: Path, name: str) -> bool:
    with suppress(OSError):
        return (home / f"{name}.py").is_file() or any((home / name).glob("*.py"))
    return False


def _take_out(names: Collection[str]) -> dict[str, ModuleType]:
    """Remove modules and submodules from ``sys.modules`` and return the removed modules."""
    loaded = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in loaded}
