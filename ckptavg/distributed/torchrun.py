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
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count as count_from
from typing import Any, NoReturn, TypeVar

from ckptavg.distributed.peers import share_work
from ckptavg.errors import CkptavgError, PeerError, ProcessesError

log = logging.getLogger("ckptavg")
_NOTE_AFTER = 5.0  # seconds of waiting before a note
# Seconds in which every process has to start: imports from a cold disk are slow.
_START_TIMEOUT = 600.0
# The longest wait for a slower process.
_WORK_TIMEOUT = timedelta(days=7)
_CHECK_INTERVAL = 0.5  # seconds between looks at the store
_POLL_INTERVAL = 0.01  # seconds between looks at an exchange in progress
# Seconds after a broken connection in which the failed process may still leave its message.
_NOTICE_TIMEOUT = 2.0
# Set to "True" by torchrun if the store belongs to the launcher, not to process 0.
_LAUNCHERS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_NOTICE_KEY = "failed"  # the store's key for the message of the first failure
# Message of a process that was interrupted, which is no failure of its own.
_INTERRUPTED = "interrupted"
# Numbers the groups of this process: each has its own keys in the store.
_GROUP_NUMBERS = count_from()
T = TypeVar("T")


@dataclass(frozen=True)
class FailureNotice:
    """Message of a process that failed, for the other processes.

    Attributes:
        rank: Number of the process.
        message: Text of the error; empty for an error that reports another process's failure.
        others: Text of the error that the other processes raise.
    """

    rank: int
    message: str
    others: str

    @classmethod
    def from_json(cls, text: str | bytes) -> FailureNotice:
        """Read a notice from the JSON text in the store."""
        return cls(**json.loads(text))


class TorchrunGroup:
    """Group of processes that a launcher has started.

    Args:
        store: Key-value store of torch.distributed that all processes share.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        neighbours: Number of processes that share the processors of this host.
        repeated: True if another process has failed before with the same message as this process.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.neighbours = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        self.repeated = False
        self._store = store
        self._last_check = 0.0
        # Empty for the first exchange, during which errors already look for dead peers.
        self._peers: list[tuple[str, int]] = []
        self._peers = self.gather([socket.gethostname(), os.getpid()])

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
        size_parts = self._exchange(bytearray(len(raw).to_bytes(8, "little")))
        longest = max(int.from_bytes(part, "little") for part in size_parts)
        parts = self._exchange(bytearray(raw.ljust(longest, b" ")))
        return [json.loads(part) for part in parts]

    def check(self) -> None:
        """Check that no other process has failed, unless the last check was moments ago.

        Raises:
            PeerError: Another process has failed.
        """
        # Called very often during work: most calls must not ask the store.
        now = time.monotonic()
        if now - self._last_check >= _CHECK_INTERVAL:
            self._last_check = now
            if (notice := self._failure_notice()) is not None:
                raise PeerError(notice.others)

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
            self._post_failure_notice(_INTERRUPTED, f"{name} was interrupted")
        elif isinstance(error, PeerError):
            self._post_failure_notice("", error.message)
        else:
            if not isinstance(error, CkptavgError):
                error = CkptavgError(f"{type(error).__name__}: {error}")
            message = str(error)
            notice = self._post_failure_notice(message, f"{name} has failed: {message}")
            self.repeated = notice.rank != self.rank and notice.message == message
        if self.rank == 0 and os.environ.get(_LAUNCHERS_STORE) != "True":
            # The store ends with this process: give the other processes time to look.
            time.sleep(2 * _CHECK_INTERVAL)

    def _exchange(self, mine: bytearray) -> list[bytearray]:
        """Exchange byte strings of equal size with all processes.

        Raises:
            PeerError: Another process has failed or died.
        """
        import torch  # noqa: PLC0415 - as in _join
        import torch.distributed as dist  # noqa: PLC0415

        parts = [bytearray(len(mine)) for _ in range(self.world_size)]
        received = [torch.frombuffer(part, dtype=torch.uint8) for part in parts]
        try:
            work = dist.all_gather(
                received, torch.frombuffer(mine, dtype=torch.uint8), async_op=True
            )
            # Polled: a plain wait would see neither failures of other processes nor Ctrl-C.
            while not work.is_completed():
                self.check()
                time.sleep(_POLL_INTERVAL)
            work.wait()
        except RuntimeError as error:
            self._raise_lost_connection(error)
        return parts

    def _raise_lost_connection(self, error: RuntimeError) -> NoReturn:
        """Raise the error for a broken connection, and name the failed process if known in time."""
        until = time.monotonic() + _NOTICE_TIMEOUT
        cause = self._failed_peer()
        while cause is None and time.monotonic() < until:
            time.sleep(_POLL_INTERVAL)
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
            if (notice := self._failure_notice()) is not None:
                if notice.message == _INTERRUPTED and not interrupts:
                    return None
                return notice.others
        return self._find_dead_process()

    def _find_dead_process(self) -> str | None:
        """Describe the first process of this host that is no longer alive; None if all are."""
        # Processes of other hosts cannot be looked up by their ids.
        host = socket.gethostname()
        for rank, (peer_host, pid) in enumerate(self._peers):
            if peer_host == host and not _is_alive(pid):
                return f"{self._name(rank)} has died without a message: its own output may say why"
        return None

    def _name(self, rank: int) -> str:
        """Name a process for messages, with the host if there are several."""
        hosts = {host for host, _ in self._peers}
        if len(hosts) > 1:
            return f"process {rank} on {self._peers[rank][0]}"
        return f"process {rank}"

    def _failure_notice(self) -> FailureNotice | None:
        """Read the message of the first process that failed; None if there is none.

        Raises:
            PeerError: The store is gone.
        """
        try:
            if not self._store.check([_NOTICE_KEY]):
                return None
            return FailureNotice.from_json(self._store.get(_NOTICE_KEY))
        except RuntimeError as error:
            cause = self._find_dead_process() or "the launcher, or its host, has gone"
            raise PeerError(cause) from error

    def _post_failure_notice(self, message: str, others: str) -> FailureNotice:
        """Store the message of a failure unless there is one; return the first message."""
        notice = FailureNotice(self.rank, message, others)
        # The store may be gone as well.
        with suppress(RuntimeError):
            stored = self._store.compare_set(_NOTICE_KEY, "", json.dumps(asdict(notice)))
            return FailureNotice.from_json(stored)
        return notice


@contextmanager
def process_group() -> Iterator[TorchrunGroup]:
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
        with share_work(processes):
            yield processes
    except BaseException as error:
        # The connections stay: closing them would wait for messages that will not come.
        processes.leave(error)
        raise
    import torch.distributed as dist  # noqa: PLC0415 - as in _join

    dist.destroy_process_group()


def _join() -> TorchrunGroup:
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
        wait = timedelta(seconds=_START_TIMEOUT)
        store, rank, world_size = _wait_interruptibly(
            lambda: next(iter(rendezvous("env://", timeout=wait)))
        )
        # Keys of a group before, or of the calling program, must not be taken for ours.
        group_store = dist.distributed_c10d.PrefixStore(f"ckptavg/{next(_GROUP_NUMBERS)}", store)
        _wait_for_all(group_store, rank, world_size)
        dist.init_process_group(
            "gloo", store=group_store, rank=rank, world_size=world_size, timeout=_WORK_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"the processes do not find each other ({error})",
            "Check that the hosts reach each other, or name the network by GLOO_SOCKET_IFNAME.",
        ) from error
    return TorchrunGroup(group_store, rank, world_size)


def _wait_interruptibly(wait: Callable[[], T]) -> T:
    """Call a function that signals cannot interrupt, so that Ctrl-C ends the wait.

    The function runs in a daemon thread, which is abandoned if a signal comes.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(wait())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    until = time.monotonic() + _NOTE_AFTER
    while not future.done():
        time.sleep(_POLL_INTERVAL)
        if time.monotonic() > until:
            log.info("waiting for the other processes that WORLD_SIZE counts")
            until = math.inf
    return future.result()


def _wait_for_all(store: Any, rank: int, world_size: int) -> None:
    """Wait until every process has started.

    Raises:
        ProcessesError: A process has not started in time.
    """
    store.set(f"here/{rank}", "")
    keys = [f"here/{number}" for number in range(world_size)]
    until = time.monotonic() + _START_TIMEOUT
    while not store.check(keys):
        if time.monotonic() > until:
            missing = [str(number) for number, key in enumerate(keys) if not store.check([key])]
            raise ProcessesError(
                f"of {world_size} processes, these did not start within "
                f"{_START_TIMEOUT:.0f} seconds: {', '.join(missing)}",
                "Start all of them by torchrun, or one alone without WORLD_SIZE.",
            )
        time.sleep(_POLL_INTERVAL)


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
