"""Batches of one process: samplers, and shares of loaders that all processes read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Sampler

from ckptavg.data.seeding import seeded_torch
from ckptavg.distributed.peers import Peers
from ckptavg.errors import EvaluationError
from ckptavg.models.batches import Batches, bytes_of, size_of, tensors_of


class RepeatableLoader(DataLoader[Any]):
    """DataLoader whose workers draw the same random numbers in every pass."""

    def __iter__(self) -> Any:
        # torch derives the seeds of the workers from this generator.
        self.generator.manual_seed(self.generator.initial_seed())
        return super().__iter__()


class FixedBatchSampler(Sampler[list[int]]):
    """Batch sampler with a fixed list of batches."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches
        self.samples = sum(map(len, batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class ShardedBatchSampler(Sampler[list[int]]):
    """Batch sampler of one process: every n-th batch of a sampler that all processes share."""

    def __init__(
        self, sampler: Iterable[list[int]], peers: Peers, seed: int, limit: int | None
    ) -> None:
        self.sampler = sampler
        self.peers = peers
        self.seed = seed
        self.limit = limit

    @property
    def samples(self) -> int:
        """Number of samples in this process's batches; 0 where unknown."""
        size, total = getattr(self.sampler, "batch_size", 0), samples_in_sampler(self.sampler)
        if not total:
            return 0
        # The limit is reached within a batch, and that batch counts as a whole.
        if self.limit is not None:
            total = min(total, -(-self.limit // size) * size)
        sizes = [min(size, total - at) for at in range(0, total, size)]
        return sum(sizes[self.peers.rank :: self.peers.world_size])

    def __iter__(self) -> Iterator[list[int]]:
        if self.peers.world_size == 1:
            yield from _take_samples(self.sampler, self.limit, len)
            return
        # A common seed makes all processes draw the same batches; the caller's generator is kept.
        with seeded_torch(self.seed):
            batches = list(_take_samples(self.sampler, self.limit, len))
        drawn = zlib.crc32(json.dumps(batches, default=_to_plain).encode())
        _require_alike(drawn, self.peers)
        yield from batches[self.peers.rank :: self.peers.world_size]


class ShardedIterable:
    """Share of one process in an iterable: every n-th batch; all processes read all batches."""

    def __init__(self, loader: Batches, peers: Peers, limit: int | None) -> None:
        self.loader = loader
        self.peers = peers
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        checksum = 0
        for number, batch in enumerate(_take_samples(self.loader, self.limit, size_of)):
            if self.peers.world_size > 1:
                checksum = zlib.crc32(_identifying_bytes(batch), checksum)
            if number % self.peers.world_size == self.peers.rank:
                yield batch
        # One checksum over the whole pass, so that processes exchange values only once.
        _require_alike(checksum, self.peers)


class SingleUseIterable:
    """Single-use batches that raise an error on a second pass."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches: Iterator[Any] | None = batches

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            raise single_use_error()
        batches, self._batches = self._batches, None
        return batches


def samples_in_sampler(batches: Any) -> int:
    """Count the samples of torch's own batch sampler; 0 for any other sampler."""
    if type(batches) is not BatchSampler:
        return 0
    try:
        total = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        return 0
    if batches.drop_last:
        return total - total % batches.batch_size
    return total


def single_use_error() -> EvaluationError:
    """Build the error for a second pass over batches that can be read once."""
    return EvaluationError(
        "the data can be read only once, and more than one pass over it is needed",
        "Pass a DataLoader, a list or a Dataset.",
    )


def _take_samples(
    batches: Iterable[Any], limit: int | None, size: Callable[[Any], int]
) -> Iterator[Any]:
    """Yield batches until a number of samples is reached; all batches where the limit is None."""
    samples = 0
    if limit == 0:
        return
    for batch in batches:
        yield batch
        samples += size(batch)
        if limit is not None and samples >= limit:
            return


def _identifying_bytes(batch: Any) -> bytes:
    """Return the bytes that identify a batch: the size and the integer tensors.

    Images and other floating-point tensors are left out, since augmentation changes them.
    """
    parts = [str(size_of(batch)).encode()]
    for tensor in tensors_of(batch):
        if tensor.dim() < 3 and not tensor.is_floating_point():
            parts.append(bytes_of(tensor))
    return b"".join(parts)


def _require_alike(drawn: int, peers: Peers) -> None:
    """Make sure that all processes have drawn the same batches, by comparing checksums."""
    if len({*peers.gather(drawn)}) > 1:
        raise EvaluationError(
            "the data loader draws different batches in each process",
            "Seed the loader, and let it give all batches to every process: ckptavg divides them.",
        )


def _to_plain(indices: Any) -> Any:
    """Convert indices for JSON: tensors and numpy arrays to plain values, other types to text."""
    if hasattr(indices, "tolist"):
        return indices.tolist()
    return repr(indices)
