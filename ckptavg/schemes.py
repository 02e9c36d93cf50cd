"""What turns the steps of a run into coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ckptavg.errors import RunError, UsageError

Steps = Sequence[float | None]


@dataclass(frozen=True)
class Scheme:
    """An averaging method: its name and options, ready to be applied to a run.

    Attributes:
        name: One of ``SCHEMES``, or ``weights``.
        text: The whole specification, as it goes into the provenance.
    """

    name: str
    text: str
    _apply: Callable[[Steps], list[float]] = field(repr=False, compare=False)

    def coefficients(self, steps: Steps) -> list[float]:
        """One coefficient a checkpoint, oldest first; their sum is positive but need not be 1.

        Args:
            steps: The checkpoints' positions in training, None where unknown.

        Raises:
            RunError: The scheme needs steps that are not known, or another number of checkpoints.
        """
        if not steps:
            raise RunError("there is no checkpoint to average")
        found = self._apply(steps)
        if not math.fsum(found) > 0:
            raise RunError(f"the coefficients of {self.text} do not have a positive sum")
        return found


def parse(text: str) -> Scheme:
    """Read ``NAME[:key=value,...]``.

    ``uniform`` (SWA, Izmailov et al. 2018): every checkpoint alike. Algorithm 1 there counts the
    start of the averaging phase as the first model; here that is a matter of what is selected.

    ``ema:decay=D`` (Polyak averaging; also Lookahead's slow weights with α = 1 − D): seeded with
    the first checkpoint. ``debias=true`` drops the seed's extra weight, ``per=step`` lets the decay
    act per training step, so that uneven gaps count as they are.

    ``linear`` (WMA): growing with the position.

    ``lawa:k=K`` (Kaddour 2022): the last K alike.

    Raises:
        UsageError: The name, an option or a value is unknown.
    """
    name, _, rest = text.strip().partition(":")
    if name not in SCHEMES:
        raise UsageError(f"scheme is expected to be one of {', '.join(SCHEMES)} but got {name!r}")
    return Scheme(name, text.strip(), SCHEMES[name](_options(name, rest)))


def explicit(weights: Sequence[float]) -> Scheme:
    """The scheme of weights that were given one by one.

    Raises:
        UsageError: A weight is not finite, or they do not sum to more than 0.
    """
    try:
        weights = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise UsageError(f"weights are expected to be numbers but got {weights!r}") from error
    if not weights or not all(math.isfinite(w) for w in weights):
        raise UsageError(f"weights are expected to be finite but got {_listed(weights)}")
    if not 0 < sum(weights) < math.inf:
        raise UsageError(
            f"weights are expected to have a finite sum above 0 but got {_listed(weights)}"
        )

    def apply(steps: Steps) -> list[float]:
        if len(steps) != len(weights):
            raise RunError(
                f"{len(weights)} weights are given for {len(steps)} checkpoints",
                "Give one weight per checkpoint, in the run's order; --dry-run shows it.",
            )
        return [math.ldexp(w, -scale) for w in weights]

    # scaled by a power of two, which changes no ratio, where products could overflow
    scale = max(0, math.frexp(max(map(abs, weights)))[1] - 100)
    return Scheme("weights", f"weights:{_listed(weights)}", apply)


def normalized(coefficients: Sequence[float]) -> list[float]:
    """The coefficients divided by their sum."""
    total = math.fsum(coefficients)
    return [c / total for c in coefficients]


def _listed(weights: Sequence[float]) -> str:
    return ",".join(f"{w:g}" for w in weights)


def _options(name: str, text: str) -> dict[str, str]:
    known = _OPTIONS[name]
    options: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, separator, value = part.partition("=")
        if key not in known or not separator or key in options:
            expected = ", ".join(f"{k}=..." for k in known) or "none"
            raise UsageError(
                f"the options of {name} are expected to be {expected} but got {part!r}"
            )
        options[key] = value
    return options


def _uniform(_: Mapping[str, str]) -> Callable[[Steps], list[float]]:
    return lambda steps: [1.0] * len(steps)


def _linear(_: Mapping[str, str]) -> Callable[[Steps], list[float]]:
    return lambda steps: [float(i) for i in range(1, len(steps) + 1)]


def _lawa(options: Mapping[str, str]) -> Callable[[Steps], list[float]]:
    text = options.get("k", "")
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"lawa:k=K is expected to have a positive integer K but got {text!r}")
    k = int(text)
    return lambda steps: [float(i >= len(steps) - k) for i in range(len(steps))]


def _ema(options: Mapping[str, str]) -> Callable[[Steps], list[float]]:
    if "decay" not in options:
        raise UsageError("ema is expected to have its decay, as in ema:decay=0.9")
    decay = _decay(options["decay"])
    debias = _choice("debias", options.get("debias", "false"), ("true", "false")) == "true"
    per_step = _choice("per", options.get("per", "checkpoint"), ("checkpoint", "step")) == "step"

    def apply(steps: Steps) -> list[float]:
        times = _increasing(steps) if per_step else [float(i) for i in range(len(steps))]
        ages = [decay ** (times[-1] - t) for t in times]
        if debias:
            return ages
        gaps = [b - a for a, b in pairwise(times)]
        return [ages[0]] + [age * (1 - decay**gap) for age, gap in zip(ages[1:], gaps, strict=True)]

    return apply


def _decay(text: str) -> float:
    try:
        decay = float(text)
    except ValueError:
        decay = math.nan
    if not 0 <= decay < 1:
        raise UsageError(f"ema:decay=D is expected to have 0 <= D < 1 but got {text!r}")
    return decay


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UsageError(f"{name} is expected to be one of {', '.join(choices)} but got {value!r}")
    return value


def _increasing(steps: Steps) -> list[float]:
    known = [step for step in steps if step is not None]
    if len(known) < len(steps) or any(b <= a for a, b in pairwise(known)):
        raise RunError(
            "per=step needs a step for every checkpoint, each greater than the one before",
            "`ckptavg inspect` shows the steps; leave per=step out to decay per checkpoint.",
        )
    return known


SCHEMES: dict[str, Callable[[Mapping[str, str]], Callable[[Steps], list[float]]]] = {
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
