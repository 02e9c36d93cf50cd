"""A checkpoint on disk → a table of byte ranges. Opening reads headers only and runs no code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats import (
    adapter,
    bounded_json,
    dcp,
    deepspeed,
    huggingface,
    record,
    safetensors,
    storage,
    torch_zip,
    weights,
)
from ckptavg.formats.inert_values import MalformedPickle, Refused, Sharded, TensorView
from ckptavg.formats.storage import Location, Named
from ckptavg.formats.table import PROVENANCE, REFRESHED, Checkpoint, FileStamp, Record, Tensor

__all__ = [
    "Checkpoint",
    "FileStamp",
    "Record",
    "Tensor",
    "is_checkpoint_directory",
    "open_checkpoint",
    "refuse_partitioned",
]

_LONGEST_NAME = 2000  # characters
_MOST_REPEATED, _SPARE = 8, 256 * 2**20  # times a file's size, and bytes: what its views may take


def open_checkpoint(path: Named, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: read its headers, move no tensor data, run no code.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file under any suffix, a Hugging Face
            directory, or one of ``torch.distributed.checkpoint``; or the URL of one.
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
    if not path.is_dir():
        return False
    own = huggingface.main_file(path) is not None or dcp.is_distributed(path)
    return own or deepspeed.tag_of(path) is not None


def refuse_partitioned(paths: Iterable[Location]) -> None:
    """Make sure that the weights of some checkpoints are not spread over ranks.

    Raises:
        CheckpointError: Those of one are; with the commands that convert all of which they are.
    """
    directories = (path for path in paths if path.is_dir())
    deepspeed.refuse_partitioned(p for p in directories if huggingface.main_file(p) is None)


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
    stamps: tuple[FileStamp, ...]
    tensors: Mapping[str, Tensor]
    refused: Mapping[str, str]
    record: Record
    provenance: Mapping[str, Any] | None
    key: str = ""
    notes: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


def _read_file(path: Location, key: str | None) -> _File:
    stamp = FileStamp.of(path)  # before it is opened: a pipe may wait for ever
    if _is_safetensors(path):
        return _read_safetensors(path, stamp)
    return _read_torch(path, stamp, key)


def _read_safetensors(path: Location, stamp: FileStamp) -> _File:
    tensors, metadata = safetensors.read_header(path, stamp.size)
    made = _provenance(metadata)
    return _File("safetensors", (stamp,), tensors, {}, record.from_metadata(metadata), made)


def _read_torch(path: Location, stamp: FileStamp, key: str | None) -> _File:
    opened = torch_zip.read(path)
    try:
        found, entry, notes = weights.find_entry(str(path), opened.tree, key)
    except MalformedPickle as error:
        raise torch_zip.damaged(path, str(error)) from error
    views = _of_kind(entry, TensorView)
    tensors = {name: opened.tensor(view) for name, view in views.items()}
    deepspeed.refuse_placeholders(path, opened.tree, tensors)
    return _File(
        layout="torch",
        stamps=(stamp,),
        tensors=tensors,
        refused={name: value.why for name, value in _of_kind(entry, Refused).items()},
        record=record.from_tree(opened.tree, found, path.name, opened.number),
        provenance=_provenance(
            {PROVENANCE: opened.provenance} if opened.provenance else opened.tree
        ),
        key=found,
        notes=(*notes, *_note_others(entry)),
        beside=weights.beside(opened.tree, found),
    )


Kind = TypeVar("Kind")


def _of_kind(entry: Mapping[Any, Any], kind: type[Kind]) -> dict[str, Kind]:
    return {n: v for n, v in entry.items() if isinstance(n, str) and isinstance(v, kind)}


def _note_others(entry: Mapping[Any, Any]) -> list[str]:
    """A note about what an entry holds besides tensors."""
    others = [
        name
        for name, value in entry.items()
        if not isinstance(name, str) or not isinstance(value, weights.TENSORS)
    ]
    if not others:
        return []
    shown = first_few([short(name) for name in others[:4]])
    return [f"{len(others)} values beside the tensors are not taken: {shown}"]


def _read_distributed(path: Location, key: str | None) -> _File:
    opened = dcp.read(path)
    found, entry, notes = weights.find_entry(str(path), opened.tree, key)
    tensors = {n: opened.tensor(t) for n, t in _of_kind(entry, Sharded).items()}
    return _File(
        layout="distributed",
        stamps=tuple(map(FileStamp.of, opened.files(tensors))),
        tensors=tensors,
        refused={},
        record=record.from_tree(opened.tree, found),
        provenance=_provenance(opened.tree),
        key=found,
        notes=(*notes, *_note_others(entry)),
        beside=weights.beside(opened.tree, found),
    )


def _open_directory(path: Location, key: str | None) -> Checkpoint:
    main = huggingface.main_file(path)
    if main is None and dcp.is_distributed(path):
        file = _read_distributed(path, key)
        return _checkpoint(path, file.layout, [file], file.record)
    if main is None:
        return _open_deepspeed(path, key)
    if main.name.endswith(".index.json"):
        files = _read_shards(main, key)
    else:
        files = [_read_file(main, key)]
    trainer = record.from_trainer_state(path / huggingface.TRAINER_STATE)
    layout, notes = "huggingface", list[str]()
    if main.name in adapter.FILES:
        layout, notes = adapter.LAYOUT, [adapter.description(adapter.configuration(path))]
    if others := huggingface.other_models(main):
        notes.append(
            f"weights are taken from {main.name}; {first_few(others)} beside it is another model's "
            f"(name the files to average those: .../*/{others[0]})"
        )
    opened = _checkpoint(path, layout, files, trainer or files[0].record)
    return replace(opened, notes=(*opened.notes, *notes))


def _open_deepspeed(path: Location, key: str | None) -> Checkpoint:
    tag = deepspeed.tag_of(path)
    if tag is None:
        raise CheckpointError(
            f"{path} is not itself a checkpoint", "Name one checkpoint; average a run first."
        )
    file = _read_file(deepspeed.model_file(tag), key)
    trainer = record.from_trainer_state(path / huggingface.TRAINER_STATE)
    opened = _checkpoint(path, deepspeed.LAYOUT, [file], trainer or file.record)
    return replace(opened, notes=(*opened.notes, *deepspeed.notes(tag, opened.tensors)))


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
    names = [*tensors, *refused]
    if max(map(len, names)) > _LONGEST_NAME:
        raise CheckpointError(f"{path}: a tensor's name is over {_LONGEST_NAME} characters long")
    bare = weights.bare_names(names)
    made = next((file.provenance for file in files if file.provenance), None)
    if made is not None and made.get("scheme") == REFRESHED and made["checkpoints"]:
        recorded = replace(recorded, step=record.whole_number(made["checkpoints"][0].get("step")))
    checkpoint = Checkpoint(
        path=path,
        layout=layout,
        key=files[0].key,
        tensors={bare[name]: tensor for name, tensor in tensors.items() if name in bare},
        stored_names={bare[name]: name for name in tensors if name in bare},
        refused={bare[name]: why for name, why in refused.items() if name in bare},
        files=tuple(stamp for file in files for stamp in file.stamps),
        record=recorded,
        provenance=made,
        step=recorded.epoch if recorded.step is None else recorded.step,
        notes=(*chain(*(file.notes for file in files)), *weights.note_wrapper(bare, names)),
        beside=files[0].beside,
    )
    _check_repeats(checkpoint)
    return checkpoint


def _check_repeats(checkpoint: Checkpoint) -> None:
    """Refuse views that blow a small file up: expanded ones, or many of one storage."""
    if checkpoint.nbytes > _MOST_REPEATED * checkpoint.size + _SPARE:
        raise CheckpointError(
            f"{checkpoint.path} would unfold to {checkpoint.nbytes} bytes: its tensors repeat "
            "their elements",
            "Save clones of them instead of expanded or overlapping views.",
        )


def _provenance(beside: Any) -> Mapping[str, Any] | None:
    """What ckptavg wrote about how it made a file; None where it did not."""
    text = beside.get(PROVENANCE) if isinstance(beside, Mapping) else None
    if not isinstance(text, str):
        return None
    try:
        value = bounded_json.loads(text.encode())
    except ValueError:
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
