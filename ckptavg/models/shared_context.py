"""Process-wide settings that several threads may change at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any


class SharedContext:
    """Context of the whole process: the first user enters it, and the last one leaves it.

    Users are nested calls and threads. Without the count, a thread that leaves first would restore
    the setting for the others, and the last thread would restore the setting of the first.

    Args:
        open_context: Makes the context.
    """

    def __init__(self, open_context: Callable[[], AbstractContextManager[Any]]) -> None:
        self._open_context = open_context
        self._lock = threading.Lock()
        self._users = 0
        self._stack = ExitStack()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the context until the end of the block."""
        with self._lock:
            if self._users == 0:
                self._stack.enter_context(self._open_context())
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._stack.close()
