"""The files of a checkpoint, each read into names and byte ranges of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats import deepspeed, foreign, safetensors, state_dict, training_record, tree
from ckptavg.formats.checkpoint import Record, Tensor
from ckptavg.formats.damage import damaged
from ckptavg.formats.dcp import reader
from ckptavg.formats.provenance import PROVENANCE, Provenance
from ckptavg.formats.safe_pickle.values import (
    MalformedPickle,
    OrderedEntries,
    Refused,
    Sharded,
    TensorView,
)
from ckptavg.formats.torch_save import zip_reader
from ckptavg.io import paths
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

Kind = TypeVar("Kind")
_ARRAYS = "the weights are NumPy arrays, which an output has as tensors of torch's"


@dataclass(frozen=True)
class Part:
    """A file of weights, or a set of shards, with tensors under stored names.

    Attributes:
        layout: The kind of file.
        stamps: Stamps of the files that store the bytes.
        tensors: Stored name → tensor.
        refused: Name → the reason why a tensor cannot be averaged.
        record: The numbers that training recorded beside the weights.
        provenance: The record of how ckptavg made the file; None for other files.
        key: Dotted path of the entry that holds the weights.
        networks: Dotted path below the key → names of the network's tensors; empty for a single
            state dict.
        notes: Remarks for the user about the way the file was read.
        beside: Descriptions of the other entries.
        metadata: Text of a safetensors header besides tensors and provenance, by name.
    """

    layout: str
    stamps: tuple[FileStamp, ...]
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]
    record: Record
    provenance: Provenance | None
    key: str = ""
    networks: Mapping[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_file(path: Location, key: str | None) -> Part:
    """Read the header of a file of weights of any kind.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or holds no weights that can be found.
    """
    # Before the file is opened: opening a pipe may wait for ever.
    stamp = FileStamp.of(path)
    if _is_safetensors(path):
        return _read_safetensors(path, stamp)
    return _read_torch(path, stamp, key)


def _read_safetensors(path: Location, stamp: FileStamp) -> Part:
    tensors, metadata = safetensors.read_header(path, stamp.size)
    recorded, provenance = training_record.from_metadata(metadata), _provenance(metadata)
    texts = {name: text for name, text in metadata.items() if name != PROVENANCE}
    return Part("safetensors", (stamp,), tensors, {}, recorded, provenance, metadata=texts)


def _read_torch(path: Location, stamp: FileStamp, key: str | None) -> Part:
    opened = zip_reader.read(path)
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path} was written by torch.save, not as safetensors", f"Call it {path.stem}.pt."
        )
    try:
        weights = state_dict.find_weights(str(path), opened.tree, key)
    except MalformedPickle as error:
        raise damaged(path, str(error)) from error
    views = _of_kind(weights.entry, TensorView)
    tensors = {name: opened.tensor(view) for name, view in views.items()}
    deepspeed.refuse_placeholders(path, opened.tree, tensors)
    return Part(
        layout="torch",
        stamps=(stamp,),
        tensors=tensors,
        refused={name: value.why for name, value in _of_kind(weights.entry, Refused).items()},
        record=training_record.from_tree(opened.tree, weights.record_key, path.name, opened.number),
        provenance=_find_provenance(opened, weights.key),
        key=weights.key,
        networks={path: _tensor_names(entry) for path, entry in weights.networks.items()},
        notes=(*weights.notes, *_note_others(weights.entry), *([_ARRAYS] if opened.arrays else [])),
        beside=state_dict.beside(opened.tree, weights.paths),
    )


def _of_kind(entry: Mapping[Any, Any], kind: type[Kind]) -> dict[str, Kind]:
    return {n: v for n, v in entry.items() if isinstance(n, str) and isinstance(v, kind)}


def _tensor_names(entry: Mapping[Any, Any]) -> list[str]:
    return [n for n, v in entry.items() if isinstance(n, str) and isinstance(v, tree.TENSORS)]


def _note_others(entry: Mapping[Any, Any]) -> list[str]:
    """Make a note about the values in an entry that are no tensors."""
    non_tensors = [
        name
        for name, value in entry.items()
        if not isinstance(name, str) or not isinstance(value, tree.TENSORS)
    ]
    if not non_tensors:
        return []
    shown = first_few([short(name) for name in non_tensors[:4]])
    return [f"{len(non_tensors)} values beside the tensors are not taken: {shown}"]


def read_distributed(path: Location, key: str | None) -> Part:
    """Read the metadata of a directory of ``torch.distributed.checkpoint``, like ``read_file``."""
    opened = reader.read(path)
    weights = state_dict.find_weights(str(path), opened.tree, key)
    tensors = {n: opened.tensor(t) for n, t in _of_kind(weights.entry, Sharded).items()}
    return Part(
        layout="distributed",
        stamps=opened.stamps_of(tensors),
        tensors=tensors,
        refused={},
        record=training_record.from_tree(opened.tree, weights.record_key),
        provenance=_provenance(opened.tree),
        key=weights.key,
        networks={path: _tensor_names(entry) for path, entry in weights.networks.items()},
        notes=(*weights.notes, *_note_others(weights.entry)),
        beside=state_dict.beside(opened.tree, weights.paths),
    )


def _is_safetensors(path: Location) -> bool:
    """Return True for safetensors and False for ``torch.save``, by content, else by suffix.

    Raises:
        CheckpointError: The file cannot be read, or is of another kind.
    """
    if stranger := foreign.identify_name(path):
        raise stranger.refusal(path)
    with paths.open_binary(path) as file:
        start = file.read(foreign.HEAD)
        if safetensors.looks_like(start):
            return True
        if zip_reader.looks_like(start):
            return False
        if stranger := foreign.identify(path, file, start):
            raise stranger.refusal(path)
    if path.suffix == ".safetensors":
        return True
    raise CheckpointError(
        f"{path} is of no known kind: neither a torch.save file nor safetensors",
        "Name a file of weights, or leave it out.",
    )


def _find_provenance(opened: zip_reader.TorchFile, key: str) -> Provenance | None:
    """Find the provenance of a file: beside the weights, or attached to the state dict."""
    provenance = Provenance.from_json(opened.provenance) or _provenance(opened.tree)
    entry = tree.value_at(opened.tree, key)
    if provenance is None and isinstance(entry, OrderedEntries):
        return Provenance.from_json(entry.account)
    return provenance


def _provenance(beside: Any) -> Provenance | None:
    """Parse the provenance beside the weights; return None for a file not made by ckptavg."""
    return Provenance.from_json(beside.get(PROVENANCE)) if isinstance(beside, Mapping) else None
