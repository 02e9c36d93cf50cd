"""The contents of a checkpoint's files, and the checkpoint that is built of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.errors.printable import size_text
from ckptavg.formats import training_record, tree, wrappers
from ckptavg.formats.checkpoint import Checkpoint, Record, Tensor
from ckptavg.formats.format import Format
from ckptavg.formats.provenance import PROVENANCE, Provenance
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

Kind = TypeVar("Kind")
# Characters of a tensor's name.
_LONGEST_NAME = 2000
# Bound on the bytes of all views: so many times the size of the file, plus so many bytes.
_MOST_REPEATED, _SPARE = 8, 256 * 2**20
# Names of values in a note.
_MOST_SHOWN = 4


@dataclass(frozen=True)
class Part:
    """A file of weights, or a set of shards, with tensors under stored names.

    Attributes:
        format: The format of the file or the set.
        stamps: Stamps of the files that store the bytes.
        tensors: Stored name → tensor.
        refused: Name → the reason why a tensor cannot be averaged.
        record: The numbers that training recorded beside the weights.
        provenance: The record of how ckptavg made the file; None for other files.
        key: Dotted path of the entry that holds the weights.
        networks: Dotted path below the key → names of the network's tensors; empty for a single
            state dict.
        notes: Remarks for the user about the way the file was read.
        other_entries: Descriptions of the other entries.
        metadata: Text of a safetensors header besides tensors and provenance, by name.
    """

    format: Format
    stamps: tuple[FileStamp, ...]
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]
    record: Record
    provenance: Provenance | None
    key: str = ""
    networks: Mapping[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    other_entries: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def select(entry: Mapping[Any, Any], kind: type[Kind]) -> dict[str, Kind]:
    """Select the named values of a kind from a state dict."""
    return {n: v for n, v in entry.items() if isinstance(n, str) and isinstance(v, kind)}


def tensor_names(entry: Mapping[Any, Any]) -> list[str]:
    """List the names of the tensors in a state dict."""
    return [n for n, v in entry.items() if isinstance(n, str) and isinstance(v, tree.TENSORS)]


def note_non_tensors(entry: Mapping[Any, Any]) -> list[str]:
    """Make a note about the values in a state dict that are no tensors."""
    names: list[Any] = []
    for name, value in entry.items():
        if not isinstance(name, str) or not isinstance(value, tree.TENSORS):
            names.append(name)
    if not names:
        return []
    shown = first_few([short(name) for name in names[:_MOST_SHOWN]])
    return [f"{len(names)} values beside the tensors are not taken: {shown}"]


def build_checkpoint(
    path: Location, format: Format, parts: Sequence[Part], record: Record
) -> Checkpoint:
    """Build a checkpoint from the tensors of all parts, under bare names.

    Args:
        path: The file or directory.
        format: The checkpoint's format.
        parts: The files or sets of shards, read.
        record: The numbers that training recorded.

    Raises:
        CheckpointError: There are no tensors, a name is too long, or the views repeat too many
            elements.
    """
    tensors: dict[str, Tensor] = {}
    refused: dict[str, str] = {}
    for part in parts:
        tensors |= part.tensors
        refused |= part.refused
    if not tensors and not refused:
        raise CheckpointError(f"{path} holds no tensors")
    names = [*tensors, *refused]
    if max(map(len, names)) > _LONGEST_NAME:
        raise CheckpointError(f"{path}: a tensor's name is over {_LONGEST_NAME} characters long")
    networks = parts[0].networks
    bare = wrappers.bare_network_names(networks) if networks else wrappers.bare_names(names)
    notes = list(chain(*(part.notes for part in parts)))
    notes += dict.fromkeys(chain(*map(wrappers.note_wrapper, networks.values() or [names])))
    provenance = next((part.provenance for part in parts if part.provenance), None)
    record = _with_original_step(record, provenance)
    checkpoint = Checkpoint(
        path=path,
        format=format,
        key=parts[0].key,
        networks=tuple(networks),
        tensors={bare[name]: tensor for name, tensor in tensors.items() if name in bare},
        stored_names={bare[name]: name for name in tensors if name in bare},
        refused={bare[name]: why for name, why in refused.items() if name in bare},
        files=tuple(chain(*(part.stamps for part in parts))),
        record=record,
        provenance=provenance,
        step=record.position,
        notes=tuple(notes),
        other_entries=parts[0].other_entries,
        metadata=parts[0].metadata,
    )
    _check_repeats(checkpoint)
    return checkpoint


def _with_original_step(record: Record, provenance: Provenance | None) -> Record:
    """Return the record with the step of the checkpoint whose statistics were refreshed."""
    if provenance is None or provenance.is_average or not provenance.inputs:
        return record
    # New statistics alone do not move a checkpoint: the step stays that of the original.
    return replace(record, step=training_record.whole_number(provenance.inputs[0].step))


def _check_repeats(checkpoint: Checkpoint) -> None:
    """Refuse views that make a small file huge: expanded views, or many views of one storage."""
    if checkpoint.nbytes > _MOST_REPEATED * checkpoint.size + _SPARE:
        raise CheckpointError(
            f"{checkpoint.path} would unfold to {size_text(checkpoint.nbytes)}: its tensors repeat "
            "their elements",
            "Save clones of them instead of expanded or overlapping views.",
        )


def find_provenance(entries: Any) -> Provenance | None:
    """Find the provenance among entries; return None for a file not made by ckptavg."""
    if not isinstance(entries, Mapping):
        return None
    return Provenance.from_json(entries.get(PROVENANCE))
