"""Power-function EMA, whose width grows with training (Karras et al. 2024)."""

from __future__ import annotations

from ckptavg.averaging.schemes.options import read_number, require
from ckptavg.averaging.schemes.run_record import RunRecord, require_increasing
from ckptavg.averaging.schemes.scheme import Coefficients, Options, SchemeKind, remark_on_one
from ckptavg.errors import RunError, UsageError
from ckptavg.formats.snapshot_widths import is_width


def exponent_of(sigma: float) -> float:
    """Compute the exponent γ of the power function t^γ with a relative standard deviation σ.

    It is the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + (12 − σ⁻²), from σ² = (γ + 1) / ((γ + 2)²
    (γ + 3)) (Karras et al. 2024, equation 126 and Algorithm 2).

    Args:
        sigma: Width as a fraction of training, below 1/√12.
    """
    # The cubic in u = σγ has coefficients that do not overflow, whatever σ. It is convex and
    # positive at u = 1, so that Newton's method falls onto the root and stops there.
    root, step = 1.0, 1.0
    while step > 0:
        value = ((root + 7 * sigma) * root + 16 * sigma**2 - 1) * root + 12 * sigma**3 - sigma
        slope = (3 * root + 14 * sigma) * root + 16 * sigma**2 - 1
        step = value / slope
        if root - step == root:
            break
        root -= step
    return root / sigma


def parse_sigma(kind: str, text: str) -> float:
    """Parse a relative standard deviation.

    Args:
        kind: The scheme with the option, as in ``power-ema:sigma=S``, for the message.
        text: The value.

    Raises:
        UsageError: The text is no number above 0 and below 1/√12.
    """
    sigma = read_number(text)
    if not is_width(sigma):
        raise UsageError(
            f"{kind} is expected to be above 0 and below 0.2887, which is 1/sqrt(12), the width of "
            f"a uniform average, but got {text!r}"
        )
    return sigma


def _power_ema(options: Options) -> Coefficients:
    """Make the coefficients of a power-function EMA at the last checkpoint.

    Weights of training are proportional to t^γ over the steps from 0 to tₙ. Each checkpoint stands
    for the steps since the one before: cᵢ = (tᵢ/tₙ)^(γ+1) − (tᵢ₋₁/tₙ)^(γ+1) with t₀ = 0 (Karras et
    al. 2024, equation 121, integrated).
    """
    power = (
        exponent_of(parse_sigma("power-ema:sigma=S", require("power-ema", options, "sigma"))) + 1
    )

    def apply(record: RunRecord) -> list[float]:
        """Return the differences of the power function at neighbouring checkpoints."""
        steps = require_increasing(record, "power-ema", "ema:decay=0.9 works without steps.")
        if steps[0] < 0 or not steps[-1] > 0:
            raise RunError(f"power-ema needs steps from 0 on but got {steps[0]:g} to {steps[-1]:g}")
        coefficients: list[float] = []
        before = 0.0
        for step in steps:
            reached = (step / steps[-1]) ** power
            coefficients.append(reached - before)
            before = reached
        return coefficients

    return apply


POWER_EMA = SchemeKind(
    "power-ema", "power-ema:sigma=S", "of width S < 0.2887 (Karras et al. 2024)", _power_ema,
    ("sigma",), example=("sigma=0.1",),
    make_remark=lambda _: remark_on_one("power-ema", "a larger sigma gives more to the others"),
    other_names=("power", "edm", "karras", "powerema"),
)  # fmt: skip
