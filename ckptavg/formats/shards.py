"""Shards of one model in a directory without an index.

The names and headers of the shards replace the index.

``torch.distributed.checkpoint`` writes safetensors files per rank. The header of each file holds
the offsets of the boxes in the file (``HuggingFaceStorageWriter(save_distributed=True)``). Other
shards hold whole tensors, no name twice. Their file names state the number of shards.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats.checkpoint import MOST_ELEMENTS, Checkpoint, Piece, Tensor
from ckptavg.formats.file_formats import read_file
from ckptavg.formats.format import DirectoryFormat
from ckptavg.formats.huggingface.format import HUGGINGFACE
from ckptavg.formats.huggingface.trainer_state import find_record
from ckptavg.formats.parts import Part, build_checkpoint
from ckptavg.formats.tiling import tiles
from ckptavg.formats.training_record import TRAINING_STATE
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# A number and a count at the end of a name: 00001-of-00004.
_COUNTED = re.compile(r"(\d{1,9})([-_]of[-_])(\d{1,9})(?=\.[^.]*$)")
# Hugging Face pads the numbers of shards to so many digits. No trainer does so with epochs.
_STRICT_DIGITS = 5
# A word before the number that leaves open whether the file is a shard or a run's checkpoint.
_STEP_WORD = re.compile(r"(?<![a-z])(epochs?|ep|(global_?)?steps?|iters?)[-_= ]?$", re.IGNORECASE)
_RANK = re.compile(r"shard-(\d{1,9})-(?=model-)")
# Entries in the headers of torch.distributed.checkpoint.
_OFFSETS = "DCP_SHARDING_INFO"
_OFFSETS_VERSION = "DCP_VERSION"
# Most shards that are looked for, since a name may claim a billion shards.
_MOST_MISSING = 100_000
_GATHER = "Copy all shards of one save into the directory, and no others."
_JOIN = (
    "Slices of tensors are joined by the conversion tool of the trainer that wrote them; average "
    "what that writes."
)


@dataclass(frozen=True)
class Shard:
    """The parts of a shard's name.

    Attributes:
        path: The file.
        index: The shard's number, counted from 1 in most sets and from 0 in some.
        count: The number of shards in the set, as stated in the name.
        pattern: The name without the shard's number: equal for all shards of one set.
        strict: True if only shards have such names.
        rank: The number of the rank that wrote the file, if each rank numbers files separately.
    """

    path: Location
    index: int
    count: int
    pattern: str
    strict: bool
    rank: int | None

    def sibling(self, index: int) -> str:
        """Return the name of the shard with another number."""
        width = _STRICT_DIGITS
        if not self.strict:
            # Unpadded numbers keep their own width.
            width = len(str(self.index))
        return self.pattern.replace("*", f"{index:0{width}d}", 1)


def parse_name(path: Location) -> Shard | None:
    """Parse the name of a shard; return None for any other name."""
    match = _COUNTED.search(path.name)
    if match is None or not path.name.endswith(_SUFFIXES):
        return None
    begin, end = match.span(1)
    pattern = f"{path.name[:begin]}*{path.name[end:]}"
    # Zero-padded counts are a shard's, unless a word such as epoch stands before the number.
    padded = len(match[1]) == len(match[3]) == _STRICT_DIGITS
    strict = padded and not _STEP_WORD.search(path.name[:begin])
    number = None
    if rank := _RANK.match(pattern):
        pattern, number = pattern[rank.end() :], int(rank[1])
    return Shard(path, int(match[1]), int(match[3]), pattern, strict, number)


def find_shards(directory: Location) -> list[Shard]:
    """Find the shards of a sharded model; return an empty list for any other directory.

    Files with counts in the names (``epoch_1_of_3.pt``) that hold the same tensors are the
    checkpoints of a run.
    """
    shards: list[Shard] = []
    patterns: set[str] = set()
    files: list[Location] = list(directory.iterdir())
    for path in sorted(files, key=lambda p: p.name):
        if path.name.startswith(".") or not path.name.endswith(_SUFFIXES):
            continue
        shard = parse_name(path)
        if shard is not None:
            shards.append(shard)
            patterns.add(shard.pattern)
        elif re.search(r"\d", path.name) and not _is_training_state(path.name):
            # Another numbered file may be a checkpoint, and the directory then a run.
            return []
    if len(patterns) != 1 or not _fit_together(shards):
        return []
    return shards


def read_shards(directory: Location, shards: Sequence[Shard], key: str | None) -> Part:
    """Read the shards of one model into a single table.

    Args:
        directory: The directory that holds them.
        shards: The result of ``find_shards``.
        key: Dotted path of the entry that holds the weights; None to find the entry.

    Raises:
        CheckpointError: A shard is missing or damaged, or the shards do not make up whole tensors.
    """
    _check_complete(directory, shards)
    tables = [read_file(shard.path, key) for shard in shards]
    boxes: dict[str, list[Tensor]] = defaultdict(list)
    try:
        for table in tables:
            offsets = _parse_offsets(table)
            for name, tensor in table.tensors.items():
                if name in boxes and name not in offsets:
                    raise _Unfit(f"several have {short(name)!r}, and none says which part", _JOIN)
                boxes[name].append(_shift(name, tensor, offsets.get(name)))
        tensors: dict[str, Tensor] = {}
        for name, pieces in boxes.items():
            tensors[name] = _assemble(name, pieces)
    except _Unfit as error:
        raise CheckpointError(
            f"{directory} holds parts of one model that do not fit together: {error}"
            f"{_describe_absent_ranks(shards)}",
            error.remedy,
        ) from error
    stamps: list[FileStamp] = []
    refused: dict[str, str] = {}
    notes: list[str] = []
    for table in tables:
        stamps += table.stamps
        refused |= table.refused
        notes += table.notes
    metadata = dict(tables[0].metadata)
    # The offsets describe the boxes of one file, and are untrue of the whole model.
    for outdated in (_OFFSETS, _OFFSETS_VERSION):
        metadata.pop(outdated, None)
    return replace(
        tables[0],
        stamps=tuple(stamps),
        tensors=tensors,
        refused=refused,
        notes=tuple(dict.fromkeys(notes)),
        metadata=metadata,
    )


def _is_training_state(name: str) -> bool:
    """Return True if a name is that of an optimizer's, a scheduler's or a generator's state."""
    return bool(TRAINING_STATE.fullmatch(name) or re.match(r"rng|random|zero_pp", name))


def _fit_together(shards: Sequence[Shard]) -> bool:
    """Return True if files are shards of one model, by the names or else by two headers."""
    if shards[0].rank is not None:
        return True
    if shards[0].strict:
        # True even if the shards do not fit: slices of tensors must not be averaged as a run.
        return True
    if len(shards) == 1:
        return False
    try:
        first = read_file(shards[0].path, None)
        second = read_file(shards[1].path, None)
    except CheckpointError:
        return False
    # Checkpoints of a run share the names of tensors. Shards do not, except for boxes.
    return _OFFSETS in first.metadata or not {*first.tensors} & {*second.tensors}


def _check_complete(directory: Location, shards: Sequence[Shard]) -> None:
    """Make sure that a set of shards is complete.

    Raises:
        CheckpointError: A shard is missing.
    """
    indices, count = {shard.index for shard in shards}, shards[0].count
    # A set that is counted from 0 has a shard with the number 0.
    first = min(indices | {1})
    if len(indices) == count and max(indices) - first + 1 == count:
        return
    expected = set(range(first, first + min(count, _MOST_MISSING)))
    missing = [shards[0].sibling(index) for index in sorted(expected - indices)]
    raise CheckpointError(
        f"{directory} holds parts of one model: {len(indices)} of {count} shards, without "
        f"{first_few(missing)}",
        _GATHER,
    )


def _describe_absent_ranks(shards: Sequence[Shard]) -> str:
    """List, for a message, the ranks without a file below the highest; return "" if none."""
    ranks = {shard.rank for shard in shards if shard.rank is not None}
    # Bounded, since the rank in a name may be a billion.
    last = min(max(ranks, default=0), _MOST_MISSING)
    absent = [f"shard-{rank:05d}" for rank in sorted(set(range(1, last)) - ranks)]
    if not absent:
        return ""
    return f" (there is no {first_few(absent)})"


class _Unfit(ValueError):
    """The reason why shards do not make up whole tensors, with a remedy."""

    def __init__(self, reason: str, remedy: str = _GATHER) -> None:
        super().__init__(reason)
        self.remedy = remedy


def _parse_offsets(table: Part) -> Mapping[str, tuple[int, ...]]:
    """Read the index of each box in the whole tensor from the header of a shard.

    Raises:
        _Unfit: The header's text is malformed.
    """
    text = table.metadata.get(_OFFSETS)
    if text is None:
        return {}
    try:
        entries = bounded_json.loads(text.encode())
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise _Unfit(f"{_OFFSETS} of {table.stamps[0].path} is malformed")
    offsets: dict[str, tuple[int, ...]] = {}
    for name, entry in entries.items():
        start = None
        if isinstance(entry, dict):
            start = entry.get("saved_offsets")
        if not _is_index(start):
            raise _Unfit(f"the offsets of {short(name)!r} are malformed")
        offsets[name] = tuple(start)
    return offsets


def _is_index(value: Any) -> TypeGuard[list[int]]:
    # By the exact type, since JSON's true would pass for 1.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in value)


def _shift(name: str, box: Tensor, start: tuple[int, ...] | None) -> Tensor:
    """Move a box to an index in the whole tensor, whose shape then ends with the box.

    Args:
        name: The tensor's name, for a message.
        box: The tensor as stored in one file.
        start: Index of the box's first element in the whole tensor; None if the box is the whole.

    Raises:
        _Unfit: The index and the box differ in the number of dimensions.
    """
    if start is None:
        return box
    if len(start) != len(box.shape):
        raise _Unfit(f"the offsets of {short(name)!r} do not fit its shape")
    pieces = tuple(replace(piece, start=_add(start, piece.start)) for piece in box.pieces)
    return Tensor(box.dtype, _add(start, box.shape), pieces)


def _add(left: Iterable[int], right: Iterable[int]) -> tuple[int, ...]:
    """Add two indices, dimension by dimension."""
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _assemble(name: str, boxes: Sequence[Tensor]) -> Tensor:
    """Assemble a whole tensor from boxes.

    Raises:
        _Unfit: The boxes leave holes, overlap or differ in the element type.
    """
    first = boxes[0]
    if len(boxes) == 1 and not any(any(piece.start) for piece in first.pieces):
        return first
    shape = first.shape
    pieces: list[Piece] = []
    for box in boxes:
        if box.dtype != first.dtype or len(box.shape) != len(shape):
            raise _Unfit(f"their pieces of {short(name)!r} differ in type")
        shape = tuple(map(max, shape, box.shape))
        for piece in box.pieces:
            if math.prod(piece.shape):
                pieces.append(piece)
    # Empty dimensions count as 1: a zero would hide the extents of the others.
    if math.prod(n or 1 for n in shape) >= MOST_ELEMENTS or not tiles(shape, pieces):
        raise _Unfit(f"their pieces of {short(name)!r} overlap or leave holes")
    return Tensor(first.dtype, shape, tuple(pieces))


class UnindexedShards(DirectoryFormat):
    """Directories of shards without an index, which are opened as those of Hugging Face."""

    name = HUGGINGFACE.name
    label = HUGGINGFACE.label

    def detects(self, directory: Location) -> bool:
        """Return True if the files of a directory are shards of one model."""
        return bool(find_shards(directory))

    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open the shards of a directory as one model."""
        shards = find_shards(directory)
        if not shards:
            return None
        part = read_shards(directory, shards, key)
        record = find_record(directory) or part.record
        return build_checkpoint(directory, HUGGINGFACE, [part], record)

    def find_homes(self, paths: Sequence[Location]) -> dict[Location, Location]:
        """Find the files in directories whose shards are all named."""
        named: dict[Location, set[str]] = defaultdict(set)
        for path in paths:
            if parse_name(path) is not None:
                named[path.parent].add(path.name)
        sharded: set[Location] = set()
        for directory, names in named.items():
            # A single named shard is opened alone, as the user asks.
            if len(names) == 1:
                continue
            shards = find_shards(directory)
            unnamed = [shard.path.name for shard in shards if shard.path.name not in names]
            if unnamed:
                raise CheckpointError(
                    f"the named files in {directory} are parts of one model, without "
                    f"{first_few(unnamed)}",
                    "Name the directory.",
                )
            if shards:
                sharded.add(directory)
        return {path: path.parent for path in paths if path.parent in sharded}


UNINDEXED_SHARDS = UnindexedShards()
