"""Users' files as modules: the files of a directory find each other, not others of their names.

A file is a module of its own name where an import by it finds that file and what it imports in
turn, in other processes too. Elsewhere it is a module below this one, whose name holds the path, so
that it can be imported by that name alone: workers that are started anew do so.
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

__path__: list[str] = []  # modules can be below this one, and are found by what is said below
_LIBRARIES = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
_LIBRARIES.add(str(Path(ckptavg.__file__).parent))
_set_aside: dict[str, dict[str, ModuleType]] = {}  # directory → its modules of names in use


def import_file(path: Path) -> ModuleType:
    """Import a file of Python, once.

    Its directory stays on ``sys.path``, for processes that import it again.
    """
    path = path.resolve()
    with imports_from(path.parent) as in_use:
        return _loaded(path) or _load(path, in_use)


@contextmanager
def imports_from(home: Path) -> Iterator[Collection[str]]:
    """Let imports find the files of a directory first.

    A user's module from elsewhere is set aside for so long where the directory has a file of its
    name, and is back afterwards. What the directory has of such names is kept for the next time.
    Libraries are never set aside.

    Args:
        home: The directory.

    Yields:
        Names of its modules that other modules have, or will have when they are imported.
    """
    home = home.resolve()
    _add_to_path(str(home))
    names = {name for name in _list_modules(home) if _is_in_use(name, home)}
    others = _take_out(names)
    outer = _FINDER.siblings
    _FINDER.siblings = {n: home / f"{n}.py" for n in names if (home / f"{n}.py").is_file()}
    own = _set_aside.setdefault(str(home), {})
    sys.modules.update(own)
    sys.path.insert(0, str(home))
    try:
        yield names
    finally:
        _FINDER.siblings = outer
        with suppress(ValueError):  # the user's code may have changed it
            sys.path.remove(str(home))
        own.update(_take_out(names))
        sys.modules.update(others)


def is_library(filename: str) -> bool:
    """Tell a file of Python, of an installed package or of ckptavg from one of the users' own."""
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
    names = {name, path.stem} - {*sys.modules}  # its siblings import it by the latter
    sys.modules.update(dict.fromkeys(names, module))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for added in names:
            sys.modules.pop(added, None)
        raise
    return module


def _name_below(path: Path) -> str:
    """Name a file's module below this one, with the path in the name."""
    stem = re.sub(r"\W", "_", path.stem)
    return f"{__name__}.{stem}_{os.fsencode(path).hex()}"


class _Finder(MetaPathFinder):
    """Finds the modules below this one, also by the names that a directory's files import."""

    siblings: Mapping[str, Path] = {}

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in self.siblings:
            return ModuleSpec(name, _Sibling(self.siblings[name]))
        if not name.startswith(f"{__name__}."):
            return None
        file = os.fsdecode(bytes.fromhex(name.rpartition("_")[2]))
        return spec_from_file_location(name, file, loader=_Loader(name, file))


class _Loader(SourceFileLoader):
    """Loads a file whose siblings may have names that are in use."""

    def exec_module(self, module: ModuleType) -> None:
        with imports_from(Path(self.path).parent):
            super().exec_module(module)


class _Sibling(Loader):
    """Takes the module below this one for an import by a file's own name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._spec: ModuleSpec | None = None

    def create_module(self, _spec: ModuleSpec) -> ModuleType:
        module = import_module(_name_below(self._file))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


_FINDER = _Finder()
sys.meta_path.insert(0, _FINDER)


def _add_to_path(home: str) -> None:
    """Put a directory on ``sys.path``, behind those that are there but before the libraries."""
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
    """Tell whether a name of a directory's module is that of a user's module from elsewhere.

    One that is not loaded counts too if imports find it before that of the directory.
    """
    if name in sys.modules:
        place = _place_of(sys.modules[name])
        is_elsewhere = place is not None and place.resolve().parent != home
        return is_elsewhere and not is_library(str(place)) and _has_module(home, name)
    places = [Path(place) for place in sys.path[: sys.path.index(str(home))]]
    found = next((place for place in places if _has_module(place, name)), home)
    return found.resolve() != home and _has_module(home, name)


def _place_of(module: ModuleType) -> Path | None:
    """Find the file of a module, or the directory of a package; None if it has neither."""
    paths = [*getattr(module, "__path__", ())]
    file = paths[0] if paths else getattr(module, "__file__", None)
    return Path(file) if isinstance(file, str) else None


def _has_module(home: Path, name: str) -> bool:
    with suppress(OSError):
        return (home / f"{name}.py").is_file() or any((home / name).glob("*.py"))
    return False


def _take_out(names: Collection[str]) -> dict[str, ModuleType]:
    """Take modules out of ``sys.modules``, and what is below them."""
    found = [name for name in sys.modules if name.partition(".")[0] in names]
    return {name: sys.modules.pop(name) for name in found}
