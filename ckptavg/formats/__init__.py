"""A checkpoint on disk → a table of byte ranges. Opening reads headers only and runs no code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats import huggingface, record, safetensors, storage, torch_zip, weights
from ckptavg.formats.inert_values import MalformedPickle, Refused, TensorView
from ckptavg.formats.storage import Location, Named
from ckptavg.formats.table import REFRESHED, Checkpoint, FileStamp, Record, Tensor

__all__ = [
    "Checkpoint",
    "FileStamp",
    "Record",
    "Tensor",
    "is_checkpoint_directory",
    "open_checkpoint",
]

PROVENANCE = "ckptavg"


def open_checkpoint(path: Named, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: read its headers, move no tensor data, run no code.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file under any suffix, or a Hugging Face
            directory; or the URL of one.
        key: Dotted path of the entry that holds the weights; found by itself where None.

    Raises:
        CheckpointError: It cannot be read, is damaged, or holds no weights that can be found.
    """
    place = storage.locate(path)
    if place.is_dir():
        return _open_directory(place, key)
    file = _read_file(place, key)
    return _checkpoint(place, file.layout, [file], file.record)


def is_checkpoint_directory(path: Location) -> bool:
    """Whether a directory is itself a checkpoint, not a collection of them."""
    return path.is_dir() and huggingface.main_file(path) is not None


def _is_safetensors(path: Location) -> bool:
    """By suffix, else by content.

    Raises:
        CheckpointError: The file cannot be read, or is of no known kind.
    """
    try:
        with storage.open_binary(path) as file:
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


@dataclass(frozen=True)
class _File:
    """One file of weights, under the names that it has for them."""

    layout: str
    stamp: FileStamp
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]
    record: Record
    provenance: Mapping[str, Any] | None
    key: str = ""
    notes: tuple[str, ...] = ()


def _read_file(path: Location, key: str | None) -> _File:
    return _read_safetensors(path) if _is_safetensors(path) else _read_torch(path, key)


def _read_safetensors(path: Location) -> _File:
    stamp = FileStamp.of(path)
    tensors, metadata = safetensors.read_header(path, stamp.size)
    made = _provenance(metadata)
    return _File("safetensors", stamp, tensors, {}, record.from_metadata(metadata), made)


def _read_torch(path: Location, key: str | None) -> _File:
    stamp = FileStamp.of(path)
    opened = torch_zip.read(path)
    try:
        found, entry, notes = weights.find_entry(str(path), opened.tree, key)
    except MalformedPickle as error:
        raise torch_zip.damaged(path, str(error)) from error
    views = {k: v for k, v in entry.items() if isinstance(k, str) and isinstance(v, TensorView)}
    refused = {k: v.why for k, v in entry.items() if isinstance(k, str) and isinstance(v, Refused)}
    others = [k for k in entry if k not in views and k not in refused]
    if others:
        shown = first_few([short(k) for k in others[:4]])
        notes.append(f"{len(others)} values beside the tensors are not taken: {shown}")
    return _File(
        layout="torch",
        stamp=stamp,
        tensors={name: opened.tensor(view) for name, view in views.items()},
        refused=refused,
        record=record.from_tree(opened.tree, found),
        provenance=_provenance(opened.tree),
        key=found,
        notes=tuple(notes),
    )


def _open_directory(path: Location, key: str | None) -> Checkpoint:
    main = huggingface.main_file(path)
    if main is None:
        raise CheckpointError(
            f"{path} is not itself a checkpoint", "Name one checkpoint; average a run first."
        )
    if main.name.endswith(".index.json"):
        files = _read_shards(main, key)
    else:
        files = [_read_file(main, key)]
    trainer = record.from_trainer_state(path / huggingface.TRAINER_STATE)
    return _checkpoint(path, "huggingface", files, trainer or files[0].record)


def _read_shards(index: Location, key: str | None) -> list[_File]:
    """Read each shard that an index names.

    Raises:
        CheckpointError: A shard is damaged, or the index and the shards disagree.
    """
    mapping = huggingface.weight_map(index)
    shards = {name: _read_file(index.parent / name, key) for name in sorted(set(mapping.values()))}
    held = {name: {*shard.tensors, *shard.refused} for name, shard in shards.items()}
    lost = [name for name, shard in mapping.items() if name not in held[shard]]
    if lost:
        raise CheckpointError(
            f"{index} lists tensors that are not in their shards: {first_few(lost)}",
            "Copy the directory again, or leave it out.",
        )
    twice = [name for name, n in Counter(chain(*held.values())).items() if n > 1]
    if twice:
        raise CheckpointError(f"{index.parent} holds tensors in two shards: {first_few(twice)}")
    return list(shards.values())


def _checkpoint(path: Location, layout: str, files: list[_File], recorded: Record) -> Checkpoint:
    """The files' tensors in one table, under bare names."""
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    refused = {name: why for file in files for name, why in file.refused.items()}
    if not tensors and not refused:
        raise CheckpointError(f"{path} holds no tensors")
    bare = weights.bare_names([*tensors, *refused])
    made = next((file.provenance for file in files if file.provenance), None)
    if made is not None and made.get("scheme") == REFRESHED and made["checkpoints"]:
        recorded = replace(recorded, step=record.whole_number(made["checkpoints"][0].get("step")))
    return Checkpoint(
        path=path,
        layout=layout,
        key=files[0].key,
        tensors={bare[name]: tensor for name, tensor in tensors.items() if name in bare},
        stored_names={bare[name]: name for name in tensors if name in bare},
        refused={bare[name]: why for name, why in refused.items() if name in bare},
        files=tuple(file.stamp for file in files),
        record=recorded,
        provenance=made,
        step=recorded.epoch if recorded.step is None else recorded.step,
        notes=tuple(note for file in files for note in file.notes),
    )


def _provenance(beside: Any) -> Mapping[str, Any] | None:
    """What ckptavg wrote about how it made a file; None where it did not."""
    text = beside.get(PROVENANCE) if isinstance(beside, Mapping) else None
    if not isinstance(text, str):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    made = value.get("checkpoints") if isinstance(value, dict) else None
    if not isinstance(made, list) or not all(map(_is_account, made)):
        return None
    return dict(value)


def _is_account(entry: Any) -> bool:
    """Whether this is what ckptavg writes of one checkpoint."""
    return isinstance(entry, dict) and all(
        entry.get(key) is None or record.number(entry[key]) is not None
        for key in ("step", "coefficient")
    )
