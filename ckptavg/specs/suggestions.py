"""Suggestions for mistyped or incomplete specifications, as remedies of errors."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ckptavg.errors import SpecError, first_few
from ckptavg.formats.huggingface.layout import CONFIG
from ckptavg.specs.importing import LIGHTNING

Kind = Literal["model", "data"]

MODEL_PREFIXES = ("torchvision", "timm", "hf", LIGHTNING)
DATA_PREFIXES = ("imagefolder", "cifar10", "cifar100", "text", "tokens")
_PREFIXES: dict[Kind, tuple[str, ...]] = {"model": MODEL_PREFIXES, "data": DATA_PREFIXES}
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
    if name in _PREFIXES["model"]:
        return f"Name a model after it: {name}:NAME."
    libraries = [library for library in ("torchvision", "timm") if name in _list_models(library)]
    if not libraries:
        near = difflib.get_close_matches(name, _list_models("torchvision"), 1, 0.7)
        return f"Did you mean torchvision:{near[0]}?" if near else ""
    return f"Did you mean {' or '.join(f'{library}:{name}' for library in libraries)}?"


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
    near = difflib.get_close_matches(path.name, [p.name for p in _entries(path.parent)], 1, 0.7)
    if near and path.name:
        meant = path.with_name(near[0])
        return suggest_data(str(meant)) or f"Did you mean {meant}?"
    return f"{path} does not exist." if path.suffix else ""


def _suggest_file(path: Path) -> str:
    if path.suffix in _TOKENS:
        return f"Did you mean tokens:{path}?"
    if path.suffix in _TABLES or not _is_text(path):
        return "Write a function that returns a Dataset of it: path/file.py:function."
    return f"Did you mean text:{path}?"


def _python_file(spec: str) -> Path | None:
    """Find the Python file of a specification, with or without suffix; None if missing."""
    path = Path(spec)
    file = path if path.suffix == ".py" or not path.name else path.with_name(f"{path.name}.py")
    return file if file.is_file() else None


def refuse_mistyped(spec: str, kind: Kind) -> None:
    """Make sure that the text before the colon is a module or file, not a mistyped prefix.

    Raises:
        SpecError: The text resembles a prefix, or is a prefix of the other kind.
    """
    word, _, name = spec.partition(":")
    if word.endswith(".py") or "/" in word or _is_module(word):
        return
    other_kind: Kind = "data" if kind == "model" else "model"
    if word in _PREFIXES[other_kind]:
        raise SpecError(
            f"{spec} names {_article(other_kind)}, not {_article(kind)}",
            f"Expected {', '.join(f'{p}:' for p in _PREFIXES[kind])} or path/file.py:function.",
        )
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    meant = _SYNONYMS.get(plain, plain)
    near = difflib.get_close_matches(meant, _PREFIXES[kind], 1, 0.7)
    # ``lightning`` is a package, too, so lightning:... may name a module.
    if near and word != LIGHTNING:
        raise SpecError(f"no module named {word!r} is found", f"Did you mean {near[0]}:{name}?")


def check_image_folder(directory: Path) -> None:
    """Make sure that a directory has a folder per class.

    Raises:
        SpecError: The directory does not exist or has no folder per class. The remedy suggests
            another directory.
    """
    if not directory.is_dir():
        near = _near(directory)
        remedy = f"Did you mean imagefolder:{near}?" if near else _folder_remedy()
        raise SpecError(f"{directory} does not exist", remedy)
    if not any(child.is_dir() for child in _entries(directory)):
        above = directory.parent
        remedy = f"Did you mean imagefolder:{above}?" if _has_images(directory) else ""
        raise SpecError(f"{directory} has no folder per class", remedy or _folder_remedy())
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


def _folder_remedy() -> str:
    return "Expected imagefolder:DIR with DIR/CLASS/*.png."


def _article(kind: Kind) -> str:
    return "data" if kind == "data" else "a model"


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
    folders = [path for path in _entries(directory) if path.is_dir()]
    return any(map(_has_images, folders[:_MOST_LOOKED_AT]))


def _has_images(directory: Path) -> bool:
    return any(path.suffix.lower() in _IMAGES for path in _entries(directory))


def _leads_to_config(directory: Path) -> bool:
    """Return True if a directory or a direct subdirectory is a Hugging Face model."""
    return any((home / CONFIG).is_file() for home in (directory, *_entries(directory)))


def _entries(directory: Path) -> list[Path]:
    """List the first entries of a directory without hidden ones; empty if unreadable."""
    try:
        shown = (path for path in directory.iterdir() if not path.name.startswith("."))
        return [path for path, _ in zip(shown, range(_MOST_LOOKED_AT), strict=False)]
    except OSError:
        return []


def _near(path: Path) -> Path | None:
    """Find the directory with a similar name beside a missing directory; None if none."""
    names = [p.name for p in _entries(path.parent) if p.is_dir()]
    near = difflib.get_close_matches(path.name, names, 1, 0.6)
    return path.with_name(near[0]) if near else None


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
    names = [*_public_callables(file)]
    if len(names) == 1:
        return f"Did you mean {file}:{names[0]}?"
    if not names:
        return f"Name a function of it: {file}:FUNCTION."
    return f"Name one of its functions: {first_few([f'{file}:{n}' for n in names], _MOST_NAMED)}."


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
