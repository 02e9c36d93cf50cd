"""Files that ranks of a parallel training wrote: parts of one model, which have no mean.

Tensor-parallel ranks hold slices under the same names. Pipeline stages count layers from zero.
Local shards of FSDP are flat. Such files do not record how the parts fit together, so the model
cannot be rebuilt from the parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.names import running_statistics
from ckptavg.io.paths import Location, ancestors
from ckptavg.runs.discovery.file_names import natural
from ckptavg.runs.discovery.numbered import names_step
from ckptavg.runs.duplicates import Contents, SameWeights

# Levels above a file whose names may have the number of the rank.
_DEEPEST = 3
_RANK = re.compile(
    r"(?<![a-z])consolidated\.\d\d(?=\.)|"
    r"(?<![a-z])mp_rank(?:_\d+)+|"
    r"(?<![a-z])rank[-_]?\d+|"
    r"(?<![a-z])(?:tp|pp|wp|(?:tensor|pipeline|model)[-_]?parallel)[-_]?\d+|"
    r"(?<![a-z\d])\d+of\d+(?![a-z\d])|"
    r"(?<![a-z])(?:model|weights|checkpoint|ckpt|state)[-_]parts?[-_]?\d+|"
    r"(?<![a-z])shards?[-_]?\d+",
    re.IGNORECASE,
)
# Further axes count only beside a match of the pattern above: ep5 alone is an epoch, and cp_100 a
# checkpoint.
_AXIS = re.compile(r"(?<![a-z])(?:cp|dp|ep|etp|edp|mp|sp|vpp|zo|zero)[-_]?(\d+)", re.IGNORECASE)
_REMEDIES = (
    (
        "model_states",
        "Save whole models from DeepSpeed (engine.save_16bit_model) and average those.",
    ),
    (
        "consolidated.",
        "Convert the checkpoint to Hugging Face first (transformers has "
        "convert_llama_weights_to_hf.py), then average what that writes.",
    ),
    (
        "mp_rank",
        "Join them first with the checkpoint conversion tool of the trainer "
        "(Megatron: tools/checkpoint/convert.py), then average what that writes.",
    ),
    (
        "world_size",
        "Join them first (verl: python -m verl.model_merger merge), then average what that writes.",
    ),
    (
        "fsdp",
        "Save full state dicts, or sharded ones with torch.distributed.checkpoint, and average "
        "those.",
    ),
)
_USUAL_REMEDY = (
    "Join them first with the conversion tool of the trainer, or save the whole model from "
    "training (one full state dict, or torch.distributed.checkpoint), then average that."
)
_NAMED_RUN = "If they are of several steps of a training, name each of them."
# Vectors of two checkpoints that are read at most. More would not change the decision.
_MOST_COMPARED = 64


@dataclass(frozen=True)
class RankFile:
    """File whose path names the rank that wrote the file, and so the part of a model.

    Attributes:
        path: The file.
        model: Path without the numbers of ranks, equal for the parts of one model.
        ranks: Numbers of ranks, without leading zeros.
    """

    path: Location
    model: tuple[object, ...]
    ranks: tuple[str, ...]


def parse_rank(path: Location) -> RankFile | None:
    """Parse the ranks in a path; None for a path without ranks."""
    line = [path, *ancestors(path, _DEEPEST)]
    names = [location.name for location in line]
    if not any(map(_RANK.search, names)):
        return None
    ranks: list[str] = []
    masked: list[str] = []
    for name in names:
        text = name
        # The rank of an adapter is a matrix dimension, not a process.
        for pattern in () if "lora" in name.lower() else (_RANK, _AXIS):
            for match in pattern.finditer(text):
                ranks += [n.lstrip("0") or "0" for n in re.findall(r"\d+", match[0])]
            text = pattern.sub(lambda match: re.sub(r"\d+", "*", match[0]), text)
        masked.append(text)
    return RankFile(path, (line[-1].parent, *masked), tuple(ranks))


def are_parts(paths: Sequence[Location]) -> bool:
    """Return True if paths name the parts of different ranks."""
    return bool(_group_by_model(paths))


def find_replicas(paths: Iterable[Location]) -> dict[Location, Location]:
    """Find the files in which ranks of data-parallel training repeat the first rank's weights.

    Returns:
        File with repeated weights → file of the first rank.

    Raises:
        CheckpointError: Files are parts of one model, or a file cannot be opened.
    """
    replicas: dict[Location, Location] = {}
    for group in _group_by_model(paths):
        first = open_checkpoint(group[0])
        copies: list[Location] = []
        for path in group[1:]:
            candidate = open_checkpoint(path)
            # Files that record different steps are no ranks, whatever the numbers in the names.
            if _moment(first) != _moment(candidate):
                break
            if not _are_replicas(first, candidate):
                raise _describe_parts(group, "ranks", _remedy(group))
            copies.append(path)
        else:
            replicas |= dict.fromkeys(copies, group[0])
    return replicas


def _group_by_model(paths: Iterable[Location]) -> list[list[Location]]:
    """Group the files of several ranks by model, one file per rank."""
    models: dict[object, dict[tuple[str, ...], Location]] = defaultdict(dict)
    for path in sorted(paths, key=natural):
        if (file := parse_rank(path)) is not None:
            models[file.model].setdefault(file.ranks, path)
    groups: list[list[Location]] = []
    for files in models.values():
        # Processes count from 0 or 1. Without a first number, the numbers are something else, such
        # as the ranks of adapters.
        has_first = any({"0", "1"} & {*numbers} for numbers in files)
        if len(files) > 1 and has_first:
            groups.append(list(files.values()))
    return groups


def _are_replicas(first: Checkpoint, second: Checkpoint) -> bool:
    """Return True if two ranks hold the same weights.

    The running statistics may differ: without SyncBatchNorm each rank has the statistics of the
    rank's own batches.
    """
    return _hold_same(_drop_statistics(first), _drop_statistics(second), Contents())


def _drop_statistics(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without running statistics."""
    statistics = running_statistics(checkpoint.tensors)
    weights = {name: t for name, t in checkpoint.tensors.items() if name not in statistics}
    return replace(checkpoint, tensors=weights)


def _hold_same(first: Checkpoint, second: Checkpoint, contents: Contents) -> bool:
    """Return True if two checkpoints hold the same tensors."""
    weights = SameWeights(contents)
    weights.add(first)
    return weights.find(second) is not None


def _remedy(group: Sequence[Location]) -> str:
    """Choose the remedy of the trainer that the paths are typical of."""
    path = str(group[0])
    return next((remedy for word, remedy in _REMEDIES if word in path), _USUAL_REMEDY)


def _describe_parts(group: Sequence[Location], kind: str, remedy: str) -> CheckpointError:
    """Word the error for files that hold parts of one model.

    Args:
        group: The files. The error names them below the nearest common directory.
        kind: Noun for the files, in the plural.
        remedy: The error's remedy.
    """
    common = _common_ancestors(group)
    home = next(parent for parent in ancestors(group[0], _DEEPEST + 2) if parent in common)
    depth = len(str(home).rstrip("/")) + 1 if str(home) != "." else 0
    names = [str(path)[depth:] for path in group]
    return CheckpointError(
        f"{home} holds parts of one model: {len(group)} {kind} ({first_few(names)})", remedy
    )


def _common_ancestors(group: Sequence[Location]) -> set[Location]:
    """Find the directories above all files of a group."""
    above = [set(ancestors(path, _DEEPEST + 2)) for path in group]
    return set.intersection(*above)


def refuse_parts(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of one step that are parts of one model, judged by the tensors.

    Raises:
        CheckpointError: Two checkpoints share no names, are cut along a dimension, or share most
            vectors and no matrix.
    """
    for former, latter in pairwise(checkpoints):
        if former.pattern != latter.pattern:
            continue
        # The cheapest tests come first: only the last test reads values.
        if _are_disjoint(former, latter) or _are_cut(former, latter) or _are_halves(former, latter):
            group = [c.path for c in checkpoints if _moment(c) == _moment(former)]
            raise _describe_parts(group, "files", f"{_USUAL_REMEDY} {_NAMED_RUN}")


def _moment(checkpoint: Checkpoint) -> tuple[int | None, float | None]:
    """Return the step and the epoch that a checkpoint records."""
    return checkpoint.record.step, checkpoint.record.epoch


def _same_step(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if two checkpoints record a step or an epoch, and agree in both."""
    return _moment(one) == _moment(other) != (None, None)


def _are_disjoint(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if two checkpoints share no names, and show no different steps."""
    if _moment(one) != _moment(other) or names_step(one.path.name):
        return False
    # A generator and a discriminator share no names, and yet are no parts of one model.
    same_networks = set(one.networks) == set(other.networks)
    return same_networks and not one.tensors.keys() & other.tensors.keys()


def _are_cut(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if at the same step tensors differ in the extent of a single dimension."""
    if not _same_step(one, other) or one.tensors.keys() != other.tensors.keys():
        return False
    pairs = [(tensor.shape, other.tensors[name].shape) for name, tensor in one.tensors.items()]
    if any(len(a) != len(b) for a, b in pairs):
        return False
    differing = [sum(n != m for n, m in zip(a, b, strict=True)) for a, b in pairs]
    return max(differing, default=0) == 1


def _are_halves(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if at the same step all matrices differ and most vectors are the same.

    This holds for slices of tensor-parallel ranks, since each rank has the whole of each norm.
    Between two steps of a training nearly all vectors differ.
    """
    if not _same_step(one, other) or not _first_numbers(one, other):
        return False
    shapes = [{name: t.shape for name, t in c.tensors.items()} for c in (one, other)]
    if shapes[0] != shapes[1]:
        return False
    contents = Contents()
    floats = {name: t for name, t in one.tensors.items() if t.dtype.kind == "float" and t.numel}
    matrices = [name for name, tensor in floats.items() if len(tensor.shape) > 1]
    vectors = [name for name, tensor in floats.items() if len(tensor.shape) == 1]
    vectors = vectors[:_MOST_COMPARED]
    equal = [name for name in vectors if _is_same(name, one, other, contents)]
    if not matrices or 2 * len(equal) <= len(vectors):
        return False
    return not any(_is_same(name, one, other, contents) for name in matrices)


def _is_same(name: str, one: Checkpoint, other: Checkpoint, contents: Contents) -> bool:
    """Return True if a tensor is the same in two checkpoints."""
    pair = [replace(c, tensors={name: c.tensors[name]}, refused={}) for c in (one, other)]
    return _hold_same(pair[0], pair[1], contents)


def _first_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if the names differ in a single number, 0 in the first and 1 in the second."""
    numbers = [re.findall(r"\d+", checkpoint.path.name) for checkpoint in (one, other)]
    differing = [(a, b) for a, b in zip(*numbers, strict=True) if a != b]
    return [(a.lstrip("0"), b.lstrip("0")) for a, b in differing] == [("", "1")]
