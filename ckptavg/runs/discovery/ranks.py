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
from itertools import chain, pairwise

from ckptavg.errors import CheckpointError, first_few
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.formats.statistics_names import running_statistics
from ckptavg.io.paths import Location, ancestors
from ckptavg.runs.discovery.file_names import natural_key
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
_DEFAULT_REMEDY = (
    "Join them first with the conversion tool of the trainer, or save the whole model from "
    "training (one full state dict, or torch.distributed.checkpoint), then average that."
)
# Numbers of the first rank.
_FIRST = frozenset(["0", "1"])
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

    def mask(match: re.Match[str]) -> str:
        """Replace the numbers of ranks by stars, and collect the numbers."""
        for digits in re.findall(r"\d+", match[0]):
            ranks.append(digits.lstrip("0") or "0")
        return re.sub(r"\d+", "*", match[0])

    masked: list[str] = []
    for name in names:
        # The rank of an adapter is a matrix dimension, not a process.
        if "lora" in name.lower():
            masked.append(name)
        else:
            masked.append(_AXIS.sub(mask, _RANK.sub(mask, name)))
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
    for path in sorted(paths, key=natural_key):
        if (file := parse_rank(path)) is not None:
            models[file.model].setdefault(file.ranks, path)
    groups: list[list[Location]] = []
    for files in models.values():
        # Processes count from 0 or 1. Without a first number, the numbers are something else, such
        # as the ranks of adapters.
        numbers = set(chain.from_iterable(files))
        if len(files) > 1 and not numbers.isdisjoint(_FIRST):
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
    for word, remedy in _REMEDIES:
        if word in path:
            return remedy
    return _DEFAULT_REMEDY


def _describe_parts(group: Sequence[Location], kind: str, remedy: str) -> CheckpointError:
    """Word the error for files that hold parts of one model.

    Args:
        group: The files. The error names them below the nearest common directory.
        kind: Noun for the files, in the plural.
        remedy: The error's remedy.
    """
    home = _common_directory(group)
    prefix = "" if str(home) == "." else f"{str(home).rstrip('/')}/"
    names = [str(path).removeprefix(prefix) for path in group]
    return CheckpointError(
        f"{home} holds parts of one model: {len(group)} {kind} ({first_few(names)})", remedy
    )


def _common_directory(group: Sequence[Location]) -> Location:
    """Find the nearest directory above all files of a group."""
    common = ancestors(group[0], _DEEPEST + 2)
    for path in group[1:]:
        above = set(ancestors(path, _DEEPEST + 2))
        common = [directory for directory in common if directory in above]
    return common[0]


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
            raise _describe_parts(group, "files", f"{_DEFAULT_REMEDY} {_NAMED_RUN}")


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
    most = 0
    for name, tensor in one.tensors.items():
        shape, other_shape = tensor.shape, other.tensors[name].shape
        if len(shape) != len(other_shape):
            return False
        differing = [n for n, m in zip(shape, other_shape, strict=True) if n != m]
        most = max(most, len(differing))
    return most == 1


def _are_halves(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if at the same step all matrices differ and most vectors are the same.

    This holds for slices of tensor-parallel ranks, since each rank has the whole of each norm.
    Between two steps of a training nearly all vectors differ.
    """
    if not _same_step(one, other) or not _first_numbers(one, other):
        return False
    if _shapes_of(one) != _shapes_of(other):
        return False
    matrices: list[str] = []
    vectors: list[str] = []
    for name, tensor in one.tensors.items():
        if tensor.dtype.kind != "float" or not tensor.numel:
            continue
        if len(tensor.shape) > 1:
            matrices.append(name)
        elif len(tensor.shape) == 1:
            vectors.append(name)
    vectors = vectors[:_MOST_COMPARED]
    contents = Contents()
    equal = [name for name in vectors if _is_same(name, one, other, contents)]
    if not matrices or 2 * len(equal) <= len(vectors):
        return False
    return not any(_is_same(name, one, other, contents) for name in matrices)


def _shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def _is_same(name: str, one: Checkpoint, other: Checkpoint, contents: Contents) -> bool:
    """Return True if a tensor is the same in two checkpoints."""
    first = replace(one, tensors={name: one.tensors[name]}, refused={})
    second = replace(other, tensors={name: other.tensors[name]}, refused={})
    return _hold_same(first, second, contents)


def _first_numbers(one: Checkpoint, other: Checkpoint) -> bool:
    """Return True if the names differ in a single number, 0 in the first and 1 in the second."""
    numbers = re.findall(r"\d+", one.path.name)
    other_numbers = re.findall(r"\d+", other.path.name)
    differing: list[tuple[str, str]] = []
    for digits, other_digits in zip(numbers, other_numbers, strict=True):
        if digits != other_digits:
            differing.append((digits.lstrip("0"), other_digits.lstrip("0")))
    return differing == [("", "1")]
