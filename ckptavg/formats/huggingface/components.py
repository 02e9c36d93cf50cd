"""Components of models whose weights are stored in several directories.

Sentence-transformers lists the modules of a model in ``modules.json``: a Dense module has weights
in a directory such as ``2_Dense/``. A router lists branches in ``router_config.json``. A pipeline
of diffusers lists components in ``model_index.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from ckptavg.errors import CheckpointError, short
from ckptavg.formats.huggingface import layout
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location

_MODULES, _ROUTER, _PIPELINE = "modules.json", "router_config.json", "model_index.json"
# Bytes of a list. Lists are untrusted, and real ones are far smaller.
_LARGEST = 1 << 20
_MOST_PARTS = 200
# Levels: a branch of a router may itself be a router.
_DEEPEST = 3


def find_components(directory: Location) -> list[str]:
    """Find the directories with further weights below a model's directory.

    Returns:
        Relative paths of the directories.

    Raises:
        CheckpointError: A list names a directory outside of the model's directory.
    """
    folders: dict[str, Location] = {"": directory}
    waiting = [""]
    while waiting:
        above = waiting.pop()
        if above.count("/") >= _DEEPEST:
            continue
        for name in _list_names(folders[above]):
            folder = f"{above}/{name}".removeprefix("/")
            if folder not in folders and len(folders) <= _MOST_PARTS:
                folders[folder] = join_component(directory, folder)
                waiting.append(folder)
    del folders[""]
    # Tokenizers and schedulers are listed too, and hold no weights.
    return [name for name, path in folders.items() if layout.find_main_file(path) is not None]


def join_component(directory: Location, folder: str) -> Location:
    """Return the directory of a component; the model's own for the empty path."""
    if not folder:
        return directory
    for name in folder.split("/"):
        directory = directory / name
    return directory


def find_part_names(directory: Location) -> set[str]:
    """Return the names of a model's direct subdirectories that hold components."""
    return {folder.partition("/")[0] for folder in find_components(directory)}


def _list_names(directory: Location) -> list[str]:
    """Return the relative paths in the lists of a directory, except the directory itself."""
    names = [
        *_parse_modules(_read(directory / _MODULES)),
        *_parse_router(_read(directory / _ROUTER)),
        *_parse_pipeline(_read(directory / _PIPELINE)),
    ]
    # All paths are checked before the first is used: a list with a path to the outside is hostile
    # as a whole.
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{directory} lists a part outside of it: {short(name)!r}")
    paths = [str(PurePosixPath(name)) for name in names[:_MOST_PARTS]]
    return [path for path in paths if path != "."]


def _read(path: Location) -> Any:
    """Read a list; None where there is no readable list."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        return bounded_json.read(path)
    except ValueError:
        return None


def _parse_modules(content: Any) -> list[str]:
    """Return the paths of the modules in a ``modules.json``."""
    if not isinstance(content, list):
        return []
    paths: list[Any] = []
    for module in content:
        if isinstance(module, dict) and isinstance(module.get("type"), str):
            paths.append(module.get("path"))
    return _texts(paths)


def _parse_router(content: Any) -> list[str]:
    """Return the paths of the branches in a ``router_config.json``."""
    if not isinstance(content, dict) or not isinstance(content.get("types"), dict):
        return []
    return _texts(content["types"])


def _parse_pipeline(content: Any) -> list[str]:
    """Return the names of the components in a ``model_index.json``."""
    if not isinstance(content, Mapping) or "_class_name" not in content:
        return []
    names: list[Any] = []
    for name, value in content.items():
        # Library and class; a component that the pipeline lacks has null for its class.
        if isinstance(value, list) and len(value) == 2 and value[1]:
            names.append(name)
    return _texts(names)


def _texts(values: Iterable[Any]) -> list[str]:
    """Return the values that are texts."""
    return [value for value in values if isinstance(value, str)]
