"""Loaders for a pass over the data: seeded order, subset and the share of each process."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ckptavg.data.argument_checks import check_data
from ckptavg.data.seeding import seeded_torch
from ckptavg.data.streams import Batched, collate_of, in_batches, is_dataset, with_tensors
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.models.batches import Batches, bytes_of, size_of, tensors_of
from ckptavg.models.device import Runtime

log = logging.getLogger("ckptavg")
Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` in samples; total is 0 where the data cannot tell."""

_PASSED_ON = (
    "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn",
    "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
)  # fmt: skip


@dataclass(frozen=True)
class Subset:
    """Some of the training data.

    Attributes:
        count: Samples.
        stratified: True to draw from every class in proportion, by the Dataset's ``targets``.

    Raises:
        UsageError: The count is below 1.
    """

    count: int
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"a subset is expected to have a sample or more but has {self.count}")


def as_subset(samples: int | Subset | None) -> Subset | None:
    """Return a subset for a number of samples; a plain number is not stratified by class."""
    return samples if samples is None or isinstance(samples, Subset) else Subset(samples)


def open_loader(
    data: Any,
    runtime: Runtime,
    *,
    shuffle: bool,
    subset: Subset | None = None,
    peers: Peers | None = None,
) -> Batches:
    """Open a Dataset as batches shared among processes; limit a loader to a subset.

    The batches of a Dataset are the same for any number of processes: each process takes every
    n-th batch. A loader stays as it is and belongs to this process.

    Args:
        data: A Dataset, an object with a length and items, or a loader.
        runtime: Batch size, workers and seed for the batches of a Dataset.
        shuffle: True to read a Dataset in seeded random order.
        subset: The samples to read; all of them where None.
        peers: The processes that share a Dataset; this process alone where None.

    Returns:
        The batches of this process.

    Raises:
        UsageError: The argument is no data, or the subset cannot be drawn from the data.
        EvaluationError: The parts of a distributed loader overlap, or leave samples out.
    """
    check_data(data)
    peers = peers or SingleProcess()
    pinned = runtime.device.type == "cuda"
    data = with_tensors(data)
    samples = is_dataset(data)
    if samples and isinstance(data, IterableDataset):
        # Each of several workers would yield the whole stream.
        workers = min(1, runtime.workers)
        batched = Batched(data, runtime.batch_size, collate_of(data))
        stream = DataLoader(batched, batch_size=None, num_workers=workers, pin_memory=pinned)
        # A stream has no indices to share, so every process reads all and keeps every n-th batch.
        return shard_loader(stream, peers, runtime.seed, subset)
    if samples:
        generator = torch.Generator().manual_seed(runtime.seed)
        order = _order(data, subset, generator, shuffle=shuffle)
        size = runtime.batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return _Repeatable(
            data,
            batch_sampler=_Listed(batches[peers.rank :: peers.world_size]),
            num_workers=runtime.workers,
            pin_memory=pinned,
            generator=generator,
            collate_fn=collate_of(data),
        )
    # Only plain iterators and generators. A user's loader may be its own iterator and restart.
    if isinstance(data, Iterator) and type(data).__module__ in {"builtins", "itertools"}:
        data = in_batches(data, runtime.batch_size)
    if peers.world_size > 1 and (sampler := _distributed(data)) is not None:
        _require_exact(sampler, peers)
    if not shuffle and getattr(data, "drop_last", False):
        log.info("the data loader leaves its last, smaller batch out (drop_last)")
    if shuffle and isinstance(data, DataLoader) and _is_sequential(data):
        log.info(
            "the training data loader does not shuffle: if its samples are sorted by class, "
            "batches of one class distort the statistics below the first layer"
        )
    return data if subset is None else _up_to_its_part(data, peers, subset)


def shard_loader(loader: Batches, peers: Peers, seed: int, subset: Subset | None = None) -> Batches:
    """Return this process's share of a loader that is the same everywhere: every n-th batch.

    Args:
        loader: A DataLoader, whose other batches are not read; or any other iterable.
        peers: The processes.
        seed: Seed of the global generator while batches are drawn, so that all processes draw the
            same ones.
        subset: The number of samples: batches are taken until this number is reached.

    Raises:
        UsageError: The subset is stratified, which a loader does not allow.
        EvaluationError: The sampler pads or cuts the parts to one length, or they overlap.
    """
    if (sampler := _distributed(loader)) is not None:
        _require_exact(sampler, peers)
        return loader if subset is None else _up_to_its_part(loader, peers, subset)
    limit = None if subset is None else _count_of_loader(subset)
    if limit is None and peers.world_size == 1:
        return loader
    # A subclass may yield batches in its own way, so only a plain DataLoader is rebuilt.
    drawn = getattr(loader, "batch_sampler", None)
    if drawn is None or type(loader) is not DataLoader:
        return _Some(loader, peers, limit)
    # A stream has no indices, so batches cannot be skipped without reading.
    if isinstance(loader.dataset, IterableDataset):
        return _Some(loader, peers, limit)
    options = {name: getattr(loader, name) for name in _PASSED_ON}
    part = _Drawn(drawn, peers, seed, limit)
    return DataLoader(loader.dataset, batch_sampler=part, **options)


def require_reiterable(batches: Batches, passes: int) -> Batches:
    """Return batches for several passes; an iterator raises an error on a second pass.

    Args:
        batches: Any iterable.
        passes: Number of planned passes; more may follow after an out-of-memory error.

    Raises:
        EvaluationError: Several passes are planned, and the batches can be read only once.
    """
    if not isinstance(batches.loader if isinstance(batches, _Some) else batches, Iterator):
        return batches
    if passes > 1:
        raise _read_once()
    return _Once(iter(batches))


def samples_in(loader: Batches) -> int:
    """Return the number of samples that a loader yields; 0 where unknown."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, (_Listed, _Drawn)):
        return batches.samples
    return _samples_drawn(batches)


def _order(
    data: Dataset[Any], subset: Subset | None, generator: torch.Generator, *, shuffle: bool
) -> list[int]:
    """Draw the indices of a Dataset's samples in the order of the pass.

    Raises:
        UsageError: The Dataset has no length, or no targets for a stratified subset.
    """
    try:
        total = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise UsageError(
            f"the data, a {type(data).__name__}, does not tell its length",
            "Give it __len__, or make it an IterableDataset.",
        ) from error
    if subset is None:
        return (
            torch.randperm(total, generator=generator) if shuffle else torch.arange(total)
        ).tolist()
    if subset.count >= total:
        log.info("%d samples are asked for and the data has %d: all are taken", subset.count, total)
        return torch.randperm(total, generator=generator).tolist()
    order = torch.randperm(total, generator=generator)
    if subset.stratified:
        # The result is sorted by class and would make batches of one class; hence the shuffle.
        order = _stratified(order, _targets(data), subset.count)
        return order[torch.randperm(len(order), generator=generator)].tolist()
    return order[: subset.count].tolist()


def _stratified(order: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
    """Select the first samples of each class in proportion to its size.

    Args:
        order: (N,) int64, sample indices in random order.
        targets: (N,), the class of each sample.
        count: Samples to select; shares are rounded by the largest-remainder method.
    """
    sizes = torch.unique(targets, return_counts=True)[1]
    shares, remainders = sizes * count // len(targets), sizes * count % len(targets)
    remaining = count - int(shares.sum())
    shares[remainders.argsort(descending=True, stable=True)[:remaining]] += 1
    classes = torch.split(order[targets[order].argsort(stable=True)], sizes.tolist())
    return torch.cat([of[:share] for of, share in zip(classes, shares.tolist(), strict=True)])


def _targets(data: Dataset[Any]) -> torch.Tensor:
    """Return the classes of a Dataset's samples, (N,), from ``targets`` without reading samples.

    Raises:
        UsageError: The Dataset has no ``targets`` with one value per sample.
    """
    targets = getattr(data, "targets", None)
    try:
        classes = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        classes = torch.empty(0)
    if classes.dim() != 1 or len(classes) != len(data):  # type: ignore[arg-type]
        raise UsageError(
            "a stratified subset needs data that tells its classes: one of `targets` a sample",
            "Leave :stratified out, or give the Dataset such an attribute.",
        )
    return classes


class _Repeatable(DataLoader[Any]):
    """DataLoader whose workers draw the same random numbers in every pass."""

    def __iter__(self) -> Any:
        # torch derives the seeds of the workers from this generator.
        self.generator.manual_seed(self.generator.initial_seed())
        return super().__iter__()


class _Listed(Sampler[list[int]]):
    """Batch sampler with a fixed list of batches."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches
        self.samples = sum(map(len, batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Drawn(Sampler[list[int]]):
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
        size, total = getattr(self.sampler, "batch_size", 0), _samples_drawn(self.sampler)
        if not total:
            return 0
        # The limit is reached within a batch, and that batch counts as a whole.
        if self.limit is not None:
            total = min(total, -(-self.limit // size) * size)
        sizes = [min(size, total - at) for at in range(0, total, size)]
        return sum(sizes[self.peers.rank :: self.peers.world_size])

    def __iter__(self) -> Iterator[list[int]]:
        if self.peers.world_size == 1:
            yield from _up_to(self.sampler, self.limit, len)
            return
        # A common seed makes all processes draw the same batches; the caller's generator is kept.
        with seeded_torch(self.seed):
            batches = list(_up_to(self.sampler, self.limit, len))
        drawn = zlib.crc32(json.dumps(batches, default=_plain).encode())
        _require_alike(drawn, self.peers)
        yield from batches[self.peers.rank :: self.peers.world_size]


class _Some:
    """Share of one process in an iterable: every n-th batch; all processes read all batches."""

    def __init__(self, loader: Batches, peers: Peers, limit: int | None) -> None:
        self.loader = loader
        self.peers = peers
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        checksum = 0
        for number, batch in enumerate(_up_to(self.loader, self.limit, size_of)):
            if self.peers.world_size > 1:
                checksum = zlib.crc32(_labels(batch), checksum)
            if number % self.peers.world_size == self.peers.rank:
                yield batch
        # One checksum over the whole pass, so that processes exchange values only once.
        _require_alike(checksum, self.peers)


class _Once:
    """Single-use batches that raise an error on a second pass."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches: Iterator[Any] | None = batches

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            raise _read_once()
        batches, self._batches = self._batches, None
        return batches


def _labels(batch: Any) -> bytes:
    """Return the bytes that identify a batch: the size and the integer tensors.

    Images and other floating-point tensors are left out, since augmentation changes them.
    """
    integers = (t for t in tensors_of(batch) if t.dim() < 3 and not t.is_floating_point())
    return b"".join((str(size_of(batch)).encode(), *map(bytes_of, integers)))


def _require_alike(drawn: int, peers: Peers) -> None:
    """Make sure that all processes have drawn the same batches, by comparing checksums."""
    if len({*peers.gather(drawn)}) > 1:
        raise EvaluationError(
            "the data loader draws other batches in each process",
            "Seed it, and let it give every process the whole: ckptavg shares it out.",
        )


def _read_once() -> EvaluationError:
    return EvaluationError(
        "the data can be read only once, and more than one pass over it is needed",
        "Pass a DataLoader, a list or a Dataset.",
    )


def _plain(indices: Any) -> Any:
    """Convert indices for JSON: tensors and numpy arrays to plain values, other types to text."""
    return indices.tolist() if hasattr(indices, "tolist") else repr(indices)


def _samples_drawn(batches: Any) -> int:
    """Count the samples of torch's own batch sampler; 0 for any other sampler."""
    if type(batches) is not BatchSampler:
        return 0
    try:
        total = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        return 0
    return total - total % batches.batch_size if batches.drop_last else total


def _count_of_loader(subset: Subset) -> int:
    """Return the number of samples that a subset takes from a loader.

    Raises:
        UsageError: The subset is stratified, which needs a Dataset.
    """
    if subset.stratified:
        raise UsageError(
            "a stratified subset is drawn from a Dataset with targets, not from a loader",
            "Leave :stratified out, or return the Dataset.",
        )
    return subset.count


def _up_to_its_part(loader: Batches, peers: Peers, subset: Subset) -> Batches:
    """Limit a process's own loader to this process's share of a subset, in whole batches."""
    count = _count_of_loader(subset)
    before, after = (count * rank // peers.world_size for rank in (peers.rank, peers.rank + 1))
    return _Some(loader, SingleProcess(), after - before)


def _up_to(batches: Iterable[Any], limit: int | None, size: Callable[[Any], int]) -> Iterator[Any]:
    """Yield batches until a number of samples is reached; all batches where the limit is None."""
    samples = 0
    if limit == 0:
        return
    for batch in batches:
        yield batch
        samples += size(batch)
        if limit is not None and samples >= limit:
            return


def _distributed(loader: Batches) -> DistributedSampler[Any] | None:
    """Find the DistributedSampler of a loader, directly or below the batch sampler."""
    below = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for sampler in (getattr(loader, "sampler", None), below):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _require_exact(sampler: DistributedSampler[Any], peers: Peers) -> None:
    """Make sure that the parts of all processes cover the data without overlap."""
    if sampler.num_replicas != peers.world_size:
        wrong = f"is for {sampler.num_replicas} processes, but {peers.world_size} share the data"
    elif sampler.rank != peers.rank:
        wrong = f"gives the part of process {sampler.rank} in another process too"
    elif sampler.drop_last or len(sampler.dataset) % sampler.num_replicas:  # type: ignore[arg-type]
        verb = "drops" if sampler.drop_last else "repeats"
        wrong = f"{verb} samples to give every process as many"
    else:
        return
    raise EvaluationError(
        f"the data loader's DistributedSampler {wrong}",
        "Return the Dataset or a plain DataLoader: ckptavg shares it out, each sample once.",
    )


def _is_sequential(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader reads samples in sequence; False for a custom batch sampler."""
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return isinstance(loader.sampler, SequentialSampler)
