"""Shards of one model in a directory without an index, which their own names and headers replace.

``torch.distributed.checkpoint`` writes safetensors files per rank, each with the offsets of its
boxes in its header (``HuggingFaceStorageWriter(save_distributed=True)``). Other shards hold whole
tensors, under names that do not overlap, and say how many they are.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from ckptavg.errors import CheckpointError, first_few, short
from ckptavg.formats import bounded_json
from ckptavg.formats.parts import Part, read_file
from ckptavg.formats.record import TRAINING_STATE
from ckptavg.formats.storage import Location
from ckptavg.formats.table import MOST_ELEMENTS, Piece, Tensor
from ckptavg.formats.tiling import tiles

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_COUNTED = re.compile(r"(\d{1,9})([-_]of[-_])(\d{1,9})(?=\.[^.]*$)")
_STRICT_DIGITS = 5  # as Hugging Face pads them: no epoch is called so
_RANK = re.compile(r"shard-(\d{1,9})-(?=model-)")
_OFFSETS = "DCP_SHARDING_INFO"
_OFFSETS_VERSION = "DCP_VERSION"
_MOST_MISSING = 100_000  # shards that a name may count and that are looked for
_GATHER = "Copy all shards of one save into the directory, and no others."


@dataclass(frozen=True)
class Shard:
    """The name of a shard, taken apart.

    Attributes:
        path: The file.
        index: Its number, from 1 in most sets and from 0 in some.
        count: The number of shards that there are.
        pattern: The name without its number: equal for shards of one set.
        strict: Whether nothing but a shard is called so.
        rank: Number of the rank whose files have numbers of their own, where ranks have.
    """

    path: Location
    index: int
    count: int
    pattern: str
    strict: bool
    rank: int | None

    def sibling(self, index: int) -> str:
        """The name of the shard with another number."""
        width = len(str(self.index)) if not self.strict else _STRICT_DIGITS
        return self.pattern.replace("*", f"{index:0{width}d}", 1)


def parse_name(path: Location) -> Shard | None:
    """Take the name of a shard apart; None where it is no shard's."""
    match = _COUNTED.search(path.name)
    if match is None or not path.name.endswith(_SUFFIXES):
        return None
    begin, end = match.span(1)
    name = f"{path.name[:begin]}*{path.name[end:]}"
    rank = _RANK.match(name)
    strict = len(match[1]) == len(match[3]) == _STRICT_DIGITS
    pattern = name[rank.end() :] if rank else name
    number = int(rank[1]) if rank else None
    return Shard(path, int(match[1]), int(match[3]), pattern, strict, number)


def find_shards(directory: Location) -> list[Shard]:
    """Find the shards that a directory is made of; none where it is no sharded model.

    Files that count themselves (``epoch_1_of_3.pt``) but hold the same tensors are a run.
    """
    shards: list[Shard] = []
    files: list[Location] = [p for p in directory.iterdir() if p.name.endswith(_SUFFIXES)]
    for path in sorted(files, key=lambda p: p.name):
        if path.name.startswith("."):
            continue
        shard = parse_name(path)
        if shard is not None:
            shards.append(shard)
        elif re.search(r"\d", path.name) and not _is_training_state(path.name):
            return []
    if len({shard.pattern for shard in shards}) != 1:
        return []
    return shards if _fit_together(shards) else []


def read_shards(directory: Location, shards: Sequence[Shard], key: str | None) -> Part:
    """Read shards as one table.

    Args:
        directory: What holds them.
        shards: As ``find_shards`` found them.
        key: Dotted path of the entry that holds the weights.

    Raises:
        CheckpointError: A shard is missing or damaged, or they do not make up whole tensors.
    """
    _check_complete(directory, shards)
    parts = [read_file(shard.path, key) for shard in shards]
    boxes: dict[str, list[Tensor]] = defaultdict(list)
    try:
        for part in parts:
            offsets = _offsets(part)
            for name, tensor in part.tensors.items():
                boxes[name].append(_moved(name, tensor, offsets.get(name)))
        tensors = {name: _joined(name, pieces) for name, pieces in boxes.items()}
    except _Unfit as error:
        raise CheckpointError(
            f"{directory} holds parts of one model that do not fit together: {error}"
            f"{_absent_ranks(shards)}",
            _GATHER,
        ) from error
    first = parts[0]
    own = {_OFFSETS, _OFFSETS_VERSION}
    return replace(
        first,
        stamps=tuple(stamp for part in parts for stamp in part.stamps),
        tensors=tensors,
        refused={name: why for part in parts for name, why in part.refused.items()},
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        metadata={name: text for name, text in first.metadata.items() if name not in own},
    )


def _is_training_state(name: str) -> bool:
    return bool(TRAINING_STATE.fullmatch(name) or re.match(r"rng|random|zero_pp", name))


def _fit_together(shards: Sequence[Shard]) -> bool:
    """Whether files are shards of one model, by their names or else by their first headers."""
    if shards[0].rank is not None:
        return True
    if len(shards) == 1:
        return shards[0].strict
    try:
        one, other = (read_file(shard.path, None) for shard in shards[:2])
    except CheckpointError:
        return shards[0].strict
    return _OFFSETS in one.metadata or not {*one.tensors} & {*other.tensors}


def _check_complete(directory: Location, shards: Sequence[Shard]) -> None:
    """Make sure that each number up to the count is there.

    Raises:
        CheckpointError: One is not.
    """
    indices, count = {shard.index for shard in shards}, shards[0].count
    first = min(indices | {1})
    if len(indices) == count and max(indices) - first + 1 == count:
        return
    wanted = range(first, first + min(count, _MOST_MISSING))
    missing = [shards[0].sibling(index) for index in wanted if index not in indices]
    raise CheckpointError(
        f"{directory} holds parts of one model: {len(indices)} of {count} shards, without "
        f"{first_few(missing)}",
        _GATHER,
    )


def _absent_ranks(shards: Sequence[Shard]) -> str:
    """The ranks below the highest that have no file, for a message; empty where all have."""
    ranks = {shard.rank for shard in shards if shard.rank is not None}
    absent = [f"shard-{n:05d}" for n in range(1, max(ranks, default=0)) if n not in ranks]
    return f" (there is no {first_few(absent)})" if absent else ""


class _Unfit(ValueError):
    """Why shards make up no whole tensors."""


def _offsets(part: Part) -> Mapping[str, tuple[int, ...]]:
    """Name → index of the first element of the box that a file holds of the tensor.

    Raises:
        _Unfit: The header's text is malformed.
    """
    text = part.metadata.get(_OFFSETS)
    if text is None:
        return {}
    try:
        entries = bounded_json.loads(text.encode())
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise _Unfit(f"{_OFFSETS} of {part.stamps[0].path} is malformed")
    offsets: dict[str, tuple[int, ...]] = {}
    for name, entry in entries.items():
        start = entry.get("saved_offsets") if isinstance(entry, dict) else None
        if not _is_index(start):
            raise _Unfit(f"the offsets of {short(name)!r} are malformed")
        offsets[name] = tuple(start)
    return offsets


def _is_index(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MOST_ELEMENTS for n in value)


def _moved(name: str, box: Tensor, start: tuple[int, ...] | None) -> Tensor:
    """The same box at its place in the whole tensor, whose extent ends with it."""
    if start is None:
        return box
    if len(start) != len(box.shape):
        raise _Unfit(f"the offsets of {short(name)!r} do not fit its shape")
    pieces = tuple(replace(piece, start=_sum(start, piece.start)) for piece in box.pieces)
    return Tensor(box.dtype, _sum(start, box.shape), pieces)


def _sum(one: Iterable[int], other: Iterable[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))


def _joined(name: str, boxes: Sequence[Tensor]) -> Tensor:
    """The whole tensor that boxes make up.

    Raises:
        _Unfit: They leave holes, overlap or differ in their element types.
    """
    first = boxes[0]
    if len(boxes) == 1 and not any(any(piece.start) for piece in first.pieces):
        return first
    if any(box.dtype != first.dtype or len(box.shape) != len(first.shape) for box in boxes):
        raise _Unfit(f"their pieces of {short(name)!r} differ in type")
    shape = tuple(max(extents) for extents in zip(*(box.shape for box in boxes), strict=True))
    pieces: list[Piece] = [p for box in boxes for p in box.pieces if math.prod(p.shape)]
    if math.prod(n or 1 for n in shape) >= MOST_ELEMENTS or not tiles(shape, pieces):
        raise _Unfit(f"their pieces of {short(name)!r} overlap or leave holes")
    return Tensor(first.dtype, shape, tuple(pieces))
