"""Widths of EMA snapshots, as recorded beside the weights or written in the names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

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
_SUFFIX = re.compile(r"\.[a-z]\w*$", re.IGNORECASE)


def find_width(metrics: Mapping[str, float], path: Location) -> float | None:
    """Find the relative standard deviation σ of an EMA snapshot.

    A number that the checkpoint records as ``sigma_rel``, ``ema_sigma`` or ``ema_std`` comes first,
    then the file's name, then the name of the directory. In names the number follows ``sigma`` or
    ``std``, or ends the file's name as in EDM2's ``network-snapshot-0000500-0.050.pkl``.

    Args:
        metrics: Recorded numbers by dotted name.
        path: Path of the checkpoint.

    Returns:
        The width as a fraction of the training until the snapshot; None if there is none.
    """
    for name in _NAMES:
        for recorded, value in metrics.items():
            if recorded.rpartition(".")[2] == name and is_width(value):
                return value
    stem = _SUFFIX.sub("", path.name)
    for text in (stem, path.parent.name):
        match = _NAMED.search(text)
        if match is None and text == stem:
            match = _AT_END.search(text)
        if match is not None and is_width(float(match[1])):
            return float(match[1])
    return None


def is_width(value: float) -> bool:
    """Return True for a number that can be the relative standard deviation of an EMA."""
    return _NARROWEST < value < WIDEST
