"""Suggestions for mistyped or incomplete specifications, as remedies of errors."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ckptavg.errors import SpecError, first_few
from ckptavg.formats.huggingface.layout import CONFIG
from ckptavg.specs.prefixes import LIGHTNING, PREFIXES, Kind

_OTHER_KIND: dict[Kind, Kind] = {"model": "data", "data": "model"}
_WITH_ARTICLE: dict[Kind, str] = {"model": "a model", "data": "data"}
# Other words for a prefix that a comparison of spelling would not find.
_SYNONYMS = {
    "huggingface": "hf", "transformers": "hf", "tv": "torchvision", "pl": LIGHTNING,
    "folder": "imagefolder", "images": "imagefolder", "imagenet": "imagefolder",
    "cifar": "cifar10", "txt": "text",
}  # fmt: skip
_IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_TOKENS = (".npy", ".bin")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".h5", ".npz", ".pt", ".pth")
_CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_HELD_OUT = ("val", "valid", "validation", "test", "train")
# Entries of a directory that are read; data directories may hold millions.
_MOST_LOOKED_AT = 200
# Bytes of a Python file that is parsed for names.
_LONGEST_FILE = 10_000_000
_MOST_NAMED = 4


def suggest_model(spec: str) -> str:
    """Suggest a model for a specification without a prefix; return empty text if unknown."""
    if ":" in spec.strip(":"):
        return ""
    spec = spec.strip(":")
    if (module := _python_file(spec)) is not None:
        return _name_functions(module)
    path = Path(spec)
    if path.is_dir() and _leads_to_config(path):
        return f"Did you mean hf:{spec}?"
    if path.is_file():
        return f"{spec} is a file: what is wanted is the network that takes its weights."
    return _suggest_library(spec)


def _suggest_library(name: str) -> str:
    """Suggest the library that has a model of the same or a similar name."""
    if name in PREFIXES["model"]:
        return f"Name a model after it: {name}:NAME."
    meant: list[str] = []
    for library in ("torchvision", "timm"):
        if name in _list_models(library):
            meant.append(f"{library}:{name}")
    if meant:
        return f"Did you mean {' or '.join(meant)}?"
    for similar in difflib.get_close_matches(name, _list_models("torchvision"), 1, 0.7):
        return f"Did you mean torchvision:{similar}?"
    return ""


def suggest_data(spec: str) -> str:
    """Suggest data for a specification without a prefix; return empty text if unknown."""
    if ":" in spec.strip(":"):
        return ""
    path = Path(spec.strip(":"))
    if path.is_dir():
        return _suggest_directory(path)
    if (module := _python_file(str(path))) is not None:
        return _name_functions(module)
    if path.is_file():
        return _suggest_file(path)
    meant = _find_similar(path, _entries(path.parent), 0.7)
    if meant is None:
        return path.suffix and f"{path} does not exist."
    return suggest_data(str(meant)) or f"Did you mean {meant}?"


def _suggest_file(path: Path) -> str:
    if path.suffix in _TOKENS:
        return f"Did you mean tokens:{path}?"
    if path.suffix in _TABLES or not _is_text(path):
        return "Write a function that returns a Dataset of it: path/file.py:function."
    return f"Did you mean text:{path}?"


def _python_file(spec: str) -> Path | None:
    """Find the Python file of a specification, with or without suffix; None if missing."""
    path = Path(spec)
    if path.name and path.suffix != ".py":
        path = path.with_name(f"{path.name}.py")
    if not path.is_file():
        return None
    return path


def refuse_mistyped(spec: str, kind: Kind) -> None:
    """Make sure that the text before the colon is a module or file, not a mistyped prefix.

    Raises:
        SpecError: The text resembles a prefix, or is a prefix of the other kind.
    """
    word, _, name = spec.partition(":")
    if word.endswith(".py") or "/" in word or _is_module(word):
        return
    other_kind = _OTHER_KIND[kind]
    if word in PREFIXES[other_kind]:
        expected = ":, ".join(PREFIXES[kind])
        raise SpecError(
            f"{spec} names {_WITH_ARTICLE[other_kind]}, not {_WITH_ARTICLE[kind]}",
            f"Expected {expected}: or path/file.py:function.",
        )
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    meant = _SYNONYMS.get(plain, plain)
    near = difflib.get_close_matches(meant, PREFIXES[kind], 1, 0.7)
    # ``lightning`` is a package, too, so lightning:... may name a module.
    if near and word != LIGHTNING:
        raise SpecError(f"no module named {word!r} is found", f"Did you mean {near[0]}:{name}?")


def check_image_folder(directory: Path) -> None:
    """Make sure that a directory has a folder per class.

    Raises:
        SpecError: The directory does not exist or has no folder per class. The remedy suggests
            another directory.
    """
    remedy = "Expected imagefolder:DIR with DIR/CLASS/*.png."
    if not directory.is_dir():
        if (meant := _find_similar(directory, _folders(directory.parent), 0.6)) is not None:
            remedy = f"Did you mean imagefolder:{meant}?"
        raise SpecError(f"{directory} does not exist", remedy)
    if not _folders(directory):
        if _has_images(directory):
            remedy = f"Did you mean imagefolder:{directory.parent}?"
        raise SpecError(f"{directory} has no folder per class", remedy)
    if not _is_image_folder(directory):
        suggestion = _suggest_directory(directory)
        if suggestion:
            raise SpecError(f"{directory} has no folder per class", suggestion)


def check_cifar(kind: str, directory: Path) -> None:
    """Make sure that a directory holds a CIFAR data set.

    Raises:
        SpecError: There is no CIFAR data set. The remedy suggests another directory.
    """
    folder = _CIFAR_FOLDERS[kind]
    if (directory / folder).is_dir():
        return
    remedy = "Name the directory that the archive unpacks in."
    if suggestion := _suggest_cifar(directory):
        remedy = suggestion
    raise SpecError(f"{directory} does not hold {folder}", remedy)


def _suggest_directory(directory: Path) -> str:
    if suggestion := _suggest_cifar(directory):
        return suggestion
    if _leads_to_config(directory):
        return ""
    if _is_image_folder(directory):
        return f"Did you mean imagefolder:{directory}?"
    for name in _HELD_OUT:
        if _is_image_folder(directory / name):
            return f"Did you mean imagefolder:{directory / name}?"
    return ""


def _suggest_cifar(directory: Path) -> str:
    for kind, folder in _CIFAR_FOLDERS.items():
        if (directory / folder).is_dir():
            return f"Did you mean {kind}:{directory}?"
        if directory.name == folder and directory.is_dir():
            return f"Did you mean {kind}:{directory.parent}?"
    return ""


def _is_image_folder(directory: Path) -> bool:
    """Return True if a folder directly below a directory holds images."""
    return any(map(_has_images, _folders(directory)))


def _has_images(directory: Path) -> bool:
    return any(path.suffix.lower() in _IMAGES for path in _entries(directory))


def _leads_to_config(directory: Path) -> bool:
    """Return True if a directory or a direct subdirectory is a Hugging Face model."""
    return any((home / CONFIG).is_file() for home in (directory, *_entries(directory)))


def _entries(directory: Path) -> list[Path]:
    """List the first entries of a directory without hidden ones; empty if unreadable."""
    entries: list[Path] = []
    try:
        for path in directory.iterdir():
            if path.name.startswith("."):
                continue
            entries.append(path)
            if len(entries) == _MOST_LOOKED_AT:
                break
    except OSError:
        return []
    return entries


def _folders(directory: Path) -> list[Path]:
    """List the directories among the first entries of a directory."""
    return [path for path in _entries(directory) if path.is_dir()]


def _find_similar(path: Path, neighbours: Iterable[Path], cutoff: float) -> Path | None:
    """Find the neighbour of a missing path whose name is most similar.

    Args:
        path: The missing path.
        neighbours: Existing paths in the same directory.
        cutoff: Least similarity that counts, from 0 to 1.

    Returns:
        The path of the neighbour; None where no name is similar.
    """
    names = [neighbour.name for neighbour in neighbours]
    for name in difflib.get_close_matches(path.name, names, 1, cutoff):
        return path.with_name(name)
    return None


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError:
        return False
    # A character may be cut in two at the end.
    return b"\0" not in beginning and "\ufffd" not in beginning[:-3].decode(errors="replace")[:-1]


def _is_module(word: str) -> bool:
    """Return True if a word is the name of a module in the working directory."""
    first = word.partition(".")[0]
    return Path(f"{first}.py").is_file() or (Path(first) / "__init__.py").is_file()


def _name_functions(file: Path) -> str:
    """Suggest the functions and classes of a Python file, without running the file."""
    specs = [f"{file}:{name}" for name in _public_callables(file)]
    if len(specs) == 1:
        return f"Did you mean {specs[0]}?"
    if not specs:
        return f"Name a function of it: {file}:FUNCTION."
    return f"Name one of its functions: {first_few(specs, _MOST_NAMED)}."


def _public_callables(file: Path) -> Iterator[str]:
    try:
        if file.stat().st_size > _LONGEST_FILE:
            return
        # Parsed and not imported, since an import would run the file.
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in tree.body:
        is_callable = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if is_callable and not node.name.startswith("_"):  # type: ignore[attr-defined]
            yield node.name  # type: ignore[attr-defined]


def _list_models(library: str) -> list[str]:
    """List the names of a library's models; empty if the library is not installed."""
    # Imported on demand, since both libraries are slow to import.
    try:
        if library == "torchvision":
            from torchvision.models import list_models  # noqa: PLC0415
        else:
            from timm import list_models  # noqa: PLC0415
        return list(list_models())
    except Exception:
        return []
