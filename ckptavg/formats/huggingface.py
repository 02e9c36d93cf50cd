"""Hugging Face directories: one weights file or shards with an index, and what lies beside them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats import adapter, bounded_json
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
_MAX_COMPANION = 256 * 2**20  # bytes

# What from_pretrained reads beside the weights. Nothing else of an input directory is copied.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "chat_template.*", "*.py",
)  # fmt: skip


def main_file(directory: Location) -> Location | None:
    """The weights file or index of a directory, of an adapter too; None if it is no checkpoint."""
    found = (directory / name for name in WEIGHT_FILES)
    whole = next((path for path in found if path.is_file()), None)
    return whole or adapter.weights_file(directory)


def other_models(main: Location) -> list[str]:
    """Names of the further models' weights that Accelerate saves beside the first one's."""
    numbered = re.compile(rf"{re.escape(main.stem)}_\d+{re.escape(main.suffix)}")
    return sorted(path.name for path in main.parent.iterdir() if numbered.fullmatch(path.name))


def weight_map(index: Location) -> dict[str, str]:
    """Tensor name → file name, as an index lists them.

    Raises:
        CheckpointError: The index is malformed, or names a file outside its directory or a
            missing one.
    """
    try:
        content = bounded_json.read(index)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}"[:300]) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(v, str) for v in names.values())
    ):
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
    _check_links(index.parent, wanted)
    return names


def _check_links(directory: Location, names: Iterable[str]) -> None:
    """Refuse links out of a directory, but for those into the blobs of the hub's cache.

    The cache has ``snapshots/REVISION/...``, full of links, beside the ``blobs`` that they lead to.
    """
    home = directory.resolve()
    caches = [path.parent / "blobs" for path in home.parents if path.name == "snapshots"]
    for name in sorted(names):
        target = (home / name).resolve()
        if not any(root in target.parents for root in (home, *caches)):
            raise CheckpointError(
                f"{directory / name} leads outside its directory: it is a link to {target}",
                "Put the file itself in the link's place.",
            )


def belongs(name: str) -> bool:
    """Whether a file's name is one that a model's own directory has."""
    whole = (*WEIGHT_FILES, "*.safetensors", "pytorch_model-*.bin", *COMPANIONS)
    own = (*whole, *adapter.FILES, adapter.CONFIG)
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in own)


def _is_file(path: Location) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def companions(directory: Location) -> list[Location]:
    """The configuration, tokenizer and code files that belong to a directory's model.

    Raises:
        CheckpointError: One is a link to a file elsewhere, which would be copied with them, or
            far larger than such files are.
    """
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    _check_links(directory, [path.name for path in found])
    large = sorted(path.name for path in found if path.stat().st_size > _MAX_COMPANION)
    if large:
        raise CheckpointError(
            f"{directory} holds files too large to be a configuration: {first_few(large)}",
            "Move them out of the directory, or write a single file (-o OUT.safetensors).",
        )
    return sorted(found, key=str)
