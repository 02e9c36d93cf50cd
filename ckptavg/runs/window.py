"""Windows at the end of a training, as shares of the steps: the last 10 %."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from ckptavg.errors import UsageError

Steps = Sequence[float | None]

_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*%\s*")
_LONGEST_TEXT = 20


def is_share(text: object) -> bool:
    """Return True for a text that ends in a percent sign, whatever stands before it."""
    return isinstance(text, str) and text.rstrip().endswith("%")


def parse_share(name: str, text: str) -> Fraction:
    """Parse a share of training, such as ``10%``.

    Args:
        name: Name of the argument, for the message.
        text: Percentage above 0, at most 100.

    Returns:
        The share, exact, at most 1.

    Raises:
        UsageError: The text is no such percentage.
    """
    match = _PERCENT.fullmatch(text)
    share = Fraction(0)
    if match is not None and len(text) <= _LONGEST_TEXT:
        share = Fraction(match[1]) / 100
    if not 0 < share <= 1:
        raise UsageError(
            f"{name} is expected to be above 0% and at most 100% of training but got {text!r}"
        )
    return share


def format_share(share: Fraction) -> str:
    """Format a share as a percentage."""
    return f"{float(share * 100):g}%"


def count_last(steps: Steps, share: Fraction) -> int:
    """Count the checkpoints that were saved within the last share of a training.

    Those are the checkpoints with a step above (1 − share) · last step, so that the last 10 % of
    the epochs 1 to 100 are the ten epochs 91 to 100. Where a step is not known, the share counts
    checkpoints, rounded to the nearest number.

    Args:
        steps: The checkpoints' positions in training, oldest first; None where unknown.
        share: Share of the training.

    Returns:
        A number of checkpoints, at least 1.
    """
    known = known_steps(steps)
    if not known:
        # Of halves the greater number is the nearest: round() would take the even one.
        return max(1, int(share * len(steps) + Fraction(1, 2)))
    start = window_start(known[-1], share)
    return max(1, sum(step > start for step in known))


def known_steps(steps: Steps) -> list[Fraction]:
    """Return the exact steps of a training; empty if a step is not known, or not finite."""
    known: list[Fraction] = []
    for step in steps:
        if step is None or not math.isfinite(step):
            return []
        known.append(Fraction(step))
    return known


def window_start(last: Fraction, share: Fraction) -> Fraction:
    """Compute the step at which the last share of a training begins, itself outside.

    Args:
        last: Last step of the training.
        share: Share of the training. The whole training begins before step 0.
    """
    if share == 1:
        return Fraction(-1)
    return (1 - share) * last


def note_positions(window: str, taken: int, count: int) -> str:
    """Word the note on a share that counts checkpoints, since a step is not known.

    Args:
        window: The window in words.
        taken: Number of checkpoints in the window.
        count: Number of all checkpoints.
    """
    return f"not every checkpoint has a step: {window} counts checkpoints, {taken} of {count}"
