"""JSON out of strange hands, read within limits of size and memory."""

from __future__ import annotations

import json
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.errors.system import guard_reads
from ckptavg.io import paths
from ckptavg.io.paths import Location

MAX_TEXT = 100_000_000  # bytes: the limit of the safetensors reference implementation on a header
_MOST_VALUES = 5_000_000  # two bytes of text can make a value of 70


def loads(text: bytes) -> Any:
    """Read a JSON text.

    Raises:
        ValueError: It is malformed, names a key twice, or holds more values than any header does.
    """
    if text.count(b",") > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES} values")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: Location) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: It cannot be read, or not to its end.
        ValueError: As for ``loads`` and ``read_text``.
    """
    return loads(read_text(path))


def read_text(path: Location) -> bytes:
    """The bytes of a text file.

    Raises:
        CheckpointError: It cannot be read, or not to its end.
        ValueError: It is too large, or no regular file.
    """
    with guard_reads(path):
        if not path.is_file():  # a pipe may never end
            raise ValueError("it is not a regular file")
        size = paths.stat(path).size
        with paths.open_binary(path) as file:
            text = file.read(MAX_TEXT + 1)
    if len(text) > MAX_TEXT:
        raise ValueError(f"it is larger than {MAX_TEXT} bytes")
    if len(text) < size:
        raise CheckpointError(
            f"{path} ends before byte {size}: it changed while being read",
            "Wait until it has been written, then try again.",
        )
    return text


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name appears twice")
    return result
