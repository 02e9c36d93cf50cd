"""Checkpoint formats: each file becomes a table of tensors and byte ranges.

Opening a checkpoint reads headers only and runs no code.
"""

from ckptavg.formats.checkpoint import Checkpoint, Record, Tensor
from ckptavg.formats.opening import open_checkpoint
from ckptavg.formats.registry import is_checkpoint_directory, refuse_partitioned
from ckptavg.io.stamp import FileStamp

__all__ = [
    "Checkpoint",
    "FileStamp",
    "Record",
    "Tensor",
    "is_checkpoint_directory",
    "open_checkpoint",
    "refuse_partitioned",
]
