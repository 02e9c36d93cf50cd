"""Standard output and error that outlast a closed pipe."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ckptavg.errors.system import unwritable


class LastingStream:
    """Stream whose reader may close the pipe, as ``head`` does.

    What is written then goes nowhere, so that the work goes on to its end. Characters that the
    stream's encoding has not are escaped.

    Args:
        stream: Standard output or error; None where the process was started without.
        essential: True if other failures, such as a full disk, are errors.
    """

    def __init__(self, stream: TextIO | None, *, essential: bool) -> None:
        self._stream = stream or io.StringIO()
        self._essential = essential

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text while there is a reader.

        Raises:
            OutputError: It cannot be written, and is essential.
        """
        encoding = self._stream.encoding or "utf-8"
        with self._failures():
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush the stream while there is a reader.

        Raises:
            OutputError: It cannot be written, and is essential.
        """
        with self._failures():
            self._stream.flush()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _abandon(self._stream)
            if self._essential and not isinstance(error, BrokenPipeError):
                raise unwritable("the standard output", error) from error


def _abandon(stream: TextIO) -> None:
    """Redirect a stream to the null device, as Python writes unwritten text again on exit."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # a stream of no file
        os.dup2(nowhere.fileno(), stream.fileno())
