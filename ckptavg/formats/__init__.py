"""A checkpoint on disk → a table of byte ranges. Opening reads headers only and runs no code."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats import huggingface, record, safetensors, torch_zip, weights
from ckptavg.formats.inert_pickle import Refused, TensorView
from ckptavg.formats.table import Checkpoint, FileStamp, Record, Tensor

__all__ = [
    "Checkpoint",
    "FileStamp",
    "Record",
    "Tensor",
    "is_checkpoint_directory",
    "open_checkpoint",
]

PROVENANCE = "ckptavg"


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open a checkpoint: read its headers, move no tensor data, run no code.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file under any suffix, or a Hugging Face
            directory.
        key: Dotted path of the entry that holds the weights; found by itself where None.

    Raises:
        CheckpointError: It cannot be read, is damaged, or holds no weights that can be found.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, key)
    if _is_safetensors(path):
        return _open_safetensors(path)
    return _open_torch(path, key)


def is_checkpoint_directory(path: Path) -> bool:
    """Whether a directory is itself a checkpoint, not a collection of them."""
    return path.is_dir() and huggingface.main_file(path) is not None


def _is_safetensors(path: Path) -> bool:
    """By suffix, else by content.

    Raises:
        CheckpointError: The file cannot be read, or is of no known kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".safetensors":
        return True
    if torch_zip.looks_like(start):
        return False
    if start[8:9] == b"{":
        return True
    kind = "an empty file" if not start else "neither a torch.save file nor safetensors"
    raise torch_zip.damaged(path, kind)


def _open_safetensors(path: Path) -> Checkpoint:
    stamp = FileStamp.of(path)
    tensors, metadata = safetensors.read_header(str(path), stamp.size)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Checkpoint(
        path=path,
        layout="safetensors",
        key="",
        **_names(tensors),
        refused={},
        files=(stamp,),
        record=record.from_metadata(metadata),
        provenance=_provenance(metadata.get(PROVENANCE)),
    )


def _open_torch(path: Path, key: str | None) -> Checkpoint:
    stamp = FileStamp.of(path)
    opened = torch_zip.read(str(path))
    provenance = _provenance(opened.tree.get(PROVENANCE)) if isinstance(opened.tree, dict) else None
    found, entry, notes = weights.find_entry(str(path), opened.tree, key)
    views = {k: v for k, v in entry.items() if isinstance(k, str) and isinstance(v, TensorView)}
    refused = {k: v.why for k, v in entry.items() if isinstance(k, str) and isinstance(v, Refused)}
    others = [str(k) for k in entry if k not in views and k not in refused]
    if others:
        notes.append(f"{len(others)} values beside the tensors are not taken: {first_few(others)}")
    return Checkpoint(
        path=path,
        layout="torch",
        key=found,
        **_names({name: opened.tensor(view) for name, view in views.items()}),
        refused=refused,
        files=(stamp,),
        record=record.from_tree(opened.tree, found),
        provenance=provenance,
        notes=tuple(notes),
    )


def _open_directory(path: Path, key: str | None) -> Checkpoint:
    main = huggingface.main_file(path)
    if main is None:
        raise CheckpointError(f"{path} holds no checkpoint", "Name a file or another directory.")
    parts, provenance = _open_shards(main, key)
    tensors = {n: part.tensors[bare] for part in parts for bare, n in part.stored_names.items()}
    trainer = record.from_trainer_state(path / huggingface.TRAINER_STATE)
    return Checkpoint(
        path=path,
        layout="huggingface",
        key=parts[0].key,
        **_names(tensors),
        refused={name: why for part in parts for name, why in part.refused.items()},
        files=tuple(stamp for part in parts for stamp in part.files),
        record=trainer or parts[0].record,
        provenance=provenance,
        notes=tuple(note for part in parts for note in part.notes),
    )


def _open_shards(main: Path, key: str | None) -> tuple[list[Checkpoint], Mapping[str, Any] | None]:
    """Open a directory's weights file, or each shard that its index names.

    Raises:
        CheckpointError: A shard is damaged, or the index and the shards disagree.
    """
    if not main.name.endswith(".index.json"):
        opened = open_checkpoint(main, key)
        return [opened], opened.provenance
    mapping = huggingface.weight_map(main)
    shards = {
        name: open_checkpoint(main.parent / name, key) for name in sorted(set(mapping.values()))
    }
    held = {name: set(shard.stored_names.values()) for name, shard in shards.items()}
    lost = [name for name, shard in mapping.items() if name not in held[shard]]
    if lost:
        raise CheckpointError(
            f"{main} lists tensors that are not in their shards: {first_few(lost)}",
            "Copy the directory again, or leave it out.",
        )
    twice = [name for name, n in Counter(chain(*held.values())).items() if n > 1]
    if twice:
        raise CheckpointError(f"{main.parent} holds tensors in two shards: {first_few(twice)}")
    return list(shards.values()), next(
        (s.provenance for s in shards.values() if s.provenance), None
    )


def _names(stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """The table under bare names, and the names as they are stored."""
    bare = weights.bare_names(list(stored))
    return {
        "tensors": {bare[name]: tensor for name, tensor in stored.items() if name in bare},
        "stored_names": {bare[name]: name for name in stored if name in bare},
    }


def _provenance(text: Any) -> Mapping[str, Any] | None:
    """What ckptavg wrote about how it made a file; None where it did not."""
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and "checkpoints" in value else None
