"""Processes that make one output together, as ``torchrun`` starts them.

What they tell each other is small, goes through torch.distributed's gloo, and is JSON. One that
fails leaves word in the launcher's store, where the others look while they work and while they
wait; one that dies is noticed by its connections.
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
_PATIENCE = 5.0  # seconds of waiting before that is said
_APPEARING = 600.0  # seconds in which every process has to begin: cold imports take their time
_WORKING = timedelta(days=7)  # by which one may end before another
_LOOK = 0.5  # seconds between looks at the store
_WAIT = 0.01  # between looks at a message that is under way
_GRACE = 2.0  # in which a failure comes to be known by more than a closed connection
_LAUNCHERS_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # what torchrun says so by
_WORD = "failed"  # the store's entry for the first failure
_INTERRUPTED = "interrupted"  # told, not failed
_JOINED = counted_from()
T = TypeVar("T")


def several() -> bool:
    """Whether this process was started as one of several that belong together."""
    size = os.environ.get("WORLD_SIZE", "")
    return all(os.environ.get(n) for n in _NEEDED) and size.isdecimal() and int(size) > 1


def local_rank() -> int:
    """This process's number among those on its host, by which it takes one of its devices."""
    return int(os.environ.get("LOCAL_RANK") or 0)


def own_rank() -> int:
    """This process's number among those that belong together; 0 where it is alone."""
    return int(os.environ["RANK"]) if several() else 0


class Peers(Protocol):
    """Processes that work on one thing, as one of them sees them.

    Attributes:
        rank: This one's number, from 0.
        count: How many there are.
    """

    rank: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """What every process hands in, plain values for JSON, in their order."""

    def check(self) -> None:
        """Raise an error if another process is known to have failed."""


class Alone:
    """A process by itself, as its own only peer."""

    rank, count = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """What this process hands in."""
        return [value]

    def check(self) -> None:
        """There is no other process."""


class Group:
    """The processes of torch.distributed's default group, which a program has set up for itself."""

    def __init__(self) -> None:
        import torch.distributed as dist  # noqa: PLC0415 - as in _join

        self._dist = dist
        self.rank = dist.get_rank()
        self.count = dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """What every process hands in; returns once all have."""
        found: list[Any] = [None] * self.count
        self._dist.all_gather_object(found, value)
        return found

    def check(self) -> None:
        """Another's failure is that program's to notice."""


def peers_of_group() -> Peers:
    """The processes of torch.distributed's default group; this one alone where there is none."""
    import torch.distributed as dist  # noqa: PLC0415 - as in _join

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Group()
    return Alone()


class Processes:
    """The processes that a launcher has started, as one of them sees them.

    Args:
        store: Where all of them can leave word.
        rank: This one's number.
        count: How many there are.

    Attributes:
        rank: This one's number, from 0.
        count: How many there are.
        neighbours: How many of them share this machine's processors.
        repeated: Whether another has failed before with the very message of this one's failure.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.rank = rank
        self.count = count
        self.neighbours = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        self.repeated = False
        self._store = store
        self._looked = 0.0
        self._peers: list[tuple[str, int]] = []
        self._peers = [
            (host, pid) for host, pid in self.gather([socket.gethostname(), os.getpid()])
        ]

    def gather(self, value: Any) -> list[Any]:
        """What every process hands in, in their order; returns once all have.

        Args:
            value: Plain values for JSON, where tuples come back as lists.

        Raises:
            PeerError: Another process has failed or died.
        """
        raw = json.dumps(value).encode()
        sizes = [
            int.from_bytes(part, "little")
            for part in self._exchange(bytearray(len(raw).to_bytes(8, "little")))
        ]
        parts = self._exchange(bytearray(raw.ljust(max(sizes), b" ")))
        return [json.loads(part) for part in parts]

    def check(self) -> None:
        """Look whether another process has failed, if the last look is some time ago.

        Raises:
            PeerError: One has.
        """
        now = time.monotonic()
        if now - self._looked >= _LOOK:
            self._looked = now
            if (word := self._word()) is not None:
                raise PeerError(word["others"])

    def leave(self, error: BaseException) -> None:
        """Let the others know that this process ends, and why.

        Raises:
            PeerError: It was interrupted because another has failed.
        """
        own = self._name(self.rank)
        if isinstance(error, KeyboardInterrupt):
            if cause := self._failed_peer(interrupts=False):
                raise PeerError(cause) from None
            self._leave_word(_INTERRUPTED, f"{own} was interrupted")
        elif isinstance(error, PeerError):
            self._leave_word("", error.message)
        else:
            known = isinstance(error, CkptavgError)
            message = str(error if known else CkptavgError(f"{type(error).__name__}: {error}"))
            word = self._leave_word(message, f"{own} has failed: {message}")
            self.repeated = word["rank"] != self.rank and word["message"] == message
        if self.rank == 0 and os.environ.get(_LAUNCHERS_STORE) != "True":
            time.sleep(2 * _LOOK)  # the store ends with this process: let the others look

    def _exchange(self, mine: bytearray) -> list[bytearray]:
        """Everyone's bytes, of which all have as many."""
        import torch  # noqa: PLC0415 - as in _join
        import torch.distributed as dist  # noqa: PLC0415

        parts = [bytearray(len(mine)) for _ in range(self.count)]
        received = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
        try:
            work = dist.all_gather(
                received, torch.frombuffer(mine, dtype=torch.uint8), async_op=True
            )
            while not work.is_completed():
                self.check()
                time.sleep(_WAIT)
            work.wait()
        except RuntimeError as error:
            self._lose(error)
        return parts

    def _lose(self, error: RuntimeError) -> NoReturn:
        """Raise the error for a connection that has broken, once it is clear whose."""
        until = time.monotonic() + _GRACE
        cause = self._failed_peer()
        while cause is None and time.monotonic() < until:
            time.sleep(_WAIT)
            cause = self._failed_peer()
        raise PeerError(
            cause or "another process has died, or its host cannot be reached"
        ) from error

    def _failed_peer(self, *, interrupts: bool = True) -> str | None:
        """Who has failed, if that can be told: by its own word, or because it is gone.

        Args:
            interrupts: Whether one that was interrupted counts.
        """
        with suppress(PeerError):
            if (word := self._word()) is not None:
                counts = interrupts or word["message"] != _INTERRUPTED
                return str(word["others"]) if counts else None
        return self._gone()

    def _gone(self) -> str | None:
        """The first process of this host that is no more."""
        host = socket.gethostname()
        gone = [r for r, (at, pid) in enumerate(self._peers) if at == host and not _is_alive(pid)]
        return (
            f"{self._name(gone[0])} has died without a word: its own output may say why"
            if gone
            else None
        )

    def _name(self, rank: int) -> str:
        hosts = {host for host, _ in self._peers}
        return f"process {rank}" + (f" on {self._peers[rank][0]}" if len(hosts) > 1 else "")

    def _word(self) -> dict[str, Any] | None:
        """What the first process that failed has left."""
        try:
            found = self._store.check([_WORD]) and json.loads(self._store.get(_WORD))
        except RuntimeError as error:
            gone = self._gone() or "the launcher, or its host, has gone"
            raise PeerError(gone) from error
        return found or None

    def _leave_word(self, message: str, others: str) -> dict[str, Any]:
        """Leave word of a failure unless another has; returns the first one's."""
        mine = {"rank": self.rank, "message": message, "others": others}
        with suppress(RuntimeError):  # the store may be gone as well
            found: dict[str, Any] = json.loads(self._store.compare_set(_WORD, "", json.dumps(mine)))
            return found
        return mine


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that belong together, once all are there; if one fails, all do.

    Raises:
        ProcessesError: They do not find each other.
        PeerError: Another has failed or died meanwhile.
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
    import torch.distributed as dist  # noqa: PLC0415 - help and a process alone do without
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415

    if not dist.is_available() or not dist.is_gloo_available():
        raise ProcessesError("this build of torch has no gloo", "Start one process alone.")
    try:
        wait = timedelta(seconds=_APPEARING)
        store, rank, count = _interruptible(lambda: next(iter(rendezvous("env://", timeout=wait))))
        own = dist.distributed_c10d.PrefixStore(f"ckptavg/{next(_JOINED)}", store)
        _await(own, rank, count)
        dist.init_process_group("gloo", store=own, rank=rank, world_size=count, timeout=_WORKING)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"the processes do not find each other ({error})",
            "Check that the hosts reach each other, or name the network by GLOO_SOCKET_IFNAME.",
        ) from error
    return Processes(own, rank, count)


def _interruptible(wait: Callable[[], T]) -> T:
    """Wait for something that no signal would end, in a thread that is left behind if one comes."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(wait())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    until = time.monotonic() + _PATIENCE
    while not found.done():
        time.sleep(_WAIT)
        if time.monotonic() > until:
            log.info("waiting for the other processes that WORLD_SIZE tells of")
            until = math.inf
    return found.result()


def _await(store: Any, rank: int, count: int) -> None:
    """Wait until every process has begun."""
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
    """Whether a process of this machine runs; taken to where that cannot be told."""
    if os.name == "nt":  # where the call below would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
