"""The registry of file formats: which format a file has, and which formats a suffix stands for."""

from __future__ import annotations

import re

from ckptavg.errors import CheckpointError
from ckptavg.formats import unsupported_files
from ckptavg.formats.format import FileFormat
from ckptavg.formats.parts import Part
from ckptavg.formats.safetensors.format import SAFETENSORS
from ckptavg.formats.torch_save.format import TORCH_SAVE
from ckptavg.io import paths
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

# In the order in which they are tried. A format of files is added here.
FILE_FORMATS: tuple[FileFormat, ...] = (SAFETENSORS, TORCH_SAVE)
# Bytes read to make sure of a format: enough for the name of a zip file's first entry.
_SURE_HEAD = 512


def read_file(path: Location, key: str | None) -> Part:
    """Read the header of a file of weights of any format.

    Raises:
        CheckpointError: The file cannot be read, is damaged, or holds no weights that can be found.
    """
    # Before the file is opened: opening a pipe may wait for ever.
    stamp = FileStamp.of(path)
    return _identify(path).read(path, stamp, key)


def _identify(path: Location) -> FileFormat:
    """Identify the format of a file by content, else by suffix.

    Raises:
        CheckpointError: The file cannot be read, or is of another kind.
    """
    if kind := unsupported_files.identify_name(path):
        raise kind.refusal(path)
    with paths.open_binary(path) as file:
        start = file.read(unsupported_files.HEAD)
        for format in FILE_FORMATS:
            if format.looks_like(start):
                return format
        if kind := unsupported_files.identify(path, file, start):
            raise kind.refusal(path)
    for format in FILE_FORMATS:
        if format.claims(path):
            return format
    labels = " nor ".join(format.label for format in FILE_FORMATS)
    raise CheckpointError(
        f"{path} is of no known kind: neither {labels}",
        "Name a file of weights, or leave it out.",
    )


def begins_as_checkpoint(path: Location) -> bool:
    """Return True if the first bytes of a file make sure that the file is a checkpoint.

    The answer is False for a file that cannot be read.
    """
    try:
        with paths.open_binary(path) as file:
            start = file.read(_SURE_HEAD)
    except (CheckpointError, OSError):
        return False
    return any(format.begins(start) for format in FILE_FORMATS)


def checkpoint_suffixes() -> tuple[str, ...]:
    """Return the suffixes that checkpoints of a run have."""
    suffixes: tuple[str, ...] = ()
    for format in FILE_FORMATS:
        suffixes += format.suffixes
    return suffixes


def find_suffix(name: str) -> int | None:
    """Find the first suffix of a checkpoint in a name, in any case and whatever follows.

    Returns:
        Index of the suffix in the name; None without one.
    """
    suffixes = checkpoint_suffixes()
    for format in FILE_FORMATS:
        suffixes += format.rare_suffixes
    pattern = "|".join(map(re.escape, suffixes))
    match = re.search(rf"(?:{pattern})(?![a-z])", name, re.IGNORECASE)
    return None if match is None else match.start()


def output_suffixes() -> tuple[str, ...]:
    """Return the suffixes that make an output a single file."""
    suffixes: tuple[str, ...] = ()
    for format in FILE_FORMATS:
        suffixes += format.output_suffixes
    return suffixes


def output_format(suffix: str) -> FileFormat | None:
    """Return the format of outputs with a suffix; None for any other suffix."""
    for format in FILE_FORMATS:
        if suffix in format.output_suffixes:
            return format
    return None
