"""Processes that make an output together, as started by ``torchrun``.

The processes exchange small JSON messages through the gloo backend of torch.distributed. A process
that fails leaves a message in the launcher's store. The other processes look there while they work
and while they wait. The death of a process is noticed by its broken connections.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count as counted_from
from typing import Any, NoReturn, Protocol, TypeVar

from ckptavg.errors import CkptavgError, PeerError, ProcessesError

log = logging.getLogger("ckptavg")
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = 5.0  # seconds of waiting before a note
# Seconds in which every process has to start: imports from a cold disk are slow.
_APPEARING = 600.0
# The longest wait for a slower process.
_WORKING = timedelta(days=7)
_LOOK = 0.5  # seconds between looks at the store
_WAIT = 0.01  # seconds between looks at an exchange in progress
# Seconds after a broken connection in which the failed process may still leave its message.
_GRACE = 2.0
# Set to "True" by torchrun if the store belongs to the launcher, not to process 0.
_LAUNCHERS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_WORD = "failed"  # the store's key for the message of the first failure
# Message of a process that was interrupted, which is no failure of its own.
_INTERRUPTED = "interrupted"
# Numbers the groups of this process: each has its own keys in the store.
_JOINED = counted_from()
T = TypeVar("T")


def several() -> bool:
    """Return True if this process was started as part of a group of several processes."""
    size = os.environ.get("WORLD_SIZE", "")
    return all(os.environ.get(n) for n in _NEEDED) and size.isdecimal() and int(size) > 1


def local_rank() -> int:
    """Return the number of this process on the host, which chooses the device."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def own_rank() -> int:
    """Return the rank of this process in the group; 0 for a single process."""
    return int(os.environ["RANK"]) if several() else 0


class Peers(Protocol):
    """Interface of a group of processes for a member.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
    """

    rank: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """Gather a plain value for JSON from every process, in the order of ranks."""

    def check(self) -> None:
        """Raise an error if another process is known to have failed.

        Raises:
            PeerError: Another process has failed.
        """


class Alone:
    """Group of a single process."""

    rank, count = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """Return a list of the value of this process."""
        return [value]

    def check(self) -> None:
        """Do nothing, since there is no other process."""


class Group:
    """Default process group of torch.distributed, as set up by the calling program."""

    def __init__(self) -> None:
        import torch.distributed as dist  # noqa: PLC0415 - as in _join

        self._dist = dist
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from every process, in the order of ranks, once all values are there."""
        values: list[Any] = [None] * self.count
        self._dist.all_gather_object(values, value)
        return values

    def check(self) -> None:
        """Do nothing, since the calling program handles failures of other processes."""


def peers_of_group() -> Peers:
    """Return the default process group of torch.distributed, or a group of this process alone."""
    import torch.distributed as dist  # noqa: PLC0415 - as in _join

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return Alone()


class Processes:
    """Group of processes that a launcher has started.

    Args:
        store: Key-value store of torch.distributed that all processes share.
        rank: Number of this process, from 0.
        count: Number of processes.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        neighbours: Number of processes that share the processors of this host.
        repeated: True if another process has failed before with the same message as this process.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self.neighbours = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        self.repeated = False
        self._store = store
        self._looked = 0.0
        # Empty for the first exchange, during which errors already look for dead peers.
        self._peers: list[tuple[str, int]] = []
        self._peers = [
            (host, pid) for host, pid in self.gather([socket.gethostname(), os.getpid()])
        ]

    def gather(self, value: Any) -> list[Any]:
        """Gather a value from every process, in the order of ranks, once all values are there.

        Args:
            value: Plain value for JSON; tuples come back as lists.

        Returns:
            The values of all processes.

        Raises:
            PeerError: Another process has failed or died.
        """
        raw = json.dumps(value).encode()
        # Two exchanges: parts of an exchange have equal sizes, so sizes are exchanged first.
        sizes = [
            int.from_bytes(part, "little")
            for part in self._exchange(bytearray(len(raw).to_bytes(8, "little")))
        ]
        parts = self._exchange(bytearray(raw.ljust(max(sizes), b" ")))
        return [json.loads(part) for part in parts]

    def check(self) -> None:
        """Check that no other process has failed, unless the last check was moments ago.

        Raises:
            PeerError: Another process has failed.
        """
        # Called very often during work: most calls must not ask the store.
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            if (word := self._word()) is not None:
                raise PeerError(word["others"])

    def leave(self, error: BaseException) -> None:
        """Leave a message for the other processes about the end of this process.

        Raises:
            PeerError: This process was interrupted because another process has failed.
        """
        name = self._name(self.rank)
        if isinstance(error, KeyboardInterrupt):
            # A launcher may interrupt all processes once one has failed: name that failure.
            if cause := self._failed_peer(interrupts=False):
                raise PeerError(cause) from None
            self._leave_word(_INTERRUPTED, f"{name} was interrupted")
        elif isinstance(error, PeerError):
            self._leave_word("", error.message)
        else:
            is_own_error = isinstance(error, CkptavgError)
            message = str(
                error if is_own_error else CkptavgError(f"{type(error).__name__}: {error}")
            )
            word = self._leave_word(message, f"{name} has failed: {message}")
            self.repeated = word["rank"] != self.rank and word["message"] == message
        if self.rank == 0 and os.environ.get(_LAUNCHERS_STORE) != "True":
            # The store ends with this process: give the other processes time to look.
            time.sleep(2 * _LOOK)

    def _exchange(self, mine: bytearray) -> list[bytearray]:
        """Exchange byte strings of equal size with all processes.

        Raises:
            PeerError: Another process has failed or died.
        """
        import torch  # noqa: PLC0415 - as in _join
        import torch.distributed as dist  # noqa: PLC0415

        parts = [bytearray(len(mine)) for _ in range(self.count)]
        received = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
        try:
            work = dist.all_gather(
                received, torch.frombuffer(mine, dtype=torch.uint8), async_op=True
            )
            # Polled: a plain wait would see neither failures of other processes nor Ctrl-C.
            while not work.is_completed():
                self.check()
                time.sleep(_WAIT)
            work.wait()
        except RuntimeError as error:
            self._lose(error)
        return parts

    def _lose(self, error: RuntimeError) -> NoReturn:
        """Raise the error for a broken connection, and name the failed process if known in time."""
        until = time.monotonic() + _GRACE
        cause = self._failed_peer()
        while cause is None and time.monotonic() < until:
            time.sleep(_WAIT)
            cause = self._failed_peer()
        raise PeerError(
            cause or "another process has died, or its host cannot be reached"
        ) from error

    def _failed_peer(self, *, interrupts: bool = True) -> str | None:
        """Describe the process that has failed: by its message in the store, or as dead.

        Args:
            interrupts: True to count a process that was interrupted as failed.

        Returns:
            The description; None if no failed process is known.
        """
        with suppress(PeerError):
            if (word := self._word()) is not None:
                counts = interrupts or word["message"] != _INTERRUPTED
                return str(word["others"]) if counts else None
        return self._gone()

    def _gone(self) -> str | None:
        """Describe the first process of this host that is no longer alive; None if all are."""
        # Processes of other hosts cannot be looked up by their ids.
        host = socket.gethostname()
        gone = [r for r, (at, pid) in enumerate(self._peers) if at == host and not _is_alive(pid)]
        return (
            f"{self._name(gone[0])} has died without a word: its own output may say why"
            if gone
            else None
        )

    def _name(self, rank: int) -> str:
        """Name a process for messages, with the host if there are several."""
        hosts = {host for host, _ in self._peers}
        return f"process {rank}" + (f" on {self._peers[rank][0]}" if len(hosts) > 1 else "")

    def _word(self) -> dict[str, Any] | None:
        """Read the message of the first process that failed; None if there is none.

        Raises:
            PeerError: The store is gone.
        """
        try:
            word = self._store.check([_WORD]) and json.loads(self._store.get(_WORD))
        except RuntimeError as error:
            gone = self._gone() or "the launcher, or its host, has gone"
            raise PeerError(gone) from error
        return word or None

    def _leave_word(self, message: str, others: str) -> dict[str, Any]:
        """Store the message of a failure unless there is one; return the first message."""
        word = {"rank": self.rank, "message": message, "others": others}
        # The store may be gone as well.
        with suppress(RuntimeError):
            stored = self._store.compare_set(_WORD, "", json.dumps(word))
            first_word: dict[str, Any] = json.loads(stored)
            return first_word
        return word


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the group of processes for the duration of a context.

    If any process fails, all processes fail.

    Yields:
        The group, once all processes have started.

    Raises:
        ProcessesError: The processes do not find each other.
        PeerError: Another process has failed or died meanwhile.
    """
    processes = _join()
    try:
        yield processes
    except BaseException as error:
        # The connections stay: closing them would wait for messages that will not come.
        processes.leave(error)
        raise
    import torch.distributed as dist  # noqa: PLC0415 - as in _join

    dist.destroy_process_group()


def _join() -> Processes:
    """Start the gloo backend, and wait for all processes.

    Raises:
        ProcessesError: The processes do not find each other.
    """
    # Imported here: neither a single process nor a call for help needs torch.distributed.
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    if not dist.is_available() or not dist.is_gloo_available():
        raise ProcessesError("this build of torch has no gloo", "Start one process alone.")
    try:
        wait = timedelta(seconds=_APPEARING)
        store, rank, count = _interruptible(lambda: next(iter(rendezvous("env://", timeout=wait))))
        # Keys of a group before, or of the calling program, must not be taken for ours.
        group_store = dist.distributed_c10d.PrefixStore(f"ckptavg/{next(_JOINED)}", store)
        _await(group_store, rank, count)
        dist.init_process_group(
            "gloo", store=group_store, rank=rank, world_size=count, timeout=_WORKING
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"the processes do not find each other ({error})",
            "Check that the hosts reach each other, or name the network by GLOO_SOCKET_IFNAME.",
        ) from error
    return Processes(group_store, rank, count)


def _interruptible(wait: Callable[[], T]) -> T:
    """Call a function that signals cannot interrupt, so that Ctrl-C ends the wait.

    The function runs in a daemon thread, which is abandoned if a signal comes.
    """
    future: Future[T] = Future()

    def run() -> None:
        """Call the function, and keep the result or the error."""
        try:
            future.set_result(wait())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    until = time.monotonic() + _PATIENCE
    while not future.done():
        time.sleep(_WAIT)
        if time.monotonic() > until:
            log.info("waiting for the other processes that WORLD_SIZE tells of")
            until = math.inf
    return future.result()


def _await(store: Any, rank: int, count: int) -> None:
    """Wait until every process has started.

    Raises:
        ProcessesError: A process has not started in time.
    """
    store.set(f"here/{rank}", "")
    until = time.monotonic() + _APPEARING
    while not store.check([f"here/{r}" for r in range(count)]):
        if time.monotonic() > until:
            lacking = [str(r) for r in range(count) if not store.check([f"here/{r}"])]
            raise ProcessesError(
                f"of {count} processes, {', '.join(lacking)} did not begin within "
                f"{_APPEARING:.0f} seconds",
                "Start all of them by torchrun, or one alone without WORLD_SIZE.",
            )
        time.sleep(_WAIT)


def _is_alive(pid: int) -> bool:
    """Return True if a process of this host is alive, or if that is unknown."""
    # On Windows, ``os.kill`` would end the process.
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
