"""Opening of checkpoints: a file or directory of any layout becomes a table of bare names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.errors.printable import size_text
from ckptavg.errors.system import guard_reads
from ckptavg.formats import deepspeed, shards, state_dict, training_record
from ckptavg.formats.checkpoint import Checkpoint, Record
from ckptavg.formats.dcp import reader
from ckptavg.formats.huggingface import components, peft
from ckptavg.formats.huggingface import layout as huggingface
from ckptavg.formats.parts import Part, read_distributed, read_file
from ckptavg.io.neighbours import suggest_neighbours
from ckptavg.io.paths import Location, Named, ancestors, locate

# Characters of a tensor's name.
_LONGEST_NAME = 2000
# A directory as the Hugging Face Trainer names it.
_TRAINERS = re.compile(r"checkpoint-\d+")
# Levels below the Trainer's directory at which weights may be stored.
_DEEPEST_WEIGHTS = 4
# Bound on the bytes of all views: so many times the size of the file, plus so many bytes.
_MOST_REPEATED, _SPARE = 8, 256 * 2**20


def open_checkpoint(path: Named, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: read the headers, move no tensor data, run no code.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file under any suffix, or a directory of
            Hugging Face, DeepSpeed or ``torch.distributed.checkpoint``; or a URL.
        key: Dotted path of the entry that holds the weights; None to find the entry.

    Raises:
        CheckpointError: The checkpoint cannot be read, is damaged, or holds no weights that can be
            found.
    """
    location = locate(path)
    with guard_reads(location):
        if location.is_dir():
            return _open_directory(location, key)
        if isinstance(location, Path) and not location.exists() and not location.is_symlink():
            raise CheckpointError(f"{location} does not exist", suggest_neighbours(location))
        return _checkpoint_of(location, read_file(location, key))


def is_checkpoint_directory(path: Location) -> bool:
    """Return True if a path is the directory of a checkpoint, not of several checkpoints."""
    if not path.is_dir():
        return False
    has_weights = huggingface.main_file(path) is not None or reader.is_distributed(path)
    if has_weights or deepspeed.tag_of(path) is not None or shards.find_shards(path):
        return True
    return bool(components.find_components(path))


def refuse_partitioned(paths: Iterable[Location]) -> None:
    """Make sure that no checkpoint has weights spread over ranks.

    Raises:
        CheckpointError: The weights of a checkpoint are spread. The error holds the commands that
            convert the checkpoints concerned.
    """
    # Whole weights beside the ranks' files are usable as they are.
    directories = (path for path in paths if path.is_dir())
    deepspeed.refuse_partitioned(p for p in directories if huggingface.main_file(p) is None)


def _open_directory(path: Location, key: str | None) -> Checkpoint:
    folders = components.find_components(path)
    if not folders:
        return _open_own_weights(path, key)
    opened = {f: _open_own_weights(components.component_directory(path, f), key) for f in folders}
    if huggingface.main_file(path) is not None:
        opened = {"": _open_own_weights(path, key), **opened}
    return _join(path, opened)


def _join(path: Location, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    """Join several directories with weights into one checkpoint.

    Args:
        path: The model's directory.
        opened: Directory below the path → opened weights. The empty name stands for the path
            itself.

    Raises:
        CheckpointError: Two tensors have the same name.
    """
    first = next(iter(opened.values()))
    trainer = training_record.from_trainer_state(path / huggingface.TRAINER_STATE)
    tables = {f"{folder}/" if folder else "": component for folder, component in opened.items()}
    tensors = {prefix + n: t for prefix, c in tables.items() for n, t in c.tensors.items()}
    refused = {prefix + n: why for prefix, c in tables.items() for n, why in c.refused.items()}
    if len(tensors) + len(refused) < sum(len(c.tensors) + len(c.refused) for c in opened.values()):
        raise CheckpointError(f"{path} holds tensors of the same name in two directories")
    recorded = trainer or first.record
    folders = first_few([short(folder) for folder in opened if folder], 8)
    note = f"one model of several directories, whose names its tensors bear in front: {folders}"
    return replace(
        first,
        path=path,
        layout="huggingface",
        tensors=tensors,
        stored_names={
            prefix + n: prefix + stored
            for prefix, c in tables.items()
            for n, stored in c.stored_names.items()
        },
        refused=refused,
        files=tuple(stamp for component in opened.values() for stamp in component.files),
        record=recorded,
        provenance=next((c.provenance for c in opened.values() if c.provenance), None),
        step=recorded.epoch if recorded.step is None else recorded.step,
        notes=(*dict.fromkeys(n for c in opened.values() for n in c.notes), note),
        metadata=opened[""].metadata if "" in opened else {},
        components=opened,
    )


def _open_own_weights(path: Location, key: str | None) -> Checkpoint:
    """Open the weights directly in a directory, without subdirectories."""
    main = huggingface.main_file(path)
    if main is None and reader.is_distributed(path):
        part = read_distributed(path, key)
        return _checkpoint(path, part.layout, [part], _trainers_record(path) or part.record)
    if main is None:
        return _open_shards(path, key) or _open_deepspeed(path, key)
    sharded = main.suffix == ".json"
    parts = _read_shards(main, key) if sharded else [read_file(main, key)]
    trainer = _trainers_record(path)
    layout, notes = "huggingface", list[str]()
    if main.name in peft.FILES:
        layout, notes = peft.LAYOUT, [peft.description(peft.configuration(path))]
    # Other variants may be stored beside the one taken, such as fp16 and bf16.
    if huggingface.is_variant(main.name):
        notes += huggingface.note_variants(path)
    if unused := huggingface.other_models(main):
        notes.append(
            f"weights are taken from {main.name}; {first_few(unused)} beside it is another model's "
            f"(name the files to average those: .../*/{unused[0]})"
        )
    opened = _checkpoint(path, layout, parts, trainer or parts[0].record)
    return replace(opened, notes=(*opened.notes, *notes))


def _open_shards(path: Location, key: str | None) -> Checkpoint | None:
    """Open a directory of shards without an index; return None if no shards are found."""
    files = shards.find_shards(path)
    if not files:
        return None
    part = shards.read_shards(path, files, key)
    trainer = _trainers_record(path)
    return _checkpoint(path, "huggingface", [part], trainer or part.record)


def _open_deepspeed(path: Location, key: str | None) -> Checkpoint:
    tag = deepspeed.tag_of(path)
    if tag is None:
        raise CheckpointError(
            f"{path} is not itself a checkpoint", "Name one checkpoint; average a run first."
        )
    file = read_file(deepspeed.model_file(tag), key)
    trainer = _trainers_record(path)
    opened = _checkpoint(path, deepspeed.LAYOUT, [file], trainer or file.record)
    return replace(opened, notes=(*opened.notes, *deepspeed.notes(tag, opened.tensors)))


def _read_shards(index: Location, key: str | None) -> list[Part]:
    """Read each shard that an index names.

    Raises:
        CheckpointError: A shard is damaged, or the index and the shards disagree.
    """
    mapping = huggingface.weight_map(index)
    shards = {name: read_file(index.parent / name, key) for name in sorted(set(mapping.values()))}
    names_by_shard = {name: {*shard.tensors, *shard.refused} for name, shard in shards.items()}
    lost = [name for name, shard in mapping.items() if name not in names_by_shard[shard]]
    if lost:
        raise CheckpointError(
            f"{index} lists tensors that are not in their shards: {first_few(lost)}",
            "Copy the directory again, or leave it out.",
        )
    twice = [name for name, n in Counter(chain(*names_by_shard.values())).items() if n > 1]
    if twice:
        raise CheckpointError(f"{index.parent} holds tensors in two shards: {first_few(twice)}")
    return list(shards.values())


def _trainers_record(directory: Location) -> Record | None:
    """Read the Trainer's record of a checkpoint from the directory, or from one above.

    Among the directories above only a ``checkpoint-500`` counts: the record of a whole run is that
    of the run's last step.
    """
    above = ancestors(directory, _DEEPEST_WEIGHTS)
    homes = [directory, *(parent for parent in above if _TRAINERS.fullmatch(parent.name))]
    for home in homes:
        record = training_record.from_trainer_state(home / huggingface.TRAINER_STATE)
        if record is not None:
            return record
    return None


def _checkpoint_of(path: Location, part: Part) -> Checkpoint:
    return _checkpoint(path, part.layout, [part], part.record)


def _checkpoint(path: Location, layout: str, parts: list[Part], recorded: Record) -> Checkpoint:
    """Build a checkpoint from the tensors of all parts, under bare names.

    Args:
        path: The file or directory.
        layout: The checkpoint's layout.
        parts: The files or sets of shards, read.
        recorded: The numbers that training recorded.

    Raises:
        CheckpointError: There are no tensors, a name is too long, or the views repeat too many
            elements.
    """
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    refused = {name: why for part in parts for name, why in part.refused.items()}
    if not tensors and not refused:
        raise CheckpointError(f"{path} holds no tensors")
    names = [*tensors, *refused]
    if max(map(len, names)) > _LONGEST_NAME:
        raise CheckpointError(f"{path}: a tensor's name is over {_LONGEST_NAME} characters long")
    networks = parts[0].networks
    bare = state_dict.bare_network_names(networks) if networks else state_dict.bare_names(names)
    wrappers = dict.fromkeys(chain(*map(state_dict.note_wrapper, networks.values() or [names])))
    provenance = next((part.provenance for part in parts if part.provenance), None)
    # New statistics alone do not move a checkpoint: the step stays that of the original.
    if provenance is not None and not provenance.is_average and provenance.inputs:
        step = training_record.whole_number(provenance.inputs[0].step)
        recorded = replace(recorded, step=step)
    checkpoint = Checkpoint(
        path=path,
        layout=layout,
        key=parts[0].key,
        networks=tuple(networks),
        tensors={bare[name]: tensor for name, tensor in tensors.items() if name in bare},
        stored_names={bare[name]: name for name in tensors if name in bare},
        refused={bare[name]: why for name, why in refused.items() if name in bare},
        files=tuple(stamp for part in parts for stamp in part.stamps),
        record=recorded,
        provenance=provenance,
        step=recorded.epoch if recorded.step is None else recorded.step,
        notes=(*chain(*(part.notes for part in parts)), *wrappers),
        beside=parts[0].beside,
        metadata=parts[0].metadata,
    )
    _check_repeats(checkpoint)
    return checkpoint


def _check_repeats(checkpoint: Checkpoint) -> None:
    """Refuse views that make a small file huge: expanded views, or many views of one storage."""
    if checkpoint.nbytes > _MOST_REPEATED * checkpoint.size + _SPARE:
        raise CheckpointError(
            f"{checkpoint.path} would unfold to {size_text(checkpoint.nbytes)}: its tensors repeat "
            "their elements",
            "Save clones of them instead of expanded or overlapping views.",
        )
