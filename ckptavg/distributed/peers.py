"""Interface of the processes that share the work, and where this process stands among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Return True if this process was started as part of a group of several processes."""
    size = os.environ.get("WORLD_SIZE", "")
    is_launched = all(os.environ.get(name) for name in _LAUNCHER_VARIABLES)
    return is_launched and size.isdecimal() and int(size) > 1


def local_rank() -> int:
    """Return the number of this process on the host, which chooses the device."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def global_rank() -> int:
    """Return the rank of this process in the group; 0 for a single process."""
    if not is_distributed():
        return 0
    return int(os.environ["RANK"])


class Peers(Protocol):
    """Interface of a group of processes for a member.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
    """

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Gather a plain value for JSON from every process, in the order of ranks."""

    def check(self) -> None:
        """Raise an error if another process is known to have failed.

        Raises:
            PeerError: Another process has failed.
        """


class SingleProcess:
    """Group of a single process."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return a list of the value of this process."""
        return [value]

    def check(self) -> None:
        """Do nothing, since there is no other process."""


class TorchProcessGroup:
    """Default process group of torch.distributed, as set up by the calling program."""

    def __init__(self) -> None:
        import torch.distributed as dist  # noqa: PLC0415 - slow to import

        self._dist = dist
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from every process, in the order of ranks, once all values are there."""
        values: list[Any] = [None] * self.world_size
        self._dist.all_gather_object(values, value)
        return values

    def check(self) -> None:
        """Do nothing, since the calling program handles failures of other processes."""


_joined: ContextVar[Peers | None] = ContextVar("joined", default=None)


@contextmanager
def share_work(peers: Peers) -> Iterator[None]:
    """Let ``find_peers`` return a group of processes, for the duration of a context."""
    token = _joined.set(peers)
    try:
        yield
    finally:
        _joined.reset(token)


def find_peers() -> Peers:
    """Return the processes that share the work.

    Those of ``share_work`` come first, then the default process group of torch.distributed; else
    the group is this process alone.
    """
    joined = _joined.get()
    if joined is not None:
        return joined
    import torch.distributed as dist  # noqa: PLC0415 - slow to import

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchProcessGroup()
    return SingleProcess()
