"""Writer of directories for ``dcp.load``: a single file of items, and the metadata.

Each item is a ``torch.save`` file of its own within the file of items.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata

from ckptavg.errors import first_few
from ckptavg.formats import lightning
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.dcp import reader
from ckptavg.formats.file_layout import FileLayout, Layout, OutputTensor
from ckptavg.formats.huggingface import companions
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safe_pickle.allowlist import CarryOver
from ckptavg.formats.safe_pickle.values import Sharded
from ckptavg.formats.torch_save.archive import Archive, StorageStub, TensorStub, dumps
from ckptavg.formats.tree import join, locate

_FILE = "__0_0.distcp"


def lay_out(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> Layout:
    """Plan a directory like the last input.

    Weights keep their full names and their place. Other entries are kept as far as the allowlist
    of ``safe_pickle`` permits.

    Args:
        tensors: Tensors of the output, under bare names.
        provenance: Record of how the output was made, as JSON.
        template: The last input, a directory of the same kind.

    Returns:
        The layout, with notes about entries that are left out.
    """
    # The input may have changed since it was opened.
    template.files[0].verify()
    source = reader.read(template.path)
    file = _Builder()
    paths = _paths_of_weights(source, template)
    entry_path: reader.ItemPath = ()
    if template.key:
        entry_path = tuple(template.key.split("."))
    for tensor in tensors:
        added = (*entry_path, template.stored_name(tensor.name))
        file.add_tensor(paths.get(tensor.name, added), tensor)
    values, dropped = _carry_values_over(source, set(paths.values()))
    for path, value in values.items():
        file.add_value(path, value)
    file.add_value((PROVENANCE,), provenance)
    notes: list[str] = []
    if dropped:
        notes.append(f"not taken over from the last checkpoint: {first_few(dropped, 30)}")
    layout = Layout(True, [file.layout], {reader.METADATA: file.encode_metadata(source.version)})
    # The output writes these files anew, so they are not copied.
    anew = {*source.stamps, str(template.path / lightning.META)}
    other_files = companions.gather(template.path, anew)
    layout.copies = other_files.copies
    notes += other_files.notes
    if (meta := lightning.read_meta(template.path)) is not None:
        layout.companions[lightning.META] = meta.to_file()
        notes += meta.notes
    # Without duplicates, in order.
    layout.notes = tuple(dict.fromkeys(notes))
    return layout


class _Builder:
    """Plan of a file of items, with the metadata of the items."""

    def __init__(self) -> None:
        self.layout = FileLayout(_FILE, 0, [], {})
        self._items: dict[str, metadata.STORAGE_TYPES] = {}
        self._places: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
        self._paths: dict[str, reader.ItemPath] = {}

    def add_tensor(self, path: reader.ItemPath, tensor: OutputTensor) -> None:
        """Add a tensor, and reserve room for the bytes."""
        storage = StorageStub("0", tensor.dtype, tensor.numel)
        archive = Archive()
        archive.add("data.pkl", dumps(TensorStub(storage, tensor.dtype, tensor.shape)))
        archive.add("byteorder", b"little")
        archive.reserve("data/0", tensor.nbytes, tensor.name)
        start = self._append(path, archive, (0,) * len(tensor.shape))
        self.layout.offsets[tensor.name] = start + archive.offsets[tensor.name]
        offsets = archive.checksums[tensor.name]
        self.layout.checksums[tensor.name] = [start + offset for offset in offsets]
        shape = torch.Size(tensor.shape)
        # One box per tensor, as a single process writes.
        chunk = metadata.ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
        properties = metadata.TensorProperties(getattr(torch, tensor.dtype.name))
        self._items[_join_name(path)] = metadata.TensorStorageMetadata(properties, shape, [chunk])

    def add_value(self, path: reader.ItemPath, value: Any) -> None:
        """Add a value that is not a tensor."""
        archive = Archive()
        archive.add("data.pkl", dumps(value))
        archive.add("byteorder", b"little")
        self._append(path, archive, None)
        self._items[_join_name(path)] = metadata.BytesStorageMetadata()

    def encode_metadata(self, version: str | None) -> bytes:
        """Encode the contents of the metadata file."""
        contents = metadata.Metadata(self._items, self._paths, self._places)
        # Directories of older versions of torch record no version of the format.
        if version is not None:
            contents.version = version
        return pickle.dumps(contents)

    def _append(
        self, path: reader.ItemPath, archive: Archive, first: tuple[int, ...] | None
    ) -> int:
        """Append the archive of an item, and record the item's place.

        Args:
            path: Path of the item.
            archive: The ``torch.save`` file of the item, not closed yet.
            first: Index of a box's first element; None for a value that is not a tensor.

        Returns:
            Offset of the archive in the file, in bytes.
        """
        archive.add("version", b"3\n")
        start = self.layout.size
        self.layout.parts += [(start + at, content) for at, content in archive.close()]
        self.layout.size += archive.size
        name = _join_name(path)
        index = metadata.MetadataIndex(name, first)
        self._places[index] = filesystem._StorageInfo(_FILE, start, archive.size)
        self._paths[name] = path
        return start


def _join_name(path: reader.ItemPath) -> str:
    """Join a path to a dotted name."""
    return ".".join(map(str, path))


def _paths_of_weights(
    source: reader.Distributed, template: Checkpoint
) -> dict[str, reader.ItemPath]:
    """Map bare names of weights to paths in the saved object."""
    full_names: dict[str, str] = {}
    for path in template.networks or ("",):
        network = locate(source.tree, join(template.key, path))
        if network is None:
            continue
        for name, value in network.entry.items():
            if isinstance(value, Sharded):
                full_names[join(path, name)] = value.name
    paths: dict[str, reader.ItemPath] = {}
    for bare, stored in template.stored_names.items():
        if stored in full_names:
            paths[bare] = source.paths[full_names[stored]]
    return paths


def _carry_values_over(
    source: reader.Distributed, weights: Collection[reader.ItemPath]
) -> tuple[Mapping[reader.ItemPath, Any], list[str]]:
    """Collect the values beside the weights that go into the output.

    Args:
        source: The input.
        weights: Paths of the weights.

    Returns:
        Path → value; and the dotted names of values that are dropped.
    """
    carry_over = CarryOver(key="", plain=False, tensor=lambda *_: None, replaced={})
    optimizers = {_above(path, "param_groups") for path in source.paths.values()}
    values: dict[reader.ItemPath, Any] = {}
    dropped: list[reader.ItemPath] = []
    for name, path in source.paths.items():
        if path in weights or path == (PROVENANCE,):
            continue
        if state := _find_training_state(source, path, optimizers):
            dropped.append(state)
            continue
        allowed: Mapping[Any, Any] = {}
        if name in source.items:
            allowed = carry_over.filter_entries({name: source.items[name]})
        if allowed:
            values[path] = allowed[name]
        else:
            dropped.append(path)
    # A list with a missing element would shift the others, so the whole list is dropped.
    broken = {_find_list(path) for path in dropped} - {()}
    complete = {path: value for path, value in values.items() if _find_list(path) not in broken}
    names = dict.fromkeys(_join_name(_find_list(path) or path) for path in dropped)
    return complete, list(names)


def _above(path: reader.ItemPath, part: str) -> reader.ItemPath:
    """Return the keys above a part of a path; empty if the path lacks the part."""
    if part not in path:
        return ()
    return path[: path.index(part)]


def _find_training_state(
    source: reader.Distributed, path: reader.ItemPath, optimizers: Collection[reader.ItemPath]
) -> reader.ItemPath:
    """Return the path of the optimizer or scheduler that holds an item; empty if none does.

    An optimizer under an unusual name is recognized by ``param_groups``.
    """
    if state := source.find_training_state(path):
        return state
    for depth in range(1, len(path)):
        if path[:depth] in optimizers:
            return path[:depth]
    return ()


def _find_list(path: reader.ItemPath) -> reader.ItemPath:
    """Return the path of the list that holds an item; empty if no list does."""
    for i, part in enumerate(path):
        if isinstance(part, int):
            return path[:i]
    return ()
