"""Widths of EMA snapshots, as recorded beside the weights or written in the names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.io.paths import Location

WIDEST = 1 / math.sqrt(12)
"""Relative standard deviation of a uniform average over training, which no EMA reaches."""

# The exponent of a narrower EMA exceeds floats.
_NARROWEST = 1e-300
# Names of a recorded width, in the order of trial.
_NAMES = ("sigma_rel", "ema_sigma_rel", "ema_sigma", "ema_std", "std_rel")
# EDM2 writes network-snapshot-0000500-0.050.pkl; others name the number: ema_sigma_0.05.
_AT_END = re.compile(r"-(0\.\d+)$")
_NAMED = re.compile(r"(?<![a-z])(?:sigma(?:[-_]?rel)?|std)[-_=]?(0?\.\d+)(?!\d)", re.IGNORECASE)
# Averages of ckptavg: power-ema:sigma=0.1.
_OWN = re.compile(r"(?:power|posthoc)-ema:(?:[^,]*,)*\s*sigma=([^,]*)(?:,.*)?")
_SUFFIX = re.compile(r"\.[a-z]\w*$", re.IGNORECASE)


def width_of(checkpoint: Checkpoint) -> float | None:
    """Find the relative standard deviation σ of a checkpoint that is an EMA's snapshot.

    Returns:
        The width as a fraction of the training until the snapshot; None if there is none.
    """
    scheme: str | None = None
    if checkpoint.provenance is not None:
        scheme = checkpoint.provenance.scheme
    return find_width(checkpoint.record.metrics, checkpoint.path, scheme or "")


def find_width(metrics: Mapping[str, float], path: Location, scheme: str = "") -> float | None:
    """Find the relative standard deviation σ of an EMA's snapshot.

    The scheme of an average comes first, then a number that the checkpoint records as
    ``sigma_rel``, ``ema_sigma`` or ``ema_std``, then the file's name, then the name of the
    directory. In names the number follows ``sigma`` or ``std``, or ends the file's name as in
    EDM2's ``network-snapshot-0000500-0.050.pkl``.

    Args:
        metrics: Recorded numbers by dotted name.
        path: Path of the checkpoint.
        scheme: The scheme of a checkpoint that is an average itself; else empty.

    Returns:
        The width as a fraction of the training until the snapshot; None if there is none.
    """
    own = _OWN.fullmatch(scheme)
    if own is not None:
        return _read_width(own[1])
    for name in _NAMES:
        for recorded, value in metrics.items():
            if recorded.rpartition(".")[2] == name and is_width(value):
                return value
    stem = _SUFFIX.sub("", path.name)
    for text in (stem, path.parent.name):
        match = _NAMED.search(text)
        if match is None and text == stem:
            match = _AT_END.search(text)
        if match is not None and (width := _read_width(match[1])) is not None:
            return width
    return None


def _read_width(text: str) -> float | None:
    """Read a width; None for a number that is out of range, or no number."""
    try:
        width = float(text)
    except ValueError:
        return None
    if is_width(width):
        return width
    return None


def is_width(value: float) -> bool:
    """Return True for a number that can be the relative standard deviation of an EMA."""
    return _NARROWEST < value < WIDEST
