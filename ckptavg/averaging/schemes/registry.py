"""Registry of the schemes, and their specifications."""

from __future__ import annotations

from ckptavg.averaging.schemes import exponential, positional
from ckptavg.averaging.schemes.grafting import GRAFTING
from ckptavg.averaging.schemes.posthoc import POSTHOC_EMA
from ckptavg.averaging.schemes.power_function import POWER_EMA
from ckptavg.averaging.schemes.scheme import Scheme, SchemeKind
from ckptavg.averaging.schemes.softmax import SOFTMAX
from ckptavg.averaging.schemes.suggestions import suggest
from ckptavg.errors import UsageError
from ckptavg.errors.spelling import did_you_mean

SCHEMES: dict[str, SchemeKind] = {
    kind.name: kind
    for kind in (
        positional.UNIFORM,
        exponential.EMA,
        positional.LINEAR,
        positional.LAWA,
        positional.POLYNOMIAL,
        positional.WSM,
        exponential.PMA,
        exponential.LOOKAHEAD,
        POWER_EMA,
        POSTHOC_EMA,
        SOFTMAX,
        GRAFTING,
    )
}
"""Kinds of schemes by name, in the order of the help."""


def parse(text: str) -> Scheme:
    """Parse the specification of a scheme, ``NAME[:key=value,...]``.

    ``SCHEMES`` lists the names. ``uniform`` (SWA, Izmailov et al. 2018) has equal coefficients. In
    the paper's Algorithm 1, the first model of the average is the start of the averaging phase.
    Here the selection decides that.

    ``ema:decay=D`` starts at the first checkpoint. ``debias=true`` removes the extra weight of the
    first checkpoint. ``per=step`` applies the decay per training step, so that a larger gap between
    checkpoints decays more, and ``halflife=F`` does so with a half-life that is a fraction of
    training.

    Raises:
        UsageError: The name, an option or a value is unknown.
    """
    if not isinstance(text, str):
        raise UsageError(f"scheme is expected to be a text, NAME:key=value, but got {text!r}")
    try:
        return _parse(text.strip())
    except UsageError as error:
        error.remedy = error.remedy or did_you_mean(suggest(text, SCHEMES, _parse))
        raise


def _parse(text: str) -> Scheme:
    name, _, option_text = text.partition(":")
    if name not in SCHEMES:
        raise UsageError(f"scheme is expected to be one of {', '.join(SCHEMES)} but got {name!r}")
    kind = SCHEMES[name]
    return kind.choose(_parse_options(kind, option_text), text)


def _parse_options(kind: SchemeKind, text: str) -> dict[str, str]:
    """Parse the options of a scheme, ``key=value,...``."""
    options: dict[str, str] = {}
    for part in text.split(","):
        stripped = part.strip()
        if not stripped:
            continue
        key, separator, value = stripped.partition("=")
        if key not in kind.options or not separator or key in options:
            expected = ", ".join(f"{option}=..." for option in kind.options) or "none"
            raise UsageError(
                f"the options of {kind.name} are expected to be {expected} but got {stripped!r}"
            )
        options[key] = value
    return options
