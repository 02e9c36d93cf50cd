"""Data for a pass: in which order, and which part of it is this process's."""

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
from ckptavg.data.streams import Batched, collate_of, in_batches, is_dataset, with_tensors
from ckptavg.distributed.processes import Alone, Peers
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
        stratified: Whether every class has its share among them, as the Dataset's ``targets`` tell.

    Raises:
        UsageError: There is no such number of samples.
    """

    count: int
    stratified: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"a subset is expected to have a sample or more but has {self.count}")


def as_subset(samples: int | Subset | None) -> Subset | None:
    """A subset of so many samples, drawn without regard to their classes if nothing is said."""
    return samples if samples is None or isinstance(samples, Subset) else Subset(samples)


def open_loader(
    data: Any,
    runtime: Runtime,
    *,
    shuffle: bool,
    subset: Subset | None = None,
    peers: Peers | None = None,
) -> Batches:
    """A Dataset as batches, shared among processes; a loader as it is, but for the subset.

    The batches are the same for any number of processes: each takes every n-th of them.

    Args:
        data: A Dataset, or what is like one; or a loader, which is this process's own.
        runtime: Batch size, workers and seed of a Dataset's batches.
        shuffle: Read a Dataset in seeded random order.
        subset: How much of it.
        peers: The processes that share a Dataset.

    Raises:
        UsageError: It is no data, or there is no such subset of it.
        EvaluationError: A loader's parts overlap, or leave samples out.
    """
    check_data(data)
    peers = peers or Alone()
    pinned = runtime.device.type == "cuda"
    data = with_tensors(data)
    samples = is_dataset(data)
    if samples and isinstance(data, IterableDataset):
        one = min(1, runtime.workers)  # each of several would give the whole stream
        batched = Batched(data, runtime.batch_size, collate_of(data))
        stream = DataLoader(batched, batch_size=None, num_workers=one, pin_memory=pinned)
        return share(stream, peers, runtime.seed, subset)
    if samples:
        generator = torch.Generator().manual_seed(runtime.seed)
        order = _order(data, subset, generator, shuffle=shuffle)
        size = runtime.batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return _Repeatable(
            data,
            batch_sampler=_Listed(batches[peers.rank :: peers.count]),
            num_workers=runtime.workers,
            pin_memory=pinned,
            generator=generator,
            collate_fn=collate_of(data),
        )
    # not a loader of the user's that is its own iterator, and may begin anew
    if isinstance(data, Iterator) and type(data).__module__ in {"builtins", "itertools"}:
        data = in_batches(data, runtime.batch_size)
    if peers.count > 1 and (sampler := _distributed(data)) is not None:
        _require_exact(sampler, peers)
    if not shuffle and getattr(data, "drop_last", False):
        log.info("the data loader leaves its last, smaller batch out (drop_last)")
    if shuffle and isinstance(data, DataLoader) and _is_sequential(data):
        log.info(
            "the training data loader does not shuffle: if its samples are sorted by class, "
            "batches of one class distort the statistics below the first layer"
        )
    return data if subset is None else _up_to_its_part(data, peers, subset)


def share(loader: Batches, peers: Peers, seed: int, subset: Subset | None = None) -> Batches:
    """This process's part of a loader that all of them have alike: every n-th batch.

    Args:
        loader: A DataLoader, whose other batches are not even read; or any other iterable.
        peers: The processes.
        seed: Of the global generator while the batches are drawn, so that all draw the same.
        subset: How much of the loader: batches are taken until they hold so many samples.

    Raises:
        UsageError: A stratified subset of a loader was asked for.
        EvaluationError: Its sampler pads the parts to one length, which counts samples twice.
    """
    if (sampler := _distributed(loader)) is not None:
        _require_exact(sampler, peers)
        return loader if subset is None else _up_to_its_part(loader, peers, subset)
    limit = None if subset is None else _count_of_loader(subset)
    if limit is None and peers.count == 1:
        return loader
    drawn = getattr(loader, "batch_sampler", None)
    if drawn is None or type(loader) is not DataLoader:
        return _Some(loader, peers, limit)
    if isinstance(loader.dataset, IterableDataset):
        return _Some(loader, peers, limit)
    options = {name: getattr(loader, name) for name in _PASSED_ON}
    part = _Drawn(drawn, peers, seed, limit)
    return DataLoader(loader.dataset, batch_sampler=part, **options)


def rereadable(batches: Batches, passes: int) -> Batches:
    """Batches for several passes: those that can be read once only refuse to be read again.

    Args:
        batches: Any iterable.
        passes: How many are planned; more may follow where memory is exhausted.

    Raises:
        EvaluationError: Several are planned, and it can be read only once.
    """
    if not isinstance(batches.loader if isinstance(batches, _Some) else batches, Iterator):
        return batches
    if passes > 1:
        raise _read_once()
    return _Once(iter(batches))


def samples_in(loader: Batches) -> int:
    """Samples that a loader will give; 0 where it cannot tell."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, (_Listed, _Drawn)):
        return batches.samples
    return _samples_drawn(batches)


def _order(
    data: Dataset[Any], subset: Subset | None, generator: torch.Generator, *, shuffle: bool
) -> list[int]:
    """Which samples of a Dataset, in which order."""
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
        order = _stratified(order, _targets(data), subset.count)
        return order[torch.randperm(len(order), generator=generator)].tolist()
    return order[: subset.count].tolist()


def _stratified(order: torch.Tensor, targets: torch.Tensor, count: int) -> torch.Tensor:
    """The first few of each class in a random order: its share of so many, by largest remainder."""
    sizes = torch.unique(targets, return_counts=True)[1]
    shares, remainders = sizes * count // len(targets), sizes * count % len(targets)
    rest = count - int(shares.sum())
    shares[remainders.argsort(descending=True, stable=True)[:rest]] += 1
    classes = torch.split(order[targets[order].argsort(stable=True)], sizes.tolist())
    return torch.cat([of[:share] for of, share in zip(classes, shares.tolist(), strict=True)])


def _targets(data: Dataset[Any]) -> torch.Tensor:
    """The classes of a Dataset's samples, without reading them.

    Raises:
        UsageError: It does not tell.
    """
    targets = getattr(data, "targets", None)
    try:
        found = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.dim() != 1 or len(found) != len(data):  # type: ignore[arg-type]
        raise UsageError(
            "a stratified subset needs data that tells its classes: one of `targets` a sample",
            "Leave :stratified out, or give the Dataset such an attribute.",
        )
    return found


class _Repeatable(DataLoader[Any]):
    """A DataLoader whose workers draw the same in every pass."""

    def __iter__(self) -> Any:
        self.generator.manual_seed(self.generator.initial_seed())
        return super().__iter__()


class _Listed(Sampler[list[int]]):
    """Batches that are known beforehand."""

    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches
        self.samples = sum(map(len, batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


class _Drawn(Sampler[list[int]]):
    """Every n-th of the batches that a sampler draws, in each process alike."""

    def __init__(
        self, sampler: Iterable[list[int]], peers: Peers, seed: int, limit: int | None
    ) -> None:
        self.sampler = sampler
        self.peers = peers
        self.seed = seed
        self.limit = limit

    @property
    def samples(self) -> int:
        """How many they are; 0 where the sampler cannot tell."""
        size, total = getattr(self.sampler, "batch_size", 0), _samples_drawn(self.sampler)
        if not total:
            return 0
        if self.limit is not None:
            total = min(total, -(-self.limit // size) * size)
        sizes = [min(size, total - at) for at in range(0, total, size)]
        return sum(sizes[self.peers.rank :: self.peers.count])

    def __iter__(self) -> Iterator[list[int]]:
        if self.peers.count == 1:
            yield from _up_to(self.sampler, self.limit, len)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            batches = list(_up_to(self.sampler, self.limit, len))
        drawn = zlib.crc32(json.dumps(batches, default=_plain).encode())
        _require_alike(drawn, self.peers)
        yield from batches[self.peers.rank :: self.peers.count]


class _Some:
    """Every n-th batch of any iterable, which all processes read as a whole."""

    def __init__(self, loader: Batches, peers: Peers, limit: int | None) -> None:
        self.loader = loader
        self.peers = peers
        self.limit = limit

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for number, batch in enumerate(_up_to(self.loader, self.limit, size_of)):
            if self.peers.count > 1:
                seen = zlib.crc32(_labels(batch), seen)
            if number % self.peers.count == self.peers.rank:
                yield batch
        _require_alike(seen, self.peers)


class _Once:
    """What can be read once only, and says so when it is read again."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches: Iterator[Any] | None = batches

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            raise _read_once()
        batches, self._batches = self._batches, None
        return batches


def _labels(batch: Any) -> bytes:
    """A batch's size and whole numbers, by which two are told apart; images may be augmented."""
    whole = (t for t in tensors_of(batch) if t.dim() < 3 and not t.is_floating_point())
    return b"".join((str(size_of(batch)).encode(), *map(bytes_of, whole)))


def _require_alike(drawn: int, peers: Peers) -> None:
    """Make sure that all processes have drawn the same batches, by a checksum of them."""
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
    """Indices that are tensors or numpy's, as plain values; others as text."""
    return indices.tolist() if hasattr(indices, "tolist") else repr(indices)


def _samples_drawn(batches: Any) -> int:
    """How many samples torch's own batch sampler gives; 0 for any other."""
    if type(batches) is not BatchSampler:
        return 0
    try:
        total = len(batches.sampler)  # type: ignore[arg-type]
    except TypeError:
        return 0
    return total - total % batches.batch_size if batches.drop_last else total


def _count_of_loader(subset: Subset) -> int:
    """How many samples of a loader a subset takes.

    Raises:
        UsageError: It is stratified.
    """
    if subset.stratified:
        raise UsageError(
            "a stratified subset is drawn from a Dataset with targets, not from a loader",
            "Leave :stratified out, or return the Dataset.",
        )
    return subset.count


def _up_to_its_part(loader: Batches, peers: Peers, subset: Subset) -> Batches:
    """The first batches of a process's own part: as many samples as are its share of a subset."""
    count = _count_of_loader(subset)
    before, after = (count * rank // peers.count for rank in (peers.rank, peers.rank + 1))
    return _Some(loader, Alone(), after - before)


def _up_to(batches: Iterable[Any], limit: int | None, size: Callable[[Any], int]) -> Iterator[Any]:
    """Batches until they hold so many samples."""
    seen = 0
    if limit == 0:
        return
    for batch in batches:
        yield batch
        seen += size(batch)
        if limit is not None and seen >= limit:
            return


def _distributed(loader: Batches) -> DistributedSampler[Any] | None:
    """The sampler by which a loader is one process's part, itself or below its batch sampler."""
    below = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    for sampler in (getattr(loader, "sampler", None), below):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _require_exact(sampler: DistributedSampler[Any], peers: Peers) -> None:
    """Make sure that the processes' parts are all of the data, and no sample is in two of them.

    What is said is the same in every process.
    """
    if sampler.num_replicas != peers.count:
        wrong = f"is for {sampler.num_replicas} processes, but {peers.count} share the data"
    elif sampler.rank != peers.rank:
        wrong = f"gives the part of process {sampler.rank} in another process too"
    elif sampler.drop_last or len(sampler.dataset) % sampler.num_replicas:  # type: ignore[arg-type]
        what = "drops" if sampler.drop_last else "repeats"
        wrong = f"{what} samples to give every process as many"
    else:
        return
    raise EvaluationError(
        f"the data loader's DistributedSampler {wrong}",
        "Return the Dataset or a plain DataLoader: ckptavg shares it out, each sample once.",
    )


def _is_sequential(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads its samples in their own order; one with its own batches may not."""
    if type(loader.batch_sampler) not in (BatchSampler, type(None)):
        return False
    return isinstance(loader.sampler, SequentialSampler)
