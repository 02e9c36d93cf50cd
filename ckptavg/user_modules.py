"""Users' files as modules: the files of a directory find each other, not others of their names."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from types import ModuleType

import ckptavg

_PREFIX = "ckptavg_user_"  # of modules whose own name is in use
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
        Names that modules from elsewhere have.
    """
    home = home.resolve()
    _add_to_path(str(home))
    names = {name for name in sys.modules if "." not in name and _hides_file_of(home, name)}
    others = _take_out(names)
    own = _set_aside.setdefault(str(home), {})
    sys.modules.update(own)
    sys.path.insert(0, str(home))
    try:
        yield names
    finally:
        with suppress(ValueError):  # the user's code may have changed it
            sys.path.remove(str(home))
        own.update(_take_out(names))
        sys.modules.update(others)


def is_library(filename: str) -> bool:
    """Tell a file of Python, of an installed package or of ckptavg from one of the users' own."""
    parents = map(str, Path(filename).parents)
    return filename[:1] == "<" or "dist-packages" in filename or not _LIBRARIES.isdisjoint(parents)


def _loaded(path: Path) -> ModuleType | None:
    for name, module in sys.modules.items():
        is_named = name == path.stem or name.startswith(f"{_PREFIX}{path.stem}")
        if is_named and getattr(module, "__file__", None) == str(path):
            return module
    return None


def _load(path: Path, in_use: Collection[str]) -> ModuleType:
    name = _free_name(path, in_use)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    names = {name, path.stem} - {*sys.modules}  # its siblings import it by the latter
    sys.modules.update(dict.fromkeys(names, module))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for added in names:
            sys.modules.pop(added, None)
        raise
    return module


def _free_name(path: Path, in_use: Collection[str]) -> str:
    """Find a name that no other file has or gets: the file's own, if an import by it finds it."""
    stem, home = path.stem, str(path.parent)
    earlier = [Path(other) for other in sys.path[: sys.path.index(home, 1)]]
    hidden = any(_has_module(other, stem) for other in earlier if other.resolve() != path.parent)
    if not hidden and stem not in in_use and stem not in sys.modules:
        return stem
    numbered = (f"{_PREFIX}{stem}_{number}" for number in count(2))
    return next(n for n in chain([_PREFIX + stem], numbered) if n not in sys.modules)


def _add_to_path(home: str) -> None:
    """Put a directory on ``sys.path``, behind those that are there but before the libraries."""
    if home not in sys.path:
        inside = [f"{path}/__init__.py" for path in sys.path]
        libraries = [i for i, file in enumerate(inside) if is_library(file)]
        sys.path.insert(min(libraries, default=len(sys.path)), home)


def _hides_file_of(home: Path, name: str) -> bool:
    """Tell whether a loaded module is a user's from elsewhere, and a directory has its name too."""
    if name == "__main__" or not _has_module(home, name):
        return False
    place = _place_of(sys.modules[name])
    return place is not None and place.resolve().parent != home and not is_library(str(place))


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
