"""Layout of Hugging Face directories: names of weights files, shards, indices and variants."""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats.huggingface import peft
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location

# Names of weights files and indices. The first file that exists is read.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".bin")
CONFIG = "config.json"
_STEMS = "model|pytorch_model|diffusion_pytorch_model"
_VARIANT = r"(?:fp|bf|nf|int|float|bfloat)\d+\w*|(?:non_)?ema"
_VARIANT_FILE = re.compile(rf"({_STEMS})\.({_VARIANT})\.(safetensors|bin)")
_VARIANT_INDEX = re.compile(rf"({_STEMS})\.(safetensors|bin)\.index\.({_VARIANT})\.json")


def find_main_file(directory: Location) -> Location | None:
    """Find the weights file or index of a model or adapter; None if there is none."""
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return directory / name
    return peft.find_weights(directory) or next(iter(find_variants(directory)), None)


def find_variants(directory: Location) -> list[Location]:
    """List the variants of the weights in a directory with a configuration.

    A variant (``variant="fp16"`` of ``from_pretrained``) is named in the middle of the file's name.
    Files of safetensors come first.
    """
    if not (directory / CONFIG).is_file():
        return []
    named = [path for path in directory.iterdir() if is_variant(path.name)]
    return sorted(named, key=lambda path: (".safetensors" not in path.name, path.name))


def note_variants(directory: Location) -> list[str]:
    """Note the variants of a directory's weights that are not read."""
    chosen, *unread = [path.name for path in find_variants(directory)]
    if not unread:
        return []
    return [f"weights are taken from {chosen}, not from another variant: {first_few(unread)}"]


def is_variant(main: str) -> bool:
    """Return True if the name of a weights file or index names a variant."""
    return bool(_VARIANT_FILE.fullmatch(main) or _VARIANT_INDEX.fullmatch(main))


def name_single_file(main: str) -> str:
    """Return the name of the single file for weights that are read from a file or an index.

    Shards and the default files of ``torch.save`` become safetensors. Any other name is kept.
    """
    if match := _VARIANT_INDEX.fullmatch(main):
        return f"{_safetensors_stem(match[1])}.{match[3]}.safetensors"
    stem = main.removesuffix(".index.json")
    if main in WEIGHT_FILES:
        return f"{_safetensors_stem(Path(stem).stem)}.safetensors"
    return stem


def _safetensors_stem(stem: str) -> str:
    """Return the stem of a safetensors file for the stem of any weights file."""
    if stem == "pytorch_model":
        return "model"
    return stem


def name_index(single: str) -> str:
    """Return the name of the index of shards for the name of a single file."""
    if match := _VARIANT_FILE.fullmatch(single):
        return f"{match[1]}.{match[3]}.index.{match[2]}.json"
    return f"{single}.index.json"


def can_be_split(single: str) -> bool:
    """Return True if loaders accept shards and an index in the place of a single file."""
    return single in WEIGHT_FILES or bool(_VARIANT_FILE.fullmatch(single))


def find_other_models(main: Location) -> list[str]:
    """List the files of further models that Accelerate saves beside the first model."""
    numbered = re.compile(rf"{re.escape(main.stem)}_\d+{re.escape(main.suffix)}")
    return sorted(path.name for path in main.parent.iterdir() if numbered.fullmatch(path.name))


def read_weight_map(index: Location) -> dict[str, str]:
    """Read the map from tensor names to file names in an index.

    Raises:
        CheckpointError: The index is malformed, or names a file outside its directory or a
            missing one.
    """
    try:
        content = bounded_json.read(index)
    except ValueError as error:
        raise CheckpointError(f"{index} cannot be read: {error}"[:300]) from error
    names = _parse_weight_map(content)
    if not names:
        raise CheckpointError(f"{index} has no weight_map of tensor name → file")
    wanted = set(names.values())
    for name in sorted(wanted):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names a file outside its directory: {name!r}")
    missing = sorted(name for name in wanted if not _is_file(index.parent / name))
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there: {first_few(missing)}",
            "Copy the directory again, or leave it out.",
        )
    return names


def _parse_weight_map(content: Any) -> dict[str, str]:
    """Return the map in the contents of an index; empty where the contents are malformed."""
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        return {}
    names: dict[str, str] = content["weight_map"]
    if not all(isinstance(name, str) for name in names.values()):
        return {}
    return names


def _is_file(path: Location) -> bool:
    """Return True if a path is a file; False for a name that no file can have."""
    try:
        return path.is_file()
    # Raised for names that no file can have, such as names with a NUL.
    except ValueError:
        return False
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
