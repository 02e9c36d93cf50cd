"""Streams that are cut into very small pieces, so that few elements cross every border."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from hypothesis import strategies as st

from ckptavg.averaging import stream as stream_module

# Elements per block, per strided block and per task, and threads, for hypothesis's `given`.
CUTS = {
    "block": st.integers(1, 40),
    "strided_block": st.integers(1, 40),
    "task": st.integers(1, 100),
    "threads": st.integers(1, 4),
}


@contextmanager
def cut_small(*, strided_block: int, task: int) -> Iterator[Path]:
    """Cut the streams of this process into small pieces; a directory for their checkpoints."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.object(stream_module, "STRIDED_BLOCK", strided_block))
        stack.enter_context(mock.patch.object(stream_module, "TASK", task))
        yield Path(directory)
