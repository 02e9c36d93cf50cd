"""Errors for files that are of a known kind but cannot be read."""

from __future__ import annotations

from ckptavg.errors import CheckpointError
from ckptavg.formats.storage import Location


def damaged(path: str | Location, why: str, kind: str = "checkpoint") -> CheckpointError:
    """The error for a file whose contents contradict themselves."""
    return CheckpointError(
        f"{path} is not a readable {kind}: {why}", "Copy it again, or leave it out."
    )


def cut_short(path: str | Location, why: str, kind: str = "checkpoint") -> CheckpointError:
    """The error for a file that ends too early."""
    return CheckpointError(
        f"{path} is not a readable {kind}: {why}",
        "It may be truncated or still being written; copy it again or leave it out.",
    )
