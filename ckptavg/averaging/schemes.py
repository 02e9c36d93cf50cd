"""Averaging schemes, which turn the steps of a run into coefficients."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ckptavg.errors import RunError, UsageError
from ckptavg.errors.spelling import close_names, did_you_mean

Steps = Sequence[float | None]
Coefficients = Callable[[Steps], list[float]]
Remark = Callable[[Sequence[float]], str]


@dataclass(frozen=True)
class Scheme:
    """An averaging method with options, ready to be applied to a run.

    Attributes:
        name: One of ``SCHEMES``, or ``weights``.
        text: The whole specification, as stored in the provenance.
    """

    name: str
    text: str
    _apply: Coefficients = field(repr=False, compare=False)
    _remark: Remark | None = field(default=None, repr=False, compare=False)

    def coefficients(self, steps: Steps) -> list[float]:
        """Compute the coefficients of a run.

        Args:
            steps: The checkpoints' positions in training, oldest first; None where unknown.

        Returns:
            One coefficient per checkpoint, oldest first. The sum is positive but need not be 1.

        Raises:
            RunError: The scheme needs steps that are not known, or another number of checkpoints.
        """
        if not steps:
            raise RunError("there is no checkpoint to average")
        coefficients = self._apply(steps)
        if not math.fsum(coefficients) > 0:
            raise RunError(f"the coefficients of {self.text} do not have a positive sum")
        return coefficients

    def note(self, coefficients: Sequence[float]) -> str:
        """Describe a surprising property of the scheme's coefficients; empty if there is none.

        Args:
            coefficients: One per checkpoint, oldest first.
        """
        if self._remark is None:
            return ""
        return self._remark(coefficients)


def parse(text: str) -> Scheme:
    """Parse the specification of a scheme, ``NAME[:key=value,...]``.

    ``uniform`` (SWA, Izmailov et al. 2018): equal coefficients. In the paper's Algorithm 1, the
    first model of the average is the start of the averaging phase. Here the selection decides that.

    ``ema:decay=D`` (Polyak averaging; also Lookahead's slow weights with α = 1 − D): an exponential
    moving average that starts at the first checkpoint. ``debias=true`` removes the extra weight of
    the first checkpoint. ``per=step`` applies the decay per training step, so that a larger gap
    between checkpoints decays more.

    ``linear`` (WMA): coefficients proportional to the position, 1, 2, 3, ...

    ``lawa:k=K`` (Kaddour 2022): equal coefficients for the last K checkpoints, 0 for all others.

    Raises:
        UsageError: The name, an option or a value is unknown.
    """
    if not isinstance(text, str):
        raise UsageError(f"scheme is expected to be a text, NAME:key=value, but got {text!r}")
    try:
        return _parse(text.strip())
    except UsageError as error:
        error.remedy = error.remedy or did_you_mean(_suggest(text))
        raise


def _parse(text: str) -> Scheme:
    name, _, option_text = text.partition(":")
    if name not in SCHEMES:
        raise UsageError(f"scheme is expected to be one of {', '.join(SCHEMES)} but got {name!r}")
    options = _parse_options(name, option_text)
    remark: Remark | None = None
    if name in _REMARKS:
        remark = _REMARKS[name](options)
    return Scheme(name, text, SCHEMES[name](options), remark)


def _suggest(text: str) -> list[str]:
    """Guess the specification that a user meant by a wrong text; empty without a guess."""
    start = _NAME.match(text)
    if start is None:
        return []
    word, remainder = start[1].lower(), text[start.end() :]
    name = _OTHER_NAMES.get(word) or _closest(word, SCHEMES, "")
    if not name:
        return []
    words = remainder.strip(" :=(),")
    options = _EXAMPLES[name]
    if words:
        options = [_correct_option(name, part) for part in re.split("[,;]", words)]
    suggestion = name
    if options:
        suggestion = f"{name}:{','.join(options)}"
    # Only a guess that parses is suggested.
    try:
        _parse(suggestion)
    except UsageError:
        return []
    return [suggestion]


def _closest(word: str, choices: Iterable[str], default: str) -> str:
    """Return the choice that is spelled most like a word; the default where none is close."""
    close = close_names(word, choices, 1)
    if close:
        return close[0]
    return default


def _correct_option(name: str, part: str) -> str:
    """Correct the spelling of a scheme's option. A number alone is for the first option."""
    option_names = _OPTIONS[name]
    words = [word for word in _SEPARATORS.split(part) if word]
    if not words or not option_names:
        return part
    key, value = words[0], " ".join(words[1:])
    if not value and _NUMBER.fullmatch(key):
        return f"{option_names[0]}={key}"
    fallback = key
    if len(option_names) == 1:
        fallback = option_names[0]
    key = _closest(key, option_names, fallback)
    choices = _CHOICES.get(key, (value,))
    if value not in choices:
        value = _OTHER_VALUES.get(value.lower()) or _closest(value, choices, value)
    return f"{key}={value}"


def from_weights(weights: Sequence[float]) -> Scheme:
    """Make a scheme that has a given weight for each checkpoint.

    Args:
        weights: Finite numbers with a finite sum above 0.

    Raises:
        UsageError: A weight is not a finite number, or the sum is not finite and above 0.
    """
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise UsageError(f"weights are expected to be numbers but got {weights!r}") from error
    text = ",".join(f"{weight:g}" for weight in weights)
    if not weights or not all(map(math.isfinite, weights)):
        raise UsageError(f"weights are expected to be finite but got {text}")
    if not 0 < sum(weights) < math.inf:
        raise UsageError(f"weights are expected to have a finite sum above 0 but got {text}")
    # Where products could overflow, weights are scaled by a power of two, which keeps the ratios.
    exponent = max(0, math.frexp(max(map(abs, weights)))[1] - 100)
    coefficients = [math.ldexp(weight, -exponent) for weight in weights]

    def apply(steps: Steps) -> list[float]:
        """Return the scaled weights, if their number is that of the checkpoints."""
        if len(steps) != len(weights):
            raise RunError(
                f"{len(weights)} weights are given for {len(steps)} checkpoints",
                "Give one weight per checkpoint, in the run's order.",
            )
        return list(coefficients)

    return Scheme("weights", f"weights:{text}", apply)


def normalize(coefficients: Sequence[float]) -> list[float]:
    """Divide coefficients by the sum of all coefficients."""
    total = math.fsum(coefficients)
    return [coefficient / total for coefficient in coefficients]


def _parse_options(name: str, text: str) -> dict[str, str]:
    """Parse the options of a scheme, ``key=value,...``."""
    option_names = _OPTIONS[name]
    options: dict[str, str] = {}
    for part in text.split(","):
        stripped = part.strip()
        if not stripped:
            continue
        key, separator, value = stripped.partition("=")
        if key not in option_names or not separator or key in options:
            expected = ", ".join(f"{option}=..." for option in option_names) or "none"
            raise UsageError(
                f"the options of {name} are expected to be {expected} but got {stripped!r}"
            )
        options[key] = value
    return options


def _uniform(_: Mapping[str, str]) -> Coefficients:
    return lambda steps: [1.0] * len(steps)


def _linear(_: Mapping[str, str]) -> Coefficients:
    return lambda steps: [float(i) for i in range(1, len(steps) + 1)]


def _lawa(options: Mapping[str, str]) -> Coefficients:
    text = options.get("k", "")
    # int() alone would also accept signs, spaces and underscores.
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"lawa:k=K is expected to have a positive integer K but got {text!r}")
    k = int(text)
    return lambda steps: [float(i >= len(steps) - k) for i in range(len(steps))]


def _ema(options: Mapping[str, str]) -> Coefficients:
    if "decay" not in options:
        raise UsageError("ema is expected to have its decay")
    decay = _decay(options["decay"])
    debias = _choice("debias", options.get("debias", "false")) == "true"
    per_step = _choice("per", options.get("per", "checkpoint")) == "step"

    def apply(steps: Steps) -> list[float]:
        """Return the coefficients of the moving average at the last checkpoint."""
        times = [float(position) for position in range(len(steps))]
        if per_step:
            times = _require_increasing(steps)
        ages = [decay ** (times[-1] - time) for time in times]
        # The coefficients are normalized later, so that decay^age is the debiased average.
        if debias:
            return ages
        # Each update over a gap g multiplies the average by D^g and adds 1 − D^g of the weights.
        coefficients = [ages[0]]
        for (before, time), age in zip(pairwise(times), ages[1:], strict=True):
            coefficients.append(age * (1 - decay ** (time - before)))
        return coefficients

    return apply


def _decay(text: str) -> float:
    try:
        decay = float(text)
    except ValueError:
        # NaN fails the check below, which has the message.
        decay = math.nan
    if not 0 <= decay < 1:
        raise UsageError(f"ema:decay=D is expected to have 0 <= D < 1 but got {text!r}")
    return decay


def _choice(name: str, value: str) -> str:
    choices = _CHOICES[name]
    if value not in choices:
        raise UsageError(f"{name} is expected to be one of {', '.join(choices)} but got {value!r}")
    return value


def _remark_on_seed(options: Mapping[str, str]) -> Remark:
    """Make a remark for averages in which the first checkpoint, the seed, weighs most."""

    def remark(coefficients: Sequence[float]) -> str:
        """Return the remark; empty where another checkpoint weighs more."""
        first, *later = coefficients
        if options.get("debias") == "true" or not later or first <= max(later):
            return ""
        return (
            f"the oldest of {len(coefficients)} checkpoints weighs most "
            f"({first / math.fsum(coefficients):.2g}), as ema is seeded with it: debias=true gives "
            "more to the later ones"
        )

    return remark


def _remark_on_few(options: Mapping[str, str]) -> Remark:
    """Make a remark for windows that are longer than the run."""

    def remark(coefficients: Sequence[float]) -> str:
        """Return the remark; empty where the run is long enough."""
        count = len(coefficients)
        if count >= int(options["k"]):
            return ""
        are = "is" if count == 1 else "are"
        return f"lawa takes the last {options['k']}, and there {are} only {count}"

    return remark


def _require_increasing(steps: Steps) -> list[float]:
    """Return the steps of a run, each of which must be known and greater than the one before.

    Raises:
        RunError: A step is unknown or not greater.
    """
    # Between equal steps the decay is 1, so that the later checkpoint would get the coefficient 0.
    known_steps = [step for step in steps if step is not None]
    if len(known_steps) < len(steps) or any(b <= a for a, b in pairwise(known_steps)):
        raise RunError(
            "per=step needs a step for every checkpoint, each greater than the one before",
            "`ckptavg inspect` shows the steps; leave per=step out to decay per checkpoint.",
        )
    return known_steps


SCHEMES: dict[str, Callable[[Mapping[str, str]], Coefficients]] = {
    "uniform": _uniform,
    "ema": _ema,
    "linear": _linear,
    "lawa": _lawa,
}
_OPTIONS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "ema": ("decay", "debias", "per"),
    "linear": (),
    "lawa": ("k",),
}
_CHOICES = {"debias": ("true", "false"), "per": ("checkpoint", "step")}
_REMARKS: dict[str, Callable[[Mapping[str, str]], Remark]] = {
    "ema": _remark_on_seed,
    "lawa": _remark_on_few,
}
# Words for the schemes and values in papers and other tools.
_OTHER_NAMES = {
    "arithmetic": "uniform", "average": "uniform", "avg": "uniform", "equal": "uniform",
    "mean": "uniform", "plain": "uniform", "simple": "uniform", "sma": "uniform",
    "soup": "uniform", "swa": "uniform", "last": "lawa", "latest": "lawa", "lwma": "linear",
    "wma": "linear", "exponential": "ema", "ewa": "ema", "ewma": "ema", "pma": "ema",
    "polyak": "ema",
}  # fmt: skip
_OTHER_VALUES = {
    "1": "true", "on": "true", "yes": "true", "0": "false", "no": "false", "off": "false",
    "": "true",
}  # fmt: skip
_EXAMPLES: dict[str, list[str]] = {
    "uniform": [],
    "ema": ["decay=0.9"],
    "linear": [],
    "lawa": ["k=5"],
}
_NAME = re.compile(r"\s*([A-Za-z]+)")
_SEPARATORS = re.compile(r"[\s:=()]+|^[-_]")
_NUMBER = re.compile(r"\.?\d[\d.]*(e-?\d+)?")
