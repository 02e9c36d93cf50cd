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
from ckptavg.formats.network_entries import KNOWN_ENTRIES
from ckptavg.formats.safe_pickle import unpickler
from ckptavg.formats.safe_pickle.values import (
    Global,
    MalformedPickle,
    Opaque,
    Sharded,
    TensorView,
    is_natural,
)
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

_TENSOR = Global(MODULE, "TensorStorageMetadata")
# Index of an element of a list. Larger integers may be made to collide in a dict.
_LARGEST_INDEX = 2**31

ItemPath = tuple[str | int, ...]
FileRange = tuple[str, int, int]
"""File name, offset and length in bytes."""
Locations = Mapping[str, Mapping[str, FileRange]]
"""Item → index of the first element of a box → place of the box.

Indices are texts: texts cannot be made to collide in a dict, as integers can. For a value that is
not a tensor, the index is None.
"""
_NO_BOX = str(None)


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
        pieces: list[Piece] = []
        for box in self.boxes[sharded.name]:
            # Empty boxes have no bytes to read.
            if math.prod(box.shape):
                pieces.append(self._piece(sharded.name, box, sharded.dtype))
        return Tensor(sharded.dtype, sharded.shape, tuple(pieces))

    def stamps_of(self, tensors: Mapping[str, Tensor]) -> tuple[FileStamp, ...]:
        """Return the stamps of the metadata and of the files that hold tensors."""
        paths: set[str] = set()
        for tensor in tensors.values():
            paths.update(piece.file for piece in tensor.pieces)
        stamps = [self.stamps[str(self.path / METADATA)]]
        stamps += [self.stamps[path] for path in sorted(paths)]
        return tuple(stamps)

    def find_training_state(self, path: ItemPath) -> ItemPath:
        """Return the path of the optimizer or scheduler that holds an item; empty if none does."""
        return _find_training_state(path, self._entries_with_models)

    @cached_property
    def _entries_with_models(self) -> set[str | int]:
        return _find_applications(self.paths)

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
    stamp = _stamp_file(directory, METADATA)
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
    state = _read_attributes(saved, "Metadata")
    items, storage = state.get("state_dict_metadata"), state.get("storage_data")
    if not isinstance(items, dict) or not isinstance(storage, dict):
        raise MalformedPickle("it lists no items")
    stamps = {stamp.path: stamp}
    locations = _locate_items(directory, storage, stamps)
    paths = _item_paths(items, state.get("planner_data"))
    values: dict[str, Any] = {}
    boxes: dict[str, Sequence[Box]] = {}
    others: list[str] = []
    for name in paths:
        item = items[name]
        if isinstance(item, Opaque) and item.type == _TENSOR:
            values[name], boxes[name] = _parse_tensor(name, item, locations)
        else:
            others.append(name)
    values |= _read_values(directory, others, paths, locations)
    # In the order of the metadata, tensors and other values by turns.
    entries = {name: values[name] for name in paths if name in values}
    version = state.get("version")
    if not isinstance(version, str):
        version = None
    tree = _nest(entries, paths)
    return Distributed(directory, tree, entries, paths, boxes, stamps, version)


def _read_attributes(value: Any, name: str) -> dict[str, Any]:
    """Return the attributes of an object of a metadata class of torch."""
    if isinstance(value, Opaque) and isinstance(value.type, Global) and value.type.name == name:
        attributes: Any = value.state
        if isinstance(attributes, dict):
            return attributes
    raise MalformedPickle(f"it holds something else where a {name} belongs")


def _item_paths(items: Mapping[Any, Any], recorded: Any) -> dict[str, ItemPath]:
    """Return the keys that lead to each item in the saved object.

    The full name alone stands for keys that are not recorded, or not usable.

    Args:
        items: The items by full name.
        recorded: The paths as recorded in the metadata, by full name.
    """
    paths: dict[str, ItemPath] = {}
    for name in items:
        if not isinstance(name, str):
            continue
        paths[name] = (name,)
        if isinstance(recorded, dict):
            path = recorded.get(name)
            if isinstance(path, tuple) and path and all(map(_is_key, path)):
                paths[name] = path
    return paths


def _is_key(part: Any) -> bool:
    """Return True if a value is a key of a container: a name or an index."""
    return isinstance(part, str) or (type(part) is int and 0 <= part < _LARGEST_INDEX)


def _locate_items(
    directory: Location, storage: Mapping[Any, Any], stamps: dict[str, FileStamp]
) -> Locations:
    """Find file, offset and length of each item.

    Args:
        directory: The directory.
        storage: The locations as recorded in the metadata.
        stamps: Path → stamp of a file. Stamps of files that the metadata names are added.

    Raises:
        MalformedPickle: A location is malformed.
        CheckpointError: A file is missing or too short, or items share bytes.
    """
    locations: dict[str, dict[str, FileRange]] = defaultdict(dict)
    for key, value in storage.items():
        index = _read_attributes(key, "MetadataIndex")
        info = _read_attributes(value, "_StorageInfo")
        name, first = index.get("fqn"), index.get("offset")
        file, span = info.get("relative_path"), (info.get("offset"), info.get("length"))
        if not isinstance(name, str) or not (first is None or _is_extent(first)):
            raise MalformedPickle("an item is not named as it ought to be")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{directory} is compressed by an extension of the storage", "Save it without."
            )
        if not isinstance(file, str) or not _is_span(span):
            raise MalformedPickle(f"the place of {short(name)!r} is malformed")
        path = str(directory / file)
        if path not in stamps:
            stamps[path] = _stamp_file(directory, file)
        if sum(span) > stamps[path].size:
            raise damaged(directory / file, f"{short(name)!r} runs past its end")
        locations[name][str(first)] = (file, *span)
    _check_apart(directory, locations)
    return locations


def _check_apart(directory: Location, locations: Locations) -> None:
    """Refuse items that share bytes.

    Otherwise a small directory could name the same pickle any number of times.
    """
    ranges: list[FileRange] = []
    for boxes in locations.values():
        ranges += boxes.values()
    ranges.sort()
    for (file, start, length), (next_file, next_start, _) in pairwise(ranges):
        if file == next_file and start + length > next_start:
            raise damaged(directory / file, "two items share bytes of it")


def _stamp_file(directory: Location, name: str) -> FileStamp:
    """Return the stamp of a file that the metadata names, in the directory or linked there.

    Raises:
        CheckpointError: The file is missing, or outside the directory.
    """
    path = directory / name
    try:
        # The metadata is untrusted, and must not name files elsewhere on the machine.
        if Path(name).name != name or name in ("", ".."):
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
    if not isinstance(value, tuple) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(map(is_natural, value))


def _is_span(value: tuple[Any, Any]) -> TypeGuard[tuple[int, int]]:
    """Return True if a value is an offset and a length."""
    return _is_extent(value)


def _parse_tensor(name: str, item: Opaque, locations: Locations) -> tuple[Sharded, list[Box]]:
    """Parse the metadata of a tensor: element type, shape and boxes."""
    state = _read_attributes(item, "TensorStorageMetadata")
    shape, chunks = state.get("size"), state.get("chunks")
    dtype = DTYPES.get(_read_dtype_name(state.get("properties")))
    if dtype is None or not _is_extent(shape) or not isinstance(chunks, list):
        raise MalformedPickle(f"the tensor {short(name)!r} is malformed")
    boxes: list[Box] = []
    for chunk in chunks:
        attributes = _read_attributes(chunk, "ChunkStorageMetadata")
        start, extent = attributes.get("offsets"), attributes.get("sizes")
        if not _is_extent(start) or not _is_extent(extent):
            raise MalformedPickle(f"a piece of {short(name)!r} is malformed")
        location = locations.get(name, {}).get(str(start))
        if location is None:
            raise MalformedPickle(f"a piece of {short(name)!r} is nowhere")
        boxes.append(Box(start, extent, *location))
    # Holes would leave elements of the tensor undefined.
    if not tiles(shape, [box for box in boxes if math.prod(box.shape)]):
        raise MalformedPickle(f"the pieces of {short(name)!r} overlap or leave holes")
    return Sharded(name, dtype, shape), boxes


def _read_dtype_name(properties: Any) -> str:
    """Return the name of the element type, the first value in a pickled ``TensorProperties``."""
    if isinstance(properties, Opaque) and isinstance(properties.state, tuple):
        for value in properties.state[:1]:
            if isinstance(value, Global):
                return value.name
    return ""


def _read_values(
    directory: Location, names: Sequence[str], paths: Mapping[str, ItemPath], locations: Locations
) -> dict[str, Any]:
    """Read the small objects beside the tensors, except the state of optimizers.

    Args:
        directory: The directory.
        names: Full names of the objects.
        paths: Full name of each item → keys that lead to the item.
        locations: File, offset and length of each item.
    """
    applications = _find_applications(paths)
    wanted = [name for name in names if not _find_training_state(paths[name], applications)]
    values: dict[str, Any] = {}
    bytes_left = _MOST_BYTES
    for name in wanted[:_MOST_VALUES]:
        location = locations.get(name, {}).get(_NO_BOX)
        if location is None:
            raise MalformedPickle(f"the value {short(name)!r} is nowhere")
        file, offset, length = location
        # Values beyond the limit are dropped, since only weights are needed.
        if length > bytes_left:
            continue
        bytes_left -= length
        values[name] = zip_reader.read(directory / file, (offset, length)).tree
    return values


def _find_training_state(path: ItemPath, applications: Collection[str | int]) -> ItemPath:
    """Return the path of the optimizer or scheduler that holds an item; empty if none does.

    Args:
        path: Path of the item.
        applications: Entries that hold both a model and an optimizer.
    """
    # An application nests its model and optimizer one level deeper.
    depth = 1
    if path[0] in applications:
        depth = 2
    for part in path[depth - 1 : depth]:
        if isinstance(part, str) and TRAINING_STATE.fullmatch(part):
            return path[:depth]
    return ()


def _find_applications(paths: Mapping[str, ItemPath]) -> set[str | int]:
    """Return the names of entries that hold a model beside other state."""
    return {path[0] for path in paths.values() if len(path) > 2 and path[1] in KNOWN_ENTRIES}


def _nest(values: Mapping[str, Any], paths: Mapping[str, ItemPath]) -> dict[Any, Any]:
    """Rebuild the saved object from the items, with each model's state dict as a flat dict."""
    tree: dict[Any, Any] = {}
    for name, value in values.items():
        branch = tree
        path = _flatten_model(paths[name])
        # Paths are untrusted: two items may claim one place, or a value as a container.
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise MalformedPickle(f"{short(name)!r} is below a value that is no dict")
        if path[-1] in branch:
            raise MalformedPickle(f"two items have the place of {short(name)!r}")
        branch[path[-1]] = value
    return tree


def _flatten_model(path: ItemPath) -> ItemPath:
    """Return the path of an item in the tree: a model's entry, and a dotted name in the entry."""
    for depth, part in enumerate(path[:2], 1):
        if part in KNOWN_ENTRIES and len(path) > depth:
            return (*path[:depth], ".".join(map(str, path[depth:])))
    return path
