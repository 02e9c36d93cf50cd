"""Errors for files that are of a known kind but cannot be read."""

from __future__ import annotations

from ckptavg.errors import CheckpointError
from ckptavg.io.paths import Location


def damaged(path: str | Location, why: str, kind: str = "checkpoint") -> CheckpointError:
    """Word the error for a file with contradictory contents.

    Args:
        path: The file.
        why: The contradiction, as a clause.
        kind: Noun for the file's kind.
    """
    return CheckpointError(
        f"{path} is not a readable {kind}: {why}", "Copy it again, or leave it out."
    )


def cut_short(path: str | Location, why: str, kind: str = "checkpoint") -> CheckpointError:
    """Word the error for a file that ends too early.

    Args:
        path: The file.
        why: The sign of the missing bytes, as a clause.
        kind: Noun for the file's kind.
    """
    return CheckpointError(
        f"{path} is not a readable {kind}: {why}",
        "It may be truncated or still being written; copy it again or leave it out.",
    )


def not_a_checkpoint(directory: Location) -> CheckpointError:
    """Word the error for a directory that no format reads."""
    return CheckpointError(
        f"{directory} is not itself a checkpoint", "Name one checkpoint; average a run first."
    )
