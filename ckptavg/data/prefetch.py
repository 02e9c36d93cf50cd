"""Batches of a pass: drawn with seeded generators, counted, copied to the device ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ckptavg.data.loaders import Progress, samples_in
from ckptavg.data.seeding import Generators
from ckptavg.distributed.processes import Peers
from ckptavg.models.batches import Batches, size_of, tensors_of, to_device


def counted(loader: Batches, progress: Progress, peers: Peers, seed: int = 0) -> Iterator[Any]:
    """A loader's batches; after each, progress is told and the other processes are looked at.

    Whatever the loader draws, crops and its own order too, follows from the seed alone, and leaves
    the caller's generators as they were.
    """
    done, total = 0, samples_in(loader)
    for batch in _seeded(loader, seed):
        peers.check()
        yield batch
        done += size_of(batch)
        progress(done, total)


def _seeded(loader: Batches, seed: int) -> Iterator[Any]:
    """A loader's batches, all of them loaded with seeded generators."""
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
class Moved:
    """A batch.

    Attributes:
        given: As the loader gave it.
        here: On the device.
    """

    given: Any
    here: Any


def moved(loader: Iterable[Any], device: torch.device) -> Iterator[Moved]:
    """Batches on the device; with CUDA, the next one's copy runs beside the work on this one."""
    if device.type != "cuda":
        for batch in loader:
            yield Moved(batch, to_device(batch, device))
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Moved, Any] | None = None
    for batch in loader:
        if any(tensor.is_cuda for tensor in tensors_of(batch)):  # which may be under way yet
            copies.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(copies):
            under_way = Moved(batch, to_device(batch, device)), copies.record_event()
        if waiting is not None:
            yield _arrived(*waiting, device)
        waiting = under_way
    if waiting is not None:
        yield _arrived(*waiting, device)


def _arrived(batch: Moved, copied: Any, device: torch.device) -> Moved:
    """A batch whose copy what is computed next waits for."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in tensors_of(batch.here):
        if tensor.is_cuda:
            tensor.record_stream(stream)
    return batch
