"""Opening of checkpoints: a file or directory of any format becomes a table of bare names."""

from __future__ import annotations

from pathlib import Path

from ckptavg.errors import CheckpointError
from ckptavg.errors.system import guard_reads
from ckptavg.formats import registry
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.damage import not_a_checkpoint
from ckptavg.formats.file_formats import read_file
from ckptavg.formats.parts import build_checkpoint
from ckptavg.io.neighbours import suggest_neighbours
from ckptavg.io.paths import Location, PathOrUrl, locate


def open_checkpoint(path: PathOrUrl, key: str | None = None) -> Checkpoint:
    """Open a checkpoint: read the headers, move no tensor data, run no code.

    Args:
        path: A ``.safetensors`` file, a ``torch.save`` file under any suffix, or a directory of
            Hugging Face, DeepSpeed or ``torch.distributed.checkpoint``; or a URL.
        key: Dotted path of the entry that holds the weights; None to find the entry.

    Raises:
        CheckpointError: The checkpoint cannot be read, is damaged, or holds no weights that can be
            found.
    """
    location = locate(path)
    with guard_reads(location):
        if location.is_dir():
            return _open_directory(location, key)
        if isinstance(location, Path) and not location.exists() and not location.is_symlink():
            raise CheckpointError(f"{location} does not exist", suggest_neighbours(location))
        part = read_file(location, key)
        return build_checkpoint(location, part.format, [part], part.record)


def _open_directory(directory: Location, key: str | None) -> Checkpoint:
    checkpoint = registry.open_directory(directory, key)
    if checkpoint is None:
        raise not_a_checkpoint(directory)
    return checkpoint
