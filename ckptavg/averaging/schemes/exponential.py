"""Exponential moving averages: by a decay, a half-life, or the α of other papers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ckptavg.averaging.schemes.options import read_fraction, read_number
from ckptavg.averaging.schemes.run_record import RunRecord, require_increasing
from ckptavg.averaging.schemes.scheme import (
    Coefficients,
    Options,
    Remark,
    SchemeKind,
    remark_on_one,
)
from ckptavg.errors import RunError, UsageError

_HALF = math.log(2)


def _ema(options: Options) -> Coefficients:
    """Make the coefficients of an exponential moving average (Polyak & Juditsky 1992)."""
    debias = options.get("debias") == "true"
    if "halflife" in options:
        _check_halflife(options)
        return _decay_by_halflife(read_fraction("ema:halflife=F", options["halflife"]), debias)
    if "decay" not in options:
        raise UsageError("ema is expected to have its decay or its halflife")
    decay = _parse_decay(options["decay"])
    if options.get("per") == "step":
        return _decay_per_step(decay, debias)
    return _decay_per_checkpoint(decay, debias)


def _check_halflife(options: Options) -> None:
    """Refuse options that a half-life excludes."""
    if "decay" in options:
        raise UsageError("ema is expected to have its decay or its halflife but got both")
    if options.get("per", "step") != "step":
        raise UsageError(
            f"ema:halflife=F is expected to have per=step but got {options['per']!r}: a fraction "
            "of training is counted in steps"
        )


def _decay_per_checkpoint(decay: float, debias: bool) -> Coefficients:
    return lambda record: _decay_over([float(i) for i in range(len(record))], decay, debias)


def _decay_per_step(decay: float, debias: bool) -> Coefficients:
    def apply(record: RunRecord) -> list[float]:
        """Return the coefficients of the moving average at the last checkpoint."""
        steps = require_increasing(
            record, "per=step", "leave per=step out to decay per checkpoint."
        )
        return _decay_over(steps, decay, debias)

    return apply


def _decay_over(times: Sequence[float], decay: float, debias: bool) -> list[float]:
    """Compute the coefficients of a moving average at the last of some times.

    Args:
        times: Increasing times of the checkpoints.
        decay: Factor by which a checkpoint's weight falls per unit of time.
        debias: True for weights that only decay, without the first checkpoint's extra weight.
    """
    ages = [decay ** (times[-1] - time) for time in times]
    # The coefficients are normalized later, so that decay^age is the debiased average.
    if debias:
        return ages
    # Each update over a gap g multiplies the average by D^g and adds 1 − D^g of the weights.
    coefficients = [ages[0]]
    for (before, time), age in zip(pairwise(times), ages[1:], strict=True):
        coefficients.append(age * (1 - decay ** (time - before)))
    return coefficients


def _decay_by_halflife(fraction: float, debias: bool) -> Coefficients:
    """Make the coefficients of an average whose weights halve over a fraction of training.

    The training reaches from step 0 to the last checkpoint's step T. The decay per step is then
    2^(−1/(fraction · T)).
    """

    def apply(record: RunRecord) -> list[float]:
        """Return the coefficients of the moving average at the last checkpoint."""
        steps = require_increasing(
            record, "ema:halflife", "ema:decay=0.9 decays per checkpoint instead."
        )
        halflife = fraction * steps[-1]
        if not halflife > 0:
            raise RunError(f"ema:halflife needs a last step above 0, which is {steps[-1]:g}")
        ages = [2 ** -((steps[-1] - step) / halflife) for step in steps]
        if debias:
            return ages
        coefficients = [ages[0]]
        for (before, step), age in zip(pairwise(steps), ages[1:], strict=True):
            # 1 − 2^(−gap/halflife), which keeps its digits for gaps that are short beside it.
            coefficients.append(age * -math.expm1(-_HALF * (step - before) / halflife))
        return coefficients

    return apply


def _parse_decay(text: str) -> float:
    decay = read_number(text)
    if not 0 <= decay < 1:
        raise UsageError(f"ema:decay=D is expected to have 0 <= D < 1 but got {text!r}")
    return decay


def _by_alpha(name: str, options: Options) -> Coefficients:
    """Make the coefficients of the average M ← αθ + (1 − α)M, seeded with the first checkpoint."""
    text = options.get("alpha", "")
    alpha = read_number(text)
    if not 0 < alpha <= 1:
        raise UsageError(f"{name}:alpha=A is expected to have 0 < A <= 1 but got {text!r}")
    return _decay_per_checkpoint(1 - alpha, debias=False)


def _pma(options: Options) -> Coefficients:
    """Make the coefficients of the EMA form of pre-trained model averaging (Li et al. 2025)."""
    return _by_alpha("pma", options)


def _lookahead(options: Options) -> Coefficients:
    """Make the coefficients of Lookahead's slow weights (Zhang et al. 2019, Algorithm 1).

    The checkpoints are the fast weights at the ends of the inner loops. The first is the start φ₀,
    and each of the others moves the slow weights: φ ← φ + α(θ − φ).
    """
    return _by_alpha("lookahead", options)


def _remark_on_ema(options: Options) -> Remark:
    """Make the remark for averages that a single checkpoint dominates, the seed or a late one."""
    by_halflife = remark_on_one("ema", "a longer halflife gives more to the others")

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where no checkpoint weighs too much."""
        text = ""
        if options.get("debias") != "true":
            text = _remark_on_seed("ema", "debias=true gives more to the later ones", coefficients)
        if not text and "halflife" in options:
            return by_halflife(record, coefficients)
        return text

    return remark


def _remark_on_alpha(name: str) -> Remark:
    """Make the remark for averages by α that one checkpoint dominates."""
    by_share = remark_on_one(name, "a smaller alpha gives more to the others")
    advice = "a larger alpha gives more to the later ones"

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where no checkpoint weighs too much."""
        return _remark_on_seed(name, advice, coefficients) or by_share(record, coefficients)

    return remark


def _remark_on_seed(name: str, advice: str, coefficients: Sequence[float]) -> str:
    """Word the remark on a first checkpoint, the seed, that weighs most; empty where not."""
    first, *later = coefficients
    if not later or first <= max(later):
        return ""
    return (
        f"the oldest of {len(coefficients)} checkpoints weighs most "
        f"({first / math.fsum(coefficients):.2g}), as {name} is seeded with it: {advice}"
    )


EMA = SchemeKind(
    "ema", "ema:decay=D", "or halflife=10%; debias=true; per=step", _ema,
    ("decay", "halflife", "debias", "per"),
    {"debias": ("true", "false"), "per": ("checkpoint", "step")},
    ("decay=0.9",), _remark_on_ema, ("exponential", "ewa", "ewma", "polyak"),
)  # fmt: skip
PMA = SchemeKind(
    "pma", "pma:alpha=A", "EMA with decay 1 - A (Li et al. 2025)", _pma, ("alpha",),
    example=("alpha=0.2",), make_remark=lambda _: _remark_on_alpha("pma"),
)  # fmt: skip
LOOKAHEAD = SchemeKind(
    "lookahead", "lookahead:alpha=A", "slow weights (Zhang et al. 2019)", _lookahead, ("alpha",),
    example=("alpha=0.5",), make_remark=lambda _: _remark_on_alpha("lookahead"),
    other_names=("slow",),
)  # fmt: skip
