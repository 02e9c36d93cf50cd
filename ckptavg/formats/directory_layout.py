"""A Hugging Face directory: its weights in the files that its input has, and what goes along."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckptavg.formats import (
    adapter,
    companions,
    copying,
    deepspeed,
    huggingface,
    safetensors_layout,
    torch_layout,
)
from ckptavg.formats.output import FileLayout, Layout, OutputTensor
from ckptavg.formats.storage import Location
from ckptavg.formats.table import Checkpoint, FileStamp

_SHARD_BYTES = 5_000_000_000  # what Hugging Face splits at, where the input was not split already
_OF_MODELS = ("huggingface", adapter.LAYOUT)  # directories whose names of tensors are kept
_LARGEST_CONFIG = 16 << 20  # bytes


def lay_out(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> Layout:
    """Plan a directory like the last input's.

    It has the weights' files under their names and in their shards, and all that stands beside
    them but for what ``companions`` leaves out.

    Args:
        tensors: What it will hold, under bare names.
        provenance: How it was made, as JSON.
        template: The last input.
    """
    layout = Layout(directory=True, files=[])
    notes: list[str] = []
    for folder, held in _by_folder(tensors, template).items():
        part = _lay_out_part(held, provenance, template.components.get(folder, template))
        prefix = f"{folder}/" if folder else ""
        layout.files += [_moved(file, prefix) for file in part.files]
        layout.companions |= {prefix + name: text for name, text in part.indices.items()}
        notes += part.notes
    home = home_of(template)
    if home is not None:
        # a file's directory is a model's by its configuration, else it may be anybody's
        deep = home == template.path or (home / huggingface.CONFIG).is_file()
        beside = companions.gather(
            home, _weights_of(template, home), [*template.components], deep=deep
        )
        layout.copies = beside.copies
        _tell_configs(layout, tensors, template)
        notes += beside.notes
    notes += _note_config(layout, home, template)
    layout.notes = tuple(dict.fromkeys(notes))
    return layout


def home_of(template: Checkpoint) -> Location | None:
    """The directory whose files go along with a checkpoint; None if it has none of its own.

    That of a single file is one if no other file of weights stands there, and a configuration does.
    """
    if template.layout in (*_OF_MODELS, deepspeed.LAYOUT):
        return template.path
    directory = template.path.parent
    single = template.layout in ("safetensors", "torch") and isinstance(template.path, Path)
    return directory if single and companions.is_alone(template.path) else None


@dataclass
class _Part:
    """The files that hold the weights of one directory.

    Attributes:
        files: Under their names in it.
        indices: Contents of the index of several, by name.
        notes: What of the input is not in them.
    """

    files: list[FileLayout]
    indices: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _by_folder(
    tensors: Sequence[OutputTensor], template: Checkpoint
) -> dict[str, list[OutputTensor]]:
    """Directory below the output → what its files hold: the first parts of a name tell it."""
    folders = sorted(filter(None, template.components), key=len, reverse=True)
    groups: dict[str, list[OutputTensor]] = {folder: [] for folder in template.components}
    for tensor in tensors:
        own = (folder for folder in folders if tensor.name.startswith(f"{folder}/"))
        folder = next(own, "")
        groups.setdefault(folder, []).append(_within(folder, tensor))
    return groups


def _within(folder: str, tensor: OutputTensor) -> OutputTensor:
    """A tensor under its name in a directory; what it is tied to lies in the same file."""
    if not folder:
        return tensor
    prefix = f"{folder}/"
    tied = tensor.tied_to and tensor.tied_to.removeprefix(prefix)
    return replace(tensor, name=tensor.name.removeprefix(prefix), tied_to=tied)


def _moved(file: FileLayout, prefix: str) -> FileLayout:
    """A file as one of a directory below, where its tensors' names begin with the directory's."""
    return replace(
        file,
        name=prefix + file.name,
        offsets={prefix + name: at for name, at in file.offsets.items()},
        checksums={prefix + name: at for name, at in file.checksums.items()},
    )


def _lay_out_part(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> _Part:
    name = _file_name(template)
    if not name.endswith(".safetensors"):
        own = replace(template, layout="torch")
        file, dropped = torch_layout.lay_out(name, tensors, provenance, own)
        return _Part([replace(file, name=name)], notes=list(dropped))
    own_names = template.layout in _OF_MODELS
    bare = {template.stored_name(t.name) if own_names else t.name: t.name for t in tensors}
    renamed = [replace(t, name=stored) for stored, t in zip(bare, tensors, strict=True)]
    metadata, notes = safetensors_layout.header_metadata(provenance, template.metadata)
    shards = _shards(name, renamed, template)
    part = _Part([], notes=notes)
    for shard, held in shards.items():
        file = safetensors_layout.lay_out(shard, held, metadata)
        file.offsets = {bare[stored]: at for stored, at in file.offsets.items()}
        part.files.append(file)
    if len(shards) > 1:
        part.indices[huggingface.index_name(name)] = _index(shards)
    return part


def _file_name(template: Checkpoint) -> str:
    """The name of the file of weights that an output has if it has a single one."""
    if template.layout == adapter.LAYOUT:
        return adapter.WEIGHTS
    main = huggingface.main_file(template.path) if template.layout == "huggingface" else None
    if main is not None:
        return huggingface.single_name(main.name)
    kept = template.path.suffix in huggingface.SUFFIXES and home_of(template) is not None
    return template.path.name if kept and not template.path.is_dir() else "model.safetensors"


def _shards(
    name: str, tensors: Sequence[OutputTensor], template: Checkpoint
) -> dict[str, list[OutputTensor]]:
    """File name → tensors: as the template splits them, or by size where it does not."""
    groups: dict[object, list[OutputTensor]] = {}
    if template.layout == "huggingface" and len(template.files) > 1:
        home = {template.stored_names[n]: t.pieces[0].file for n, t in template.tensors.items()}
        first = template.files[0].path
        for tensor in tensors:
            groups.setdefault(home.get(tensor.name, first), []).append(tensor)
    elif huggingface.may_be_split(name):
        filled, number = 0, 0
        for tensor in tensors:
            if filled and filled + tensor.nbytes > _SHARD_BYTES:
                filled, number = 0, number + 1
            groups.setdefault(number, []).append(tensor)
            filled += tensor.nbytes
    if len(groups) < 2:
        return {name: list(tensors)}
    stem, count = name.removesuffix(".safetensors"), len(groups)
    return {
        f"{stem}-{i:05d}-of-{count:05d}.safetensors": group
        for i, group in enumerate(groups.values(), 1)
    }


def _index(shards: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    size = sum(tensor.nbytes for held in shards.values() for tensor in held)
    mapping = {tensor.name: name for name, held in shards.items() for tensor in held}
    content = {"metadata": {"total_size": size}, "weight_map": mapping}
    return json.dumps(content, indent=2).encode()


def _weights_of(template: Checkpoint, home: Location) -> set[str]:
    """Paths of the files that the weights were read from, and of their indices."""
    paths = {stamp.path for stamp in template.files}
    for folder in template.components or [""]:
        directory = home / folder if folder else home
        main = huggingface.main_file(directory)
        paths |= set() if main is None else {str(main)}
    return paths


def _tell_configs(layout: Layout, tensors: Sequence[OutputTensor], template: Checkpoint) -> None:
    """Put the element type as written into the configurations that tell it."""
    for folder, held in _by_folder(tensors, template).items():
        component = template.components.get(folder, template)
        before = {t.dtype.name for t in component.tensors.values() if t.dtype.kind == "float"}
        after = {t.dtype.name for t in held if t.dtype.kind == "float"}
        name = f"{folder}/{huggingface.CONFIG}" if folder else huggingface.CONFIG
        stamp = layout.copies.get(name)
        if stamp is not None and before != after and len(after) == 1:
            layout.put(_with_dtype(name, stamp, next(iter(after))))


def _with_dtype(name: str, stamp: FileStamp, dtype: str) -> dict[str, bytes]:
    """A model's configuration with the element type in it changed; empty if it tells none."""
    if stamp.size > _LARGEST_CONFIG:
        return {}
    try:
        values = json.loads(copying.read_whole(stamp))
    except (ValueError, RecursionError):
        return {}
    known = [key for key in ("dtype", "torch_dtype") if isinstance(values, dict) and key in values]
    if not known:
        return {}
    return {name: json.dumps(values | dict.fromkeys(known, dtype), indent=2).encode()}


def _note_config(layout: Layout, home: Location | None, template: Checkpoint) -> list[str]:
    """A note about a configuration that the output lacks."""
    configured = any(name.rpartition("/")[2] == huggingface.CONFIG for name in layout.names)
    if configured or template.layout == adapter.LAYOUT:
        return []
    beside = template.path.parent / huggingface.CONFIG
    if home is None and isinstance(beside, Path) and beside.is_file():
        return [
            f"the output has no {huggingface.CONFIG}: {beside} stands beside several checkpoints; "
            "copy it if it is the model's"
        ]
    return [f"the output has no {huggingface.CONFIG}, which the input lacks too"]
