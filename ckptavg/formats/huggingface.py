"""Hugging Face directories: one weights file or shards with an index, and what lies beside them."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats.storage import Location

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TRAINER_STATE = "trainer_state.json"
_MAX_INDEX = 100_000_000

# What from_pretrained reads beside the weights. Nothing else of an input directory is copied.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "chat_template.*", "*.py",
)  # fmt: skip


def main_file(directory: Location) -> Location | None:
    """The weights file or index of a directory; None if it is no checkpoint."""
    found = (directory / name for name in WEIGHT_FILES)
    return next((path for path in found if path.is_file()), None)


def weight_map(index: Location) -> dict[str, str]:
    """Tensor name → file name, as an index lists them.

    Raises:
        CheckpointError: The index is malformed, or names a file outside its directory or a
            missing one.
    """
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError(f"it is larger than {_MAX_INDEX} bytes")
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}"[:300]) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(v, str) for v in names.values())
    ):
        raise CheckpointError(f"{index} has no weight_map of tensor name → file")
    home = index.parent.resolve()
    for name in sorted(set(names.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names a file outside its directory: {name!r}")
    missing = sorted({n for n in names.values() if not _is_file(home / n)})
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there: {first_few(missing)}",
            "Copy the directory again, or leave it out.",
        )
    return names


def belongs(name: str) -> bool:
    """Whether a file's name is one that a model's own directory has."""
    own = (*WEIGHT_FILES, "*.safetensors", "pytorch_model-*.bin", *COMPANIONS)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in own)


def _is_file(path: Location) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def companions(directory: Location) -> list[Location]:
    """The configuration, tokenizer and code files that belong to a directory's model."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    return sorted(found, key=str)
