"""Models whose weights lie in several directories, as their own lists of parts say.

Sentence-transformers lists its modules in ``modules.json``, of which a Dense one has weights below
``2_Dense/``; a router lists what it leads to in ``router_config.json``. A pipeline of diffusers has
``model_index.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ckptavg.errors import CheckpointError, short
from ckptavg.formats import bounded_json, huggingface
from ckptavg.formats.storage import Location

_MODULES, _ROUTER, _PIPELINE = "modules.json", "router_config.json", "model_index.json"
_LARGEST = 1 << 20  # bytes of a list
_MOST_PARTS = 200
_DEEPEST = 3  # levels: a router may lead to routers


def find_components(directory: Location) -> list[str]:
    """The directories below a model's that hold further weights of it, as relative paths.

    Raises:
        CheckpointError: A list of parts names a directory elsewhere.
    """
    folders: dict[str, Location] = {"": directory}
    waiting = [""]
    while waiting:
        above = waiting.pop()
        for name in _listed(folders[above]) if above.count("/") < _DEEPEST else ():
            folder = f"{above}/{name}" if above else name
            if folder not in folders and len(folders) <= _MOST_PARTS:
                folders[folder] = component_directory(directory, folder)
                waiting.append(folder)
    return [
        folder
        for folder, place in folders.items()
        if folder and huggingface.main_file(place) is not None
    ]


def component_directory(directory: Location, folder: str) -> Location:
    """The directory of a component; the model's own for the empty path."""
    for part in folder.split("/") if folder else ():
        directory = directory / part
    return directory


def part_names(directory: Location) -> set[str]:
    """Names of the directories directly below a model's in which its components lie."""
    return {folder.partition("/")[0] for folder in find_components(directory)}


def _listed(directory: Location) -> list[str]:
    """Relative paths of the parts that a directory's own lists name, but for itself."""
    named = [
        *_modules(_read(directory / _MODULES)),
        *_routes(_read(directory / _ROUTER)),
        *_pipeline(_read(directory / _PIPELINE)),
    ]
    for name in named:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{directory} lists a part outside of it: {short(name)!r}")
    paths = (str(PurePosixPath(name)) for name in named[:_MOST_PARTS])
    return [path for path in paths if path != "."]


def _read(path: Location) -> Any:
    """What a list says; None where there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        return bounded_json.read(path)
    except ValueError:
        return None


def _modules(content: Any) -> list[str]:
    entries = content if isinstance(content, list) else []
    known = [e for e in entries if isinstance(e, dict) and isinstance(e.get("type"), str)]
    return _texts(entry.get("path") for entry in known)


def _routes(content: Any) -> list[str]:
    types = content.get("types") if isinstance(content, dict) else None
    return _texts(types) if isinstance(types, dict) else []


def _pipeline(content: Any) -> list[str]:
    if not isinstance(content, Mapping) or "_class_name" not in content:
        return []
    pairs = {name: value for name, value in content.items() if isinstance(value, list)}
    return _texts(name for name, value in pairs.items() if len(value) == 2 and value[1])


def _texts(values: Iterable[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]
