"""Schemes by position in the run: uniform, linear, polynomial, the last k, merged decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

from ckptavg.averaging.schemes.options import read_number, require
from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import (
    Coefficients,
    Options,
    Remark,
    SchemeKind,
    remark_on_one,
)
from ckptavg.errors import UsageError
from ckptavg.runs.window import (
    count_last,
    format_share,
    is_share,
    known_steps,
    note_positions,
    parse_share,
)


def _uniform(_: Options) -> Coefficients:
    """Make equal coefficients: stochastic weight averaging (Izmailov et al. 2018, Algorithm 1)."""
    return lambda record: [1.0] * len(record)


def _linear(_: Options) -> Coefficients:
    """Make coefficients proportional to the position: the WMA of PMA (Li et al. 2025)."""
    return lambda record: [float(i) for i in range(1, len(record) + 1)]


def _polynomial(options: Options) -> Coefficients:
    """Make the coefficients of polynomial-decay averaging (Shamir & Zhang 2013, section 4).

    The running average is w̄ᵢ = (1 − (η+1)/(i+η)) w̄ᵢ₋₁ + (η+1)/(i+η) wᵢ, which gives wᵢ a weight
    that is proportional to Γ(i+η)/Γ(i), about i^η. It is uniform for η = 0, linear for η = 1.
    """
    text = require("polynomial", options, "eta")
    eta = read_number(text)
    if not 0 <= eta < math.inf:
        raise UsageError(f"polynomial:eta=E is expected to have 0 <= E < inf but got {text!r}")

    def apply(record: RunRecord) -> list[float]:
        """Return the products of the ratios c(i)/c(i+1) = i/(i+η), back from the last, 1."""
        # By ratios, since Γ itself overflows from about 171 on.
        coefficients = [1.0]
        for i in range(len(record) - 1, 0, -1):
            coefficients.append(coefficients[-1] * (i / (i + eta)))
        return coefficients[::-1]

    return apply


# Python reads no number of very many digits.
_MOST_DIGITS = 100
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: 1 - math.sqrt(x),
}


def _wsm(options: Options) -> Coefficients:
    """Make the coefficients of warmup-stable and merge (Tian et al. 2025).

    The average of n checkpoints stands for a decay of the learning rate over them: the update
    between checkpoints i and i + 1 gets the weight f(i/n) that the schedule would give it. Then the
    checkpoints have the differences 1 − f(1/n), ..., f(j/n) − f((j+1)/n), ..., f((n−1)/n).
    """
    shape = _SHAPES[require("wsm", options, "decay")]

    def apply(record: RunRecord) -> list[float]:
        """Return the differences of the decay at neighbouring checkpoints."""
        count = len(record)
        decay = [1.0, *(shape(i / count) for i in range(1, count)), 0.0]
        return [before - after for before, after in pairwise(decay)]

    return apply


def _lawa(options: Options) -> Coefficients:
    """Make the coefficients of latest weight averaging (Kaddour 2022), uniform over a window."""
    window = _parse_window(options.get("k", ""))

    def apply(record: RunRecord) -> list[float]:
        """Return 1 for the checkpoints in the window, else 0."""
        if isinstance(window, int):
            return _mark_last(len(record), window)
        marks: list[float] = []
        for steps in record.split_steps():
            marks += _mark_last(len(steps), count_last(steps, window))
        return marks

    return apply


def _parse_window(text: str) -> int | Fraction:
    """Parse the length of a window: a number of checkpoints, or a share of training."""
    if is_share(text):
        return parse_share("lawa:k=K", text)
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < 1:
        raise UsageError(
            "lawa:k=K is expected to have a positive integer K, or a share of training such as "
            f"10%, but got {text!r}"
        )
    return int(text)


def _mark_last(count: int, window: int) -> list[float]:
    """Return 0 for each of several checkpoints, and 1 for the last ones."""
    return [float(i >= count - window) for i in range(count)]


def _remark_on_window(options: Options) -> Remark:
    """Make a remark for windows longer than the run, and for shares where steps are unknown."""
    window = _parse_window(options.get("k", ""))
    if isinstance(window, int):
        return _remark_on_length(window)
    return _remark_on_share(window)


def _remark_on_length(window: int) -> Remark:
    def remark(_: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where the run is long enough."""
        count = len(coefficients)
        if count >= window:
            return ""
        are = "is" if count == 1 else "are"
        return f"lawa takes the last {window}, and there {are} only {count}"

    return remark


def _remark_on_share(share: Fraction) -> Remark:
    by_weight = remark_on_one("lawa", "a larger k takes more")

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where all steps are known, and the weight is shared."""
        if record.is_empty or all(known_steps(steps) for steps in record.split_steps()):
            return by_weight(record, coefficients)
        taken = sum(coefficient > 0 for coefficient in coefficients)
        return note_positions(f"lawa of {format_share(share)}", taken, len(coefficients))

    return remark


UNIFORM = SchemeKind(
    "uniform", "uniform", "equal weights: SWA (Izmailov et al. 2018)", _uniform,
    other_names=(
        "arithmetic", "average", "avg", "equal", "mean", "plain", "simple", "sma", "soup", "swa",
    ),
)  # fmt: skip
LINEAR = SchemeKind(
    "linear", "linear", "proportional to 1, 2, 3, ... (WMA)", _linear, other_names=("lwma", "wma")
)
POLYNOMIAL = SchemeKind(
    "polynomial", "polynomial:eta=E", "about i^E (Shamir & Zhang 2013)", _polynomial,
    ("eta",), example=("eta=3",),
    make_remark=lambda _: remark_on_one("polynomial", "a smaller eta gives more to the others"),
    other_names=("poly", "polynomial-decay", "pda"),
)  # fmt: skip
LAWA = SchemeKind(
    "lawa", "lawa:k=K", "equal on the last K, or k=10% (Kaddour 2022)", _lawa,
    ("k",), example=("k=5",), make_remark=_remark_on_window, other_names=("last", "latest"),
)  # fmt: skip
WSM = SchemeKind(
    "wsm", "wsm:decay=SHAPE", "linear, cosine or sqrt (Tian et al. 2025)", _wsm,
    ("decay",), {"decay": tuple(_SHAPES)}, ("decay=cosine",),
)  # fmt: skip
