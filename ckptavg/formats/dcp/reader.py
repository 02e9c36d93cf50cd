"""Reader of ``torch.distributed.checkpoint`` directories: shards, and a pickle that locates boxes.

``.metadata`` records for each box of a tensor the file and the offset. A box is a ``torch.save``
file inside that file. The whole checkpoint is therefore a set of byte ranges, which one process
can read, however many processes wrote it. The pickle is read inertly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from ckptavg.errors import CheckpointError, short
from ckptavg.errors.printable import size_text
from ckptavg.errors.system import unreadable
from ckptavg.formats.checkpoint import DTYPES, DType, Piece, Tensor
from ckptavg.formats.damage import damaged
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.values import Global, MalformedPickle, Opaque, Sharded, TensorView
from ckptavg.formats.state_dict import KNOWN_ENTRIES
from ckptavg.formats.tiling import tiles
from ckptavg.formats.torch_save import zip_reader
from ckptavg.formats.training_record import TRAINING_STATE
from ckptavg.io.paths import Location, open_binary
from ckptavg.io.stamp import FileStamp

METADATA = ".metadata"
# Suffix of the shards.
SUFFIX = ".distcp"
MODULE = "torch.distributed.checkpoint.metadata"
# Limits on the pickles beside the tensors: their number, and the bytes of all together.
_MOST_VALUES = 2000
_MOST_BYTES = unpickler.MAX_PICKLE
_MOST_DIMENSIONS = 64

ItemPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Box:
    """Box of a tensor: a rectangular part that a single shard stores.

    Attributes:
        start: Index of the first element in the tensor.
        shape: Extent of the box.
        file: Name of the file that holds the box.
        offset: Offset of the box's ``torch.save`` file in that file, in bytes.
        length: Length of the box's ``torch.save`` file, in bytes.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass
class Distributed:
    """An opened ``torch.distributed.checkpoint`` directory.

    Attributes:
        path: The directory.
        tree: The saved object with its nesting; tensors as ``Sharded``, other objects inert.
        items: Full name of each item → value in the tree. Values of an optimizer are not read.
        paths: Full name of each item → keys that led to the item in the saved object.
        boxes: Full name of a tensor → boxes of the tensor.
        stamps: Path → stamp, for the metadata and the files that the metadata names.
        version: Version of the format.
    """

    path: Location
    tree: Mapping[Any, Any]
    items: Mapping[str, Any]
    paths: Mapping[str, ItemPath]
    boxes: Mapping[str, Sequence[Box]]
    stamps: Mapping[str, FileStamp]
    version: str | None

    def tensor(self, sharded: Sharded) -> Tensor:
        """Return the table entry of a tensor in the tree.

        Raises:
            CheckpointError: A box of the tensor is damaged, or contradicts the metadata.
        """
        pieces = [
            self._piece(sharded.name, box, sharded.dtype)
            for box in self.boxes[sharded.name]
            # Empty boxes have no bytes to read.
            if math.prod(box.shape)
        ]
        return Tensor(sharded.dtype, sharded.shape, tuple(pieces))

    def stamps_of(self, tensors: Mapping[str, Tensor]) -> tuple[FileStamp, ...]:
        """Return the stamps of the metadata and of the files that hold tensors."""
        names = {piece.file for tensor in tensors.values() for piece in tensor.pieces}
        return tuple(self.stamps[name] for name in (str(self.path / METADATA), *sorted(names)))

    def training_state(self, path: ItemPath) -> ItemPath:
        """Return the path of the optimizer or scheduler that holds an item; empty if none does."""
        return _training_state(path, self._entries_with_models)

    @cached_property
    def _entries_with_models(self) -> set[str | int]:
        return _applications(self.paths)

    def _piece(self, name: str, box: Box, dtype: DType) -> Piece:
        """Open the ``torch.save`` file of a box, and return the piece of the tensor."""
        file = self.path / box.file
        opened = zip_reader.read(file, (box.offset, box.length))
        view = opened.tree
        if not isinstance(view, TensorView) or (view.dtype, view.shape) != (dtype, box.shape):
            raise damaged(file, f"what it holds of {name!r} is not what {METADATA} says")
        piece = opened.tensor(view).pieces[0]
        return replace(piece, start=box.start)


def is_distributed(directory: Location) -> bool:
    """Return True if a directory is a ``torch.distributed.checkpoint``."""
    return (directory / METADATA).is_file()


def read(directory: Location) -> Distributed:
    """Open a directory: read the metadata and the values beside the tensors.

    Raises:
        CheckpointError: The metadata is damaged, or names files outside the directory.
    """
    metadata = directory / METADATA
    stamp = _stamp(directory, METADATA)
    try:
        if stamp.size > unpickler.MAX_PICKLE:
            raise MalformedPickle(f"it is larger than {size_text(unpickler.MAX_PICKLE)}")
        with open_binary(metadata) as file:
            content = file.read(stamp.size)
        opened = _parse(directory, unpickler.loads(content), stamp)
    except MalformedPickle as error:
        raise damaged(metadata, str(error)) from error
    return opened


def _parse(directory: Location, saved: Any, stamp: FileStamp) -> Distributed:
    """Parse the metadata, and read the values beside the tensors."""
    state = _attributes(saved, "Metadata")
    items, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(items, dict) or not isinstance(storage, dict):
        raise MalformedPickle("it lists no items")
    stamps = {stamp.path: stamp}
    stored = _stored(directory, storage, stamps)
    mapping = state.get("planner_data")
    paths = {
        name: _item_path(name, mapping.get(name) if isinstance(mapping, dict) else None)
        for name in items
        if isinstance(name, str)
    }
    tensors = {
        name: _tensor(name, items[name], stored)
        for name in paths
        if getattr(items[name], "type", None) == Global(MODULE, "TensorStorageMetadata")
    }
    values = {name: tensor for name, (tensor, _) in tensors.items()} | _other_values(
        directory, [name for name in paths if name not in tensors], paths, stored
    )
    boxes = {name: parts for name, (_, parts) in tensors.items()}
    entries = {name: values[name] for name in paths if name in values}
    version = state.get("version")
    format_version = version if isinstance(version, str) else None
    return Distributed(
        directory, _nested(entries, paths), entries, paths, boxes, stamps, format_version
    )


def _attributes(value: Any, name: str) -> dict[str, Any]:
    """Return the attributes of an object of a metadata class of torch."""
    has_type = (
        isinstance(value, Opaque) and isinstance(value.type, Global) and value.type.name == name
    )
    if not has_type or not isinstance(value.state, dict):
        raise MalformedPickle(f"it holds something else where a {name} belongs")
    attributes: dict[str, Any] = value.state
    return attributes


def _item_path(name: str, path: Any) -> ItemPath:
    """Return the keys that lead to an item; the full name alone where they are not usable."""
    usable = isinstance(path, tuple) and path and all(map(_is_step, path))
    return path if usable else (name,)


def _is_step(part: Any) -> bool:
    """Return True if a value is a key of a container: a name or an index."""
    return isinstance(part, str) or (type(part) is int and 0 <= part < _LARGEST_INDEX)


def _begin(index: tuple[int, ...] | None) -> str:
    """Convert the index of a first element to a text key.

    Texts cannot be made to collide in a dict, as integers can.
    """
    return "" if index is None else str(index)


Stored = Mapping[str, Mapping[str, tuple[str, int, int]]]
"""Item → index of a box's first element, as text → file, offset and length in bytes."""

# Index of an element of a list. Larger integers may be made to collide in a dict.
_LARGEST_INDEX = 2**31


def _stored(directory: Location, places: Mapping[Any, Any], stamps: dict[str, FileStamp]) -> Stored:
    """Find file, offset and length of each item, and add the stamps of the files to ``stamps``."""
    stored: dict[str, dict[str, tuple[str, int, int]]] = defaultdict(dict)
    for key, value in places.items():
        index, info = _attributes(key, "MetadataIndex"), _attributes(value, "_StorageInfo")
        name, at = index.get("fqn"), index.get("offset")
        file, span = info.get("relative_path"), (info.get("offset"), info.get("length"))
        if not isinstance(name, str) or not (at is None or _is_extent(at)):
            raise MalformedPickle("an item is not named as it ought to be")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{directory} is compressed by an extension of the storage", "Save it without."
            )
        if not isinstance(file, str) or not _is_span(span):
            raise MalformedPickle(f"the place of {short(name)!r} is malformed")
        path = str(directory / file)
        if path not in stamps:
            stamps[path] = _stamp(directory, file)
        if sum(span) > stamps[path].size:
            raise damaged(directory / file, f"{short(name)!r} runs past its end")
        stored[name][_begin(at)] = (file, *span)
    _check_apart(directory, stored)
    return stored


def _check_apart(directory: Location, stored: Stored) -> None:
    """Refuse items that share bytes.

    Otherwise a small directory could name the same pickle any number of times.
    """
    spans = sorted(span for boxes in stored.values() for span in boxes.values())
    for (file, start, length), (next_file, after, _) in pairwise(spans):
        if file == next_file and start + length > after:
            raise damaged(directory / file, "two items share bytes of it")


def _stamp(directory: Location, name: str) -> FileStamp:
    """Return the stamp of a file that the metadata names, in the directory or linked there.

    Raises:
        CheckpointError: The file is missing, or outside the directory.
    """
    path = directory / name
    try:
        # The metadata is untrusted, and must not name files elsewhere on the machine.
        inside = Path(name).name == name and name not in ("", "..")
        if not inside:
            raise CheckpointError(
                f"{directory / METADATA} names a file outside its directory: {short(name)!r}"
            )
        if not path.is_file():
            raise CheckpointError(
                f"{directory / METADATA} names a file that is not there: {short(name)!r}",
                "Copy the directory again, or leave it out.",
            )
        return FileStamp.of(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CheckpointError(f"{short(str(path))} cannot be read: {error}") from error


def _is_extent(value: Any) -> TypeGuard[tuple[int, ...]]:
    """Return True if a value is a shape or an index of a plausible size."""
    return (
        isinstance(value, tuple)
        and len(value) <= _MOST_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**62 for n in value)
    )


def _is_span(value: tuple[Any, Any]) -> TypeGuard[tuple[int, int]]:
    """Return True if a value is an offset and a length."""
    return _is_extent(value)


def _tensor(name: str, item: Opaque, stored: Stored) -> tuple[Sharded, list[Box]]:
    state = _attributes(item, "TensorStorageMetadata")
    properties, shape, chunks = (state.get(k) for k in ("properties", "size", "chunks"))
    dtype = DTYPES.get(_dtype_name(properties))
    if dtype is None or not _is_extent(shape) or not isinstance(chunks, list):
        raise MalformedPickle(f"the tensor {short(name)!r} is malformed")
    boxes: list[Box] = []
    for chunk in chunks:
        attributes = _attributes(chunk, "ChunkStorageMetadata")
        start, extent = attributes.get("offsets"), attributes.get("sizes")
        if not _is_extent(start) or not _is_extent(extent):
            raise MalformedPickle(f"a piece of {short(name)!r} is malformed")
        span = stored.get(name, {}).get(_begin(start))
        if span is None:
            raise MalformedPickle(f"a piece of {short(name)!r} is nowhere")
        boxes.append(Box(start, extent, *span))
    # Holes would leave elements of the tensor undefined.
    if not tiles(shape, [box for box in boxes if math.prod(box.shape)]):
        raise MalformedPickle(f"the pieces of {short(name)!r} overlap or leave holes")
    return Sharded(name, dtype, shape), boxes


def _dtype_name(properties: Any) -> str:
    """Return the name of the element type, the first value in a pickled ``TensorProperties``."""
    state = properties.state if isinstance(properties, Opaque) else None
    first = state[0] if isinstance(state, tuple) and state else None
    return first.name if isinstance(first, Global) else ""


def _other_values(
    directory: Location, names: Sequence[str], paths: Mapping[str, ItemPath], stored: Stored
) -> dict[str, Any]:
    """Read the small objects beside the tensors, except the state of optimizers."""
    applications = _applications(paths)
    wanted = [name for name in names if not _training_state(paths[name], applications)]
    values: dict[str, Any] = {}
    bytes_left = _MOST_BYTES
    for name in wanted[:_MOST_VALUES]:
        span = stored.get(name, {}).get(_begin(None))
        if span is None:
            raise MalformedPickle(f"the value {short(name)!r} is nowhere")
        file, offset, length = span
        # Values beyond the limit are dropped, since only weights are needed.
        if length > bytes_left:
            continue
        bytes_left -= length
        values[name] = zip_reader.read(directory / file, (offset, length)).tree
    return values


def _training_state(path: ItemPath, applications: Collection[str | int]) -> ItemPath:
    """Return the path of the optimizer or scheduler that holds an item; empty if none does.

    Args:
        path: Path of the item.
        applications: Entries that hold both a model and an optimizer.
    """
    # An application nests its model and optimizer one level deeper.
    depth = 2 if path[0] in applications else 1
    part = path[depth - 1 : depth]
    is_training = part and isinstance(part[0], str) and TRAINING_STATE.fullmatch(part[0])
    return path[:depth] if is_training else ()


def _applications(paths: Mapping[str, ItemPath]) -> set[str | int]:
    """Return the entries that hold a model beside other state."""
    return {path[0] for path in paths.values() if len(path) > 2 and path[1] in KNOWN_ENTRIES}


def _nested(values: Mapping[str, Any], paths: Mapping[str, ItemPath]) -> dict[Any, Any]:
    """Rebuild the saved object from the items, with each model's state dict as a flat dict."""
    tree: dict[Any, Any] = {}
    for name, value in values.items():
        branch = tree
        path = _flattened(paths[name])
        # Paths are untrusted: two items may claim one place, or a value as a container.
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise MalformedPickle(f"{short(name)!r} lies below something that is no dict")
        if path[-1] in branch:
            raise MalformedPickle(f"two items have the place of {short(name)!r}")
        branch[path[-1]] = value
    return tree


def _flattened(path: ItemPath) -> ItemPath:
    """Return the path of an item in the tree, with one dotted name below a model's entry."""
    for depth, part in enumerate(path[:2]):
        if part in KNOWN_ENTRIES and len(path) > depth + 1:
            return (*path[: depth + 1], ".".join(map(str, path[depth + 1 :])))
    return path
