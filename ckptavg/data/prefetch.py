"""Batches of a pass: seeded loading, progress, and prefetching to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckptavg.data.loaders import Progress, samples_in
from ckptavg.data.seeding import Generators
from ckptavg.distributed.peers import Peers
from ckptavg.models.batches import Batches, size_of, tensors_of, to_device


def with_progress(
    loader: Batches, progress: Progress, peers: Peers, seed: int = 0
) -> Iterator[Any]:
    """Yield the batches of a loader, report progress and check the other processes.

    All random numbers of the loader, such as crops and the order, follow from the seed alone. The
    caller's generators stay as they were.

    Args:
        loader: The batches.
        progress: Called after each batch with the samples so far and the total, 0 where unknown.
        peers: The processes of the pass; a failure of another process raises an error here.
        seed: Seed of the generators while batches are loaded.
    """
    samples_done, total = 0, samples_in(loader)
    for batch in _load_seeded(loader, seed):
        # A failure of another process ends the pass here, and not only after the last batch.
        peers.check()
        yield batch
        samples_done += size_of(batch)
        progress(samples_done, total)


def _load_seeded(loader: Batches, seed: int) -> Iterator[Any]:
    """Yield the batches of a loader, each loaded with the seeded generators."""
    generators, end = Generators(seed), object()
    with generators.in_use():
        batches = iter(loader)
    while True:
        with generators.in_use():
            batch = next(batches, end)
        if batch is end:
            return
        yield batch


@dataclass(frozen=True)
class DeviceBatch:
    """A batch before and after the copy to the device.

    Attributes:
        loaded: The batch as the loader yielded it.
        on_device: The batch on the device.
    """

    loaded: Any
    on_device: Any


def prefetch_to_device(loader: Iterable[Any], device: torch.device) -> Iterator[DeviceBatch]:
    """Prefetch batches to the device; on CUDA, the next copy overlaps the current computation."""
    if device.type != "cuda":
        for batch in loader:
            yield DeviceBatch(batch, to_device(batch, device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[DeviceBatch, Any] | None = None
    for batch in loader:
        # A batch that is on the device already may still be being computed on the main stream.
        if any(tensor.is_cuda for tensor in tensors_of(batch)):
            copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            copying = DeviceBatch(batch, to_device(batch, device)), copies.record_event()
        if waiting is not None:
            yield _await_copy(*waiting, device)
        waiting = copying
    if waiting is not None:
        yield _await_copy(*waiting, device)


def _await_copy(batch: DeviceBatch, copied: Any, device: torch.device) -> DeviceBatch:
    """Make the current stream wait for the copy of a batch; return the batch."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    # The tensors were allocated on the copy stream. Without this, the allocator could reuse the
    # memory while the current stream still reads the batch.
    for tensor in tensors_of(batch.on_device):
        if tensor.is_cuda:
            tensor.record_stream(stream)
    return batch
