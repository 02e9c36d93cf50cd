"""Values of schemes' options, read from text."""

from __future__ import annotations

import math

from ckptavg.averaging.schemes.scheme import Options
from ckptavg.errors import UsageError
from ckptavg.runs.window import is_share, parse_share


def require(kind: str, options: Options, name: str) -> str:
    """Return the text of an option that a scheme cannot do without.

    Args:
        kind: Name of the scheme.
        options: Option → value.
        name: Name of the option.

    Raises:
        UsageError: The option is missing.
    """
    if not options.get(name):
        raise UsageError(f"{kind} is expected to have its {name}")
    return options[name]


def read_number(text: str) -> float:
    """Read a number; NaN, which no range holds, for a text that is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def read_fraction(kind: str, text: str) -> float:
    """Read a fraction of training, as ``0.1`` or ``10%``.

    Args:
        kind: The scheme with the option, as in ``ema:halflife=F``, for the message.
        text: The value, above 0 and at most 1.

    Raises:
        UsageError: The text is no such fraction.
    """
    if is_share(text):
        return float(parse_share(kind, text))
    fraction = read_number(text)
    if not 0 < fraction <= 1:
        raise UsageError(
            f"{kind} is expected to be a fraction of training, above 0 and at most 1, or a "
            f"percentage such as 10%, but got {text!r}"
        )
    return fraction
