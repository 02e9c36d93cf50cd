"""Notes of libraries that run the model: kept off the screen of a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

_TRANSFORMERS = "transformers"
_LEVEL = "TRANSFORMERS_VERBOSITY"
_DEEPSPEED = "DeepSpeed"


@contextmanager
def silence_libraries(*, verbose: bool) -> Iterator[None]:
    """Show only errors of transformers' and DeepSpeed's logs while a command runs.

    Args:
        verbose: Show all that they log by themselves, as without this function.
    """
    if verbose:
        yield
        return
    with _silent_transformers(), _silent_deepspeed():
        yield


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Set the log level of transformers, unless TRANSFORMERS_VERBOSITY is set."""
    if os.environ.get(_LEVEL):
        yield
        return
    logger = logging.getLogger(_TRANSFORMERS)
    # transformers takes its level from here when it is imported, which may be after this.
    level = logger.level or logging.WARNING
    os.environ[_LEVEL] = "error"
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        os.environ.pop(_LEVEL, None)
        logger.setLevel(level)


@contextmanager
def _silent_deepspeed() -> Iterator[None]:
    """Filter DeepSpeed's records below errors; a level would be reset by importing DeepSpeed."""
    logger = logging.getLogger(_DEEPSPEED)
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
