"""Writer of Hugging Face directories: the weights in files like the input's, and companions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from ckptavg.formats.checkpoint import Checkpoint, Tensor
from ckptavg.formats.file_layout import FileLayout, Layout, OutputTensor
from ckptavg.formats.huggingface import companions, peft
from ckptavg.formats.huggingface.components import join_component
from ckptavg.formats.huggingface.format import HUGGINGFACE, PEFT
from ckptavg.formats.huggingface.layout import (
    CONFIG,
    SUFFIXES,
    can_be_split,
    find_main_file,
    name_index,
    name_single_file,
)
from ckptavg.formats.safetensors.layout import header_metadata
from ckptavg.formats.safetensors.layout import lay_out as lay_out_safetensors
from ckptavg.formats.torch_save import writer
from ckptavg.formats.torch_save.format import TORCH_SAVE
from ckptavg.io import copying
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

_T = TypeVar("_T")
# Default shard size of Hugging Face. Used only where the input is not split into shards.
_SHARD_BYTES = 5_000_000_000
# Formats whose loaders expect the stored names: the output keeps them, wrappers included.
_MODEL_FORMATS = (HUGGINGFACE, PEFT)
# Bytes. A configuration is read whole, and real ones are far smaller.
_LARGEST_CONFIG = 16 << 20


def lay_out(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> Layout:
    """Plan an output directory like the last input's.

    The weights have the file names and shards of the input. The other files of the input are
    copied, except those that ``companions`` leaves out.

    Args:
        tensors: Tensors of the output, under bare names.
        provenance: Record of how the output was made, as JSON.
        template: The last input.

    Returns:
        The layout, with notes about parts of the input that are left out.
    """
    layout = Layout(directory=True, files=[])
    notes: list[str] = []
    for folder, members in _group_by_folder(tensors, template).items():
        component = template.components.get(folder, template)
        planned = _lay_out_folder(members, provenance, component)
        prefix = _prefix(folder)
        layout.files += [_move_below(file, prefix) for file in planned.files]
        layout.companions |= _prefix_keys(prefix, planned.indices)
        notes += planned.notes
    home = find_home(template)
    if home is not None:
        # A single file may be stored in any directory (a home directory, downloads). Only a
        # model's configuration shows that the directories below belong to the model.
        deep = home == template.path or (home / CONFIG).is_file()
        weights = _find_weight_files(template, home)
        gathered = companions.gather(home, weights, [*template.components], deep=deep)
        layout.copies = gathered.copies
        # After the copies: this replaces some of them.
        _update_configs(layout, tensors, template)
        notes += gathered.notes
    notes += _note_missing_config(layout, home, template)
    # The components of a pipeline often say the same.
    layout.notes = tuple(dict.fromkeys(notes))
    return layout


def find_home(template: Checkpoint) -> Location | None:
    """Return the directory whose files are copied along with a checkpoint; None if there is none.

    The home of a single weights file is the file's directory, if a configuration is stored there
    and no other weights file.
    """
    if template.format.is_directory:
        return template.path
    if isinstance(template.path, Path) and companions.is_alone(template.path):
        return template.path.parent
    return None


@dataclass
class _FolderLayout:
    """Plan of the weights files of a directory.

    Attributes:
        files: The files, under the names in the directory.
        indices: Name of the index of shards → contents; empty for a single file.
        notes: Notes about parts of the input that are left out.
    """

    files: list[FileLayout]
    indices: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _group_by_folder(
    tensors: Sequence[OutputTensor], template: Checkpoint
) -> dict[str, list[OutputTensor]]:
    """Group tensors by subdirectory of the output, which is the beginning of the name."""
    # Longest first, so that a directory within another one is found before the outer.
    folders = sorted(filter(None, template.components), key=len, reverse=True)
    # Every name begins with the empty prefix of the output's own directory.
    prefixes = [*map(_prefix, folders), ""]
    groups: dict[str, list[OutputTensor]] = {folder: [] for folder in template.components}
    for tensor in tensors:
        prefix = next(filter(tensor.name.startswith, prefixes))
        folder = prefix.removesuffix("/")
        groups.setdefault(folder, []).append(_rename_within(folder, tensor))
    return groups


def _prefix(folder: str) -> str:
    """Return the beginning of names in a subdirectory; empty for the output's own directory."""
    return f"{folder}/".removeprefix("/")


def _rename_within(folder: str, tensor: OutputTensor) -> OutputTensor:
    """Rename a tensor to the name within a directory, with the tied partner in the same file."""
    if not folder:
        return tensor
    prefix = _prefix(folder)
    tied = tensor.tied_to and tensor.tied_to.removeprefix(prefix)
    return replace(tensor, name=tensor.name.removeprefix(prefix), tied_to=tied)


def _move_below(file: FileLayout, prefix: str) -> FileLayout:
    """Move a file into a directory, and prefix the names of the tensors with the directory."""
    return replace(
        file,
        name=prefix + file.name,
        offsets=_prefix_keys(prefix, file.offsets),
        checksums=_prefix_keys(prefix, file.checksums),
    )


def _prefix_keys(prefix: str, values: Mapping[str, _T]) -> dict[str, _T]:
    return {prefix + key: value for key, value in values.items()}


def _lay_out_folder(
    tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
) -> _FolderLayout:
    """Plan the weights files of a directory."""
    name = _single_file_name(template)
    if not name.endswith(".safetensors"):
        torch_template = replace(template, format=TORCH_SAVE)
        file, dropped = writer.lay_out(name, tensors, provenance, torch_template)
        return _FolderLayout([replace(file, name=name)], notes=list(dropped))
    keeps_names = template.format in _MODEL_FORMATS
    bare_names: dict[str, str] = {}
    renamed: list[OutputTensor] = []
    for tensor in tensors:
        stored_name = tensor.name
        if keeps_names:
            stored_name = template.stored_name(tensor.name)
        bare_names[stored_name] = tensor.name
        renamed.append(replace(tensor, name=stored_name))
    metadata, notes = header_metadata(provenance, template.metadata, template.momentary)
    shards = _split_into_shards(name, renamed, template)
    planned = _FolderLayout([], notes=notes)
    for shard, members in shards.items():
        file = lay_out_safetensors(shard, members, metadata)
        # The writer asks for tensors by bare name, while the header has the stored names.
        file.offsets = {bare_names[stored]: offset for stored, offset in file.offsets.items()}
        planned.files.append(file)
    if len(shards) > 1:
        planned.indices[name_index(name)] = _encode_index(shards)
    return planned


def _single_file_name(template: Checkpoint) -> str:
    """Name the weights file of an output with a single file."""
    if template.format is PEFT:
        return peft.WEIGHTS
    if template.format is HUGGINGFACE:
        main = find_main_file(template.path)
        if main is not None:
            return name_single_file(main.name)
    has_home = template.path.suffix in SUFFIXES and find_home(template) is not None
    if has_home and not template.path.is_dir():
        return template.path.name
    return "model.safetensors"


def _split_into_shards(
    name: str, tensors: Sequence[OutputTensor], template: Checkpoint
) -> dict[str, list[OutputTensor]]:
    """Split tensors into files like the template, or by size where the template is a single file.

    Args:
        name: The name of a single file.
        tensors: The tensors of a directory, under stored names.
        template: The last input's component of the same directory.

    Returns:
        File name → tensors of the file.
    """
    groups: dict[object, list[OutputTensor]] = {}
    if template.format is HUGGINGFACE and len(template.files) > 1:
        input_files: dict[str, object] = {}
        for bare_name, stored_tensor in template.tensors.items():
            input_files[template.stored_names[bare_name]] = stored_tensor.pieces[0].file
        first = template.files[0].path
        for tensor in tensors:
            groups.setdefault(input_files.get(tensor.name, first), []).append(tensor)
    elif can_be_split(name):
        filled, number = 0, 0
        for tensor in tensors:
            # A tensor above the limit by itself gets a shard of its own.
            if filled and filled + tensor.nbytes > _SHARD_BYTES:
                filled, number = 0, number + 1
            groups.setdefault(number, []).append(tensor)
            filled += tensor.nbytes
    if len(groups) < 2:
        return {name: list(tensors)}
    stem, count = name.removesuffix(".safetensors"), len(groups)
    shards: dict[str, list[OutputTensor]] = {}
    for i, group in enumerate(groups.values(), 1):
        shards[f"{stem}-{i:05d}-of-{count:05d}.safetensors"] = group
    return shards


def _encode_index(shards: Mapping[str, Sequence[OutputTensor]]) -> bytes:
    """Write the index of shards as transformers does."""
    size = 0
    weight_map: dict[str, str] = {}
    for name, tensors in shards.items():
        for tensor in tensors:
            size += tensor.nbytes
            weight_map[tensor.name] = name
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    return json.dumps(content, indent=2).encode()


def _find_weight_files(template: Checkpoint, home: Location) -> set[str]:
    """Collect the paths of the weights files of the input, and of the indices."""
    paths = {stamp.path for stamp in template.files}
    for folder in template.components or [""]:
        main = find_main_file(join_component(home, folder))
        if main is not None:
            paths.add(str(main))
    return paths


def _update_configs(layout: Layout, tensors: Sequence[OutputTensor], template: Checkpoint) -> None:
    """Set the output's element type in configurations that state an element type."""
    for folder, members in _group_by_folder(tensors, template).items():
        component = template.components.get(folder, template)
        before = _float_types(component.tensors.values())
        after = _float_types(members)
        name = _prefix(folder) + CONFIG
        stamp = layout.copies.get(name)
        # With mixed types there is no single type of the model, so the configuration stays.
        if stamp is not None and before != after and len(after) == 1:
            layout.put(_replace_dtype(name, stamp, after.pop()))


def _float_types(tensors: Iterable[Tensor | OutputTensor]) -> set[str]:
    """Return the names of the floating-point element types of tensors."""
    return {tensor.dtype.name for tensor in tensors if tensor.dtype.kind == "float"}


def _replace_dtype(name: str, stamp: FileStamp, dtype: str) -> dict[str, bytes]:
    """Change the element type in a model's configuration.

    Args:
        name: The configuration's path below the output.
        stamp: The input's configuration.
        dtype: The element type as written.

    Returns:
        Name → new contents; empty if the configuration states no element type.
    """
    if stamp.size > _LARGEST_CONFIG:
        return {}
    try:
        values = json.loads(copying.read_whole(stamp))
    except (ValueError, RecursionError):
        return {}
    if not isinstance(values, dict):
        return {}
    # transformers renamed ``torch_dtype`` to ``dtype``, and reads both.
    stated = [key for key in ("dtype", "torch_dtype") if key in values]
    if not stated:
        return {}
    return {name: json.dumps(values | dict.fromkeys(stated, dtype), indent=2).encode()}


def _note_missing_config(layout: Layout, home: Location | None, template: Checkpoint) -> list[str]:
    """Note a missing configuration, except for adapters, which have none."""
    configured = any(name.rpartition("/")[2] == CONFIG for name in layout.names)
    if configured or template.format is PEFT:
        return []
    neighbour = template.path.parent / CONFIG
    if home is None and isinstance(neighbour, Path) and neighbour.is_file():
        return [
            f"the output has no {CONFIG}: {neighbour} is beside several "
            "checkpoints; copy it if it is the model's"
        ]
    return [f"the output has no {CONFIG}, which the input lacks too"]
