"""Reader of untrusted JSON within limits of size and memory."""

from __future__ import annotations

import json
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.errors.system import guard_reads
from ckptavg.io import paths
from ckptavg.io.paths import Location

# In bytes: the limit of the safetensors reference implementation on a header.
MAX_TEXT = 100_000_000
# A limit on memory: two bytes of text can become a value of 70 bytes.
_MOST_VALUES = 5_000_000


def loads(text: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: The text is malformed, is nested too deeply, has a key twice, or holds more
            values than any header.
    """
    # Counted before parsing: commas separate the values of lists and objects.
    if text.count(b",") > _MOST_VALUES:
        raise ValueError(f"it holds more than {_MOST_VALUES} values")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: Location) -> Any:
    """Read and parse a JSON file.

    Raises:
        CheckpointError: The file cannot be read to the end.
        ValueError: As for ``loads`` and ``read_text``.
    """
    return loads(read_text(path))


def read_text(path: Location) -> bytes:
    """Read the bytes of a text file.

    Raises:
        CheckpointError: The file cannot be read to the end.
        ValueError: The file is larger than ``MAX_TEXT``, or not a regular file.
    """
    with guard_reads(path):
        # A pipe may never end.
        if not path.is_file():
            raise ValueError("it is not a regular file")
        size = paths.stat(path).size
        with paths.open_binary(path) as file:
            # The file may have grown: the size alone bounds nothing.
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
    """Make a dict of the members of a JSON object.

    Raises:
        ValueError: A name appears twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name appears twice")
    return result
