"""The formats of Hugging Face directories, as entries of the registry: models and adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats.checkpoint import Checkpoint, Tensor
from ckptavg.formats.damage import not_a_checkpoint
from ckptavg.formats.file_formats import read_file
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.format import DirectoryFormat, Unfinished
from ckptavg.formats.huggingface import components, layout, peft
from ckptavg.formats.huggingface.trainer_state import find_record, read_record
from ckptavg.formats.parts import Part, build_checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

# Names of directories in a message.
_MOST_FOLDERS = 8


class HuggingFace(DirectoryFormat):
    """Directories of models: one file of weights, shards with an index, or several directories."""

    name = "huggingface"
    label = "Hugging Face directories"
    is_written = True

    def detects(self, directory: Location) -> bool:
        """Return True if weights or an index are in a directory, or in directories it lists."""
        if layout.find_main_file(directory) is not None:
            return True
        return bool(components.find_components(directory))

    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open the weights in a directory, and in the directories that it lists."""
        folders = components.find_components(directory)
        opened: dict[str, Checkpoint] = {}
        main = layout.find_main_file(directory)
        if main is not None:
            opened[""] = _open_weights(directory, main, key)
        if not folders:
            return opened.get("")
        for folder in folders:
            component = components.join_component(directory, folder)
            main = layout.find_main_file(component)
            if main is None:
                raise not_a_checkpoint(component)
            opened[folder] = _open_weights(component, main, key)
        return _join(directory, opened)

    def component_names(self, directory: Location) -> set[str]:
        """Return the names of subdirectories that a model's lists name."""
        return components.find_part_names(directory)

    def lay_out(
        self, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
    ) -> Layout:
        """Plan a directory like the last input, with the files beside the weights.

        Args:
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.
        """
        from ckptavg.formats.huggingface import writer  # noqa: PLC0415 - needs torch

        return writer.lay_out(tensors, provenance, template)


class Peft(HuggingFace):
    """Directories of adapters."""

    name = "peft"
    label = "PEFT adapters"

    def detects(self, directory: Location) -> bool:
        """Return True if a directory holds an adapter, and no whole model."""
        return self._find_weights(directory) is not None

    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open the weights of an adapter."""
        weights = self._find_weights(directory)
        if weights is None:
            return None
        return _open_weights(directory, weights, key)

    def _find_weights(self, directory: Location) -> Location | None:
        """Return the weights file of an adapter; None if the directory holds a whole model."""
        weights = peft.find_weights(directory)
        if weights is None or layout.find_main_file(directory) != weights:
            return None
        if components.find_components(directory):
            return None
        return weights

    def is_part(self, path: Location) -> bool:
        """Return True for the weights file of an adapter."""
        return path.name in peft.FILES and peft.find_weights(path.parent) is not None

    def why_unfinished(self, directory: Location) -> Unfinished | None:
        """Describe an adapter without its configuration, in a directory that the Trainer named."""
        # Without its configuration, an adapter is not recognized as a checkpoint.
        is_numbered = re.fullmatch(r"checkpoint[-_]\d+", directory.name)
        if not is_numbered or not any(directory.glob("adapter_model.*")):
            return None
        return Unfinished(
            f"holds an adapter without its {peft.CONFIG}",
            "Copy that file beside it: it holds the rank and the scale.",
        )


HUGGINGFACE, PEFT = HuggingFace(), Peft()


def _open_weights(directory: Location, main: Location, key: str | None) -> Checkpoint:
    """Open the weights directly in a directory, without subdirectories.

    Args:
        directory: The directory of a model or an adapter.
        main: The weights file or the index of shards in the directory.
        key: Dotted path of the entry that holds the weights; None to find the entry.
    """
    parts = _read_shards(main, key) if main.suffix == ".json" else [read_file(main, key)]
    record = find_record(directory) or parts[0].record
    format, notes = HUGGINGFACE, list[str]()
    if main.name in peft.FILES:
        format, notes = PEFT, [peft.describe(peft.read_configuration(directory))]
    # Other variants may be stored beside the one taken, such as fp16 and bf16.
    if layout.is_variant(main.name):
        notes += layout.note_variants(directory)
    if unused := layout.find_other_models(main):
        notes.append(
            f"weights are taken from {main.name}; {first_few(unused)} beside it is another model's "
            f"(name the files to average those: .../*/{unused[0]})"
        )
    opened = build_checkpoint(directory, format, parts, record)
    return replace(opened, notes=(*opened.notes, *notes))


def _read_shards(index: Location, key: str | None) -> list[Part]:
    """Read each shard that an index names.

    Raises:
        CheckpointError: A shard is damaged, or the index and the shards disagree.
    """
    mapping = layout.read_weight_map(index)
    shards = {name: read_file(index.parent / name, key) for name in sorted(set(mapping.values()))}
    lost: list[str] = []
    for name, shard_name in mapping.items():
        shard = shards[shard_name]
        if name not in shard.tensors and name not in shard.refused:
            lost.append(name)
    if lost:
        raise CheckpointError(
            f"{index} lists tensors that are not in their shards: {first_few(lost)}",
            "Copy the directory again, or leave it out.",
        )
    counts: Counter[str] = Counter()
    for shard in shards.values():
        counts.update(shard.tensors.keys() | shard.refused.keys())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise CheckpointError(
            f"{index.parent} holds the same tensors in two shards: {first_few(repeated)}"
        )
    return list(shards.values())


def _join(path: Location, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    """Join several directories with weights into one checkpoint.

    Args:
        path: The model's directory.
        opened: Directory below the path → opened weights. The empty name stands for the path
            itself.

    Raises:
        CheckpointError: Two tensors have the same name.
    """
    tensors: dict[str, Tensor] = {}
    stored_names: dict[str, str] = {}
    refused: dict[str, str] = {}
    files: list[FileStamp] = []
    notes: list[str] = []
    provenance: Provenance | None = None
    count = 0
    for folder, component in opened.items():
        prefix = f"{folder}/".removeprefix("/")
        for name, tensor in component.tensors.items():
            tensors[prefix + name] = tensor
        for name, stored_name in component.stored_names.items():
            stored_names[prefix + name] = prefix + stored_name
        for name, reason in component.refused.items():
            refused[prefix + name] = reason
        count += len(component.tensors) + len(component.refused)
        files += component.files
        notes += component.notes
        provenance = provenance or component.provenance
    if len(tensors) + len(refused) < count:
        raise CheckpointError(f"{path} holds tensors of the same name in two directories")
    first = next(iter(opened.values()))
    record = read_record(path) or first.record
    metadata: Mapping[str, str] = {}
    if "" in opened:
        metadata = opened[""].metadata
    folders = first_few([short(folder) for folder in opened if folder], _MOST_FOLDERS)
    notes.append(f"one model of several directories, which tensor names begin with: {folders}")
    return replace(
        first,
        path=path,
        format=HUGGINGFACE,
        tensors=tensors,
        stored_names=stored_names,
        refused=refused,
        files=tuple(files),
        record=record,
        provenance=provenance,
        step=record.position,
        notes=tuple(dict.fromkeys(notes)),
        metadata=metadata,
        components=opened,
    )
