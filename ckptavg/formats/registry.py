"""The registry of formats: which format a directory has, and which format an output gets.

The offset of every byte of an output is known before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ckptavg.errors import UsageError
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.dcp.format import DISTRIBUTED
from ckptavg.formats.deepspeed.format import DEEPSPEED
from ckptavg.formats.file_formats import FILE_FORMATS, output_format, output_suffixes
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.format import DirectoryFormat, Unfinished
from ckptavg.formats.huggingface.format import HUGGINGFACE, PEFT
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.shards import UNINDEXED_SHARDS
from ckptavg.io.paths import Location

# In the order in which they are tried. A format of directories is added here, a format of files in
# ``file_formats``.
DIRECTORY_FORMATS: tuple[DirectoryFormat, ...] = (
    PEFT,
    HUGGINGFACE,
    DISTRIBUTED,
    UNINDEXED_SHARDS,
    DEEPSPEED,
)


def open_directory(directory: Location, key: str | None) -> Checkpoint | None:
    """Open a directory by the first format that reads it; return None if there is none.

    Args:
        directory: Any directory.
        key: Dotted path of the entry that holds the weights; None to find the entry.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds no weights that can be found.
    """
    for format in DIRECTORY_FORMATS:
        checkpoint = format.open(directory, key)
        if checkpoint is not None:
            return checkpoint
    return None


def is_checkpoint_directory(path: Location) -> bool:
    """Return True if a path is the directory of a checkpoint, not of several checkpoints."""
    return path.is_dir() and any(format.detects(path) for format in DIRECTORY_FORMATS)


def refuse_partitioned(paths: Iterable[Location]) -> None:
    """Make sure that no checkpoint has weights spread over ranks.

    Raises:
        CheckpointError: The weights of a checkpoint are spread. The error holds the commands that
            convert the checkpoints concerned.
    """
    directories = [path for path in paths if path.is_dir()]
    for format in DIRECTORY_FORMATS:
        format.check_run(directories)


def find_homes(paths: Sequence[Location]) -> dict[Location, Location]:
    """Find the files that are parts of a checkpoint.

    Args:
        paths: Files and directories that a user named.

    Returns:
        File → the directory that is the checkpoint.

    Raises:
        CheckpointError: The files make up a part of a checkpoint only.
    """
    homes: dict[Location, Location] = {}
    for format in DIRECTORY_FORMATS:
        homes |= format.find_homes(paths)
    return homes


def component_names(directory: Location) -> set[str]:
    """Return the names of a checkpoint's subdirectories that hold further weights of it.

    Raises:
        CheckpointError: A list of the components names a directory outside.
    """
    names: set[str] = set()
    for format in DIRECTORY_FORMATS:
        names |= format.component_names(directory)
    return names


def is_nested_state(directory: Location) -> bool:
    """Return True if a directory within a checkpoint holds state that belongs to it."""
    return any(format.is_nested_state(directory) for format in DIRECTORY_FORMATS)


def why_unfinished(directory: Location) -> Unfinished | None:
    """Describe a directory whose save was interrupted; return None for any other directory."""
    for format in DIRECTORY_FORMATS:
        unfinished = format.why_unfinished(directory)
        if unfinished is not None:
            return unfinished
    return None


def holds_tensors(name: str) -> bool:
    """Return True if a file holds tensors in a known format, judged by the file's name."""
    return any(format.owns(name) for format in (*FILE_FORMATS, *DIRECTORY_FORMATS))


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: Provenance, template: Checkpoint
) -> Layout:
    """Plan an output in the format that the suffix of the path names.

    Args:
        path: The output, with the suffix of a file format, or no suffix for a directory.
        tensors: The output's tensors, under bare names.
        provenance: The record of how the output was made.
        template: The last checkpoint, whose format, configuration and shards are followed.

    Returns:
        The layout of all files of the output.

    Raises:
        UsageError: The suffix is not known.
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    suffix = Path(path).suffix
    text = provenance.to_json()
    file_format = output_format(suffix)
    if file_format is not None:
        return file_format.lay_out(path, tensors, text, template)
    # A trailing slash and a suffix of digits (step.500) are those of directories.
    if suffix and not path.endswith("/") and not suffix[1:].isdigit():
        raise UsageError(
            f"the output's suffix is expected to be one of {', '.join(output_suffixes())}, or none "
            f"for a directory, but got {suffix!r}"
        )
    return _directory_format(template).lay_out(tensors, text, template)


def _directory_format(template: Checkpoint) -> DirectoryFormat:
    """Choose the format of an output directory: the input's own where that is written."""
    if isinstance(template.format, DirectoryFormat) and template.format.is_written:
        return template.format
    return HUGGINGFACE


def has_suffix(name: str) -> bool:
    """Return True if the suffix of a name makes the output a single file."""
    return output_format(Path(name).suffix) is not None
