"""Loaders for a pass over the data: seeded order, subset and the share of each process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from ckptavg.data.argument_checks import check_data
from ckptavg.data.samplers import (
    FixedBatchSampler,
    RepeatableLoader,
    ShardedBatchSampler,
    ShardedIterable,
    SingleUseIterable,
    samples_in_sampler,
    single_use_error,
)
from ckptavg.data.streams import BatchStream, batch_samples, collate_of, is_dataset, with_tensors
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.models.batches import Batches
from ckptavg.models.runtime import Runtime

log = logging.getLogger("ckptavg")
Progress = Callable[[int, int], None]
"""Called as ``progress(done, total)`` in samples; total is 0 where the data cannot tell."""

_COPIED_OPTIONS = (
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
    if samples is None or isinstance(samples, Subset):
        return samples
    return Subset(samples)


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
    data = with_tensors(data)
    if is_dataset(data):
        if isinstance(data, IterableDataset):
            return _open_stream(data, runtime, peers, subset)
        return _open_samples(data, runtime, peers, subset, shuffle=shuffle)
    # Only plain iterators and generators. A user's loader may be its own iterator and restart.
    if isinstance(data, Iterator) and type(data).__module__ in {"builtins", "itertools"}:
        data = batch_samples(data, runtime.batch_size)
    if peers.world_size > 1:
        sampler = _find_distributed_sampler(data)
        if sampler is not None:
            _require_exact(sampler, peers)
    _log_loader_settings(data, shuffle=shuffle)
    loader: Batches = data
    if subset is None:
        return loader
    return _limit_to_share(loader, peers, subset)


def _open_stream(
    data: IterableDataset[Any], runtime: Runtime, peers: Peers, subset: Subset | None
) -> Batches:
    """Open a stream of samples as batches."""
    stream = DataLoader(
        BatchStream(data, runtime.batch_size, collate_of(data)),
        batch_size=None,
        # Each of several workers would yield the whole stream.
        num_workers=min(1, runtime.workers),
        pin_memory=runtime.device.type == "cuda",
    )
    # A stream has no indices to share, so every process reads all and keeps every n-th batch.
    return shard_loader(stream, peers, runtime.seed, subset)


def _open_samples(
    data: Any, runtime: Runtime, peers: Peers, subset: Subset | None, *, shuffle: bool
) -> Batches:
    """Open samples with indices as batches."""
    generator = torch.Generator().manual_seed(runtime.seed)
    order = _draw_order(data, subset, generator, shuffle=shuffle)
    size = runtime.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return RepeatableLoader(
        data,
        batch_sampler=FixedBatchSampler(batches[peers.rank :: peers.world_size]),
        num_workers=runtime.workers,
        pin_memory=runtime.device.type == "cuda",
        generator=generator,
        collate_fn=collate_of(data),
    )


def _log_loader_settings(data: Any, *, shuffle: bool) -> None:
    """Log settings of a loader that change the results."""
    if not shuffle and getattr(data, "drop_last", False):
        log.info("the data loader leaves its last, smaller batch out (drop_last)")
    if shuffle and isinstance(data, DataLoader) and _is_sequential(data):
        log.info(
            "the training data loader does not shuffle: if its samples are sorted by class, "
            "batches of one class distort the statistics below the first layer"
        )


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
    sampler = _find_distributed_sampler(loader)
    if sampler is not None:
        _require_exact(sampler, peers)
        if subset is None:
            return loader
        return _limit_to_share(loader, peers, subset)
    limit = None
    if subset is not None:
        limit = _require_count(subset)
    if limit is None and peers.world_size == 1:
        return loader
    # A subclass may yield batches in its own way, so only a plain DataLoader is rebuilt.
    drawn = getattr(loader, "batch_sampler", None)
    if drawn is None or type(loader) is not DataLoader:
        return ShardedIterable(loader, peers, limit)
    # A stream has no indices, so batches cannot be skipped without reading.
    if isinstance(loader.dataset, IterableDataset):
        return ShardedIterable(loader, peers, limit)
    options = {name: getattr(loader, name) for name in _COPIED_OPTIONS}
    part = ShardedBatchSampler(drawn, peers, seed, limit)
    return DataLoader(loader.dataset, batch_sampler=part, **options)


def require_reiterable(batches: Batches, passes: int) -> Batches:
    """Return batches for several passes; an iterator raises an error on a second pass.

    Args:
        batches: Any iterable.
        passes: Number of planned passes; more may follow after an out-of-memory error.

    Raises:
        EvaluationError: Several passes are planned, and the batches can be read only once.
    """
    source = batches
    if isinstance(batches, ShardedIterable):
        source = batches.loader
    if not isinstance(source, Iterator):
        return batches
    if passes > 1:
        raise single_use_error()
    return SingleUseIterable(iter(batches))


def samples_in(loader: Batches) -> int:
    """Return the number of samples that a loader yields; 0 where unknown."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, (FixedBatchSampler, ShardedBatchSampler)):
        return batches.samples
    return samples_in_sampler(batches)


def _draw_order(
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
            f"the data, a {type(data).__name__}, has no length",
            "Give it __len__, or make it an IterableDataset.",
        ) from error
    if subset is None and not shuffle:
        return list(range(total))
    if subset is None:
        return torch.randperm(total, generator=generator).tolist()
    if subset.count >= total:
        log.info("%d samples are asked for and the data has %d: all are taken", subset.count, total)
        return torch.randperm(total, generator=generator).tolist()
    order = torch.randperm(total, generator=generator)
    if subset.stratified:
        # The result is sorted by class and would make batches of one class; hence the shuffle.
        order = _draw_stratified(order, _targets(data), subset.count)
        return order[torch.randperm(len(order), generator=generator)].tolist()
    return order[: subset.count].tolist()


def _draw_stratified(order: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
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
    drawn = [indices[:share] for indices, share in zip(classes, shares.tolist(), strict=True)]
    return torch.cat(drawn)


def classes_of(data: Batches | Dataset[Any]) -> torch.Tensor | None:
    """Return the classes of the samples in the order of a pass, (N,), without reading samples.

    Args:
        data: A Dataset with ``targets``, or a loader that reads one in its order.

    Returns:
        The classes; None where they or the order are not known.
    """
    dataset = data
    if isinstance(data, DataLoader):
        if not (_is_sequential(data) or isinstance(data, RepeatableLoader)) or data.drop_last:
            return None
        dataset = data.dataset
    try:
        return _targets(dataset)  # type: ignore[arg-type]
    except (UsageError, TypeError):
        return None


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
            "a stratified subset needs data with `targets`, one class per sample",
            "Draw without classes, or give the Dataset such an attribute.",
        )
    return classes


def _require_count(subset: Subset) -> int:
    """Return the number of samples that a subset takes from a loader.

    Raises:
        UsageError: The subset is stratified, which needs a Dataset.
    """
    if subset.stratified:
        raise UsageError(
            "a stratified subset is drawn from a Dataset with targets, not from a loader",
            "Draw without classes, or return the Dataset.",
        )
    return subset.count


def _limit_to_share(loader: Batches, peers: Peers, subset: Subset) -> Batches:
    """Limit a process's own loader to this process's share of a subset, in whole batches."""
    count = _require_count(subset)
    # Both ends are rounded alike, so that the shares of all processes add up to the count.
    start = count * peers.rank // peers.world_size
    end = count * (peers.rank + 1) // peers.world_size
    return ShardedIterable(loader, SingleProcess(), end - start)


def _find_distributed_sampler(loader: Batches) -> DistributedSampler[Any] | None:
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
        verb = "repeats"
        if sampler.drop_last:
            verb = "drops"
        wrong = f"{verb} samples to give every process as many"
    else:
        return
    raise EvaluationError(
        f"the data loader's DistributedSampler {wrong}",
        "Give the Dataset or a plain DataLoader: ckptavg divides the samples, each once.",
    )


def _is_sequential(loader: DataLoader[Any]) -> bool:
    """Tell whether a loader reads samples in sequence; False for a custom batch sampler."""
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return isinstance(loader.sampler, SequentialSampler)
