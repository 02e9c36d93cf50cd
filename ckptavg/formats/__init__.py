"""A checkpoint on disk → a table of byte ranges. Opening reads headers only and runs no code."""

from ckptavg.formats.opening import is_checkpoint_directory, open_checkpoint, refuse_partitioned
from ckptavg.formats.stamp import FileStamp
from ckptavg.formats.table import Checkpoint, Record, Tensor

__all__ = [
    "Checkpoint",
    "FileStamp",
    "Record",
    "Tensor",
    "is_checkpoint_directory",
    "open_checkpoint",
    "refuse_partitioned",
]
