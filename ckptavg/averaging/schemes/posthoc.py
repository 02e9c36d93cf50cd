"""Post-hoc EMA: the EMA of any width from snapshots of other EMAs (Karras et al. 2024)."""

from __future__ import annotations

import decimal
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby

from ckptavg.averaging.schemes.options import require
from ckptavg.averaging.schemes.power_function import exponent_of, parse_sigma
from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import Coefficients, Options, Remark, SchemeKind, normalize
from ckptavg.errors import RunError

# The Gram matrix of many snapshots is too ill-conditioned for float64. Decimals of twice as many
# digits also give the same bits on every machine, which linear algebra libraries do not.
_CONTEXT = decimal.Context(prec=34)
# Relative error of the reconstructed weights over training from which on a note tells the error.
_POOR_FIT = 0.1
# Sum of the absolute weights from which the rounding of the snapshots is amplified noticeably.
_AMPLIFIED = 2.0


@dataclass(frozen=True)
class _Profile:
    """Weights of an EMA over training: (γ + 1) t^γ / T^(γ + 1) from step 0 to T.

    Attributes:
        step: The last step T.
        exponent: The exponent γ.
        log: Natural logarithm of T.
    """

    step: Decimal
    exponent: Decimal
    log: Decimal

    @classmethod
    def of_snapshot(cls, step: Decimal, sigma: float) -> _Profile:
        """Make the weights of an EMA with a relative standard deviation, at a step."""
        return cls(step, Decimal(exponent_of(sigma)), step.ln())

    def correlate(self, other: _Profile) -> Decimal:
        """Compute the inner product with other weights (Karras et al. 2024, equation 151)."""
        earlier, later = self, other
        if other.step < self.step:
            earlier, later = other, self
        # The power (earlier step / later step)^γ by logarithms, which are computed once.
        power = (later.exponent * (earlier.log - later.log)).exp()
        numerator = (self.exponent + 1) * (other.exponent + 1) * power
        return numerator / ((self.exponent + other.exponent + 1) * later.step)


def _posthoc_ema(options: Options) -> Coefficients:
    """Make the coefficients of the combination that is nearest to an EMA of another width.

    They are the least-squares solution x of A x = b with the inner products A of the snapshots'
    weights over training and b with those of the target, at the last snapshot's step (Karras et
    al. 2024, Algorithm 3). The engine divides by their sum. Some are negative.
    """
    target = parse_sigma("posthoc-ema:sigma=S", require("posthoc-ema", options, "sigma"))
    widths = _parse_widths(options)

    def apply(record: RunRecord) -> list[float]:
        """Return the solution of the linear system."""
        with decimal.localcontext(_CONTEXT):
            profiles = _list_profiles(record, widths)
            wanted = _target_profile(profiles, target)
            rows: list[list[Decimal]] = []
            for number, profile in enumerate(profiles):
                # The matrix is symmetric, so that its upper half is enough.
                rows.append([profile.correlate(other) for other in [*profiles[number:], wanted]])
            return [float(value) for value in _solve(rows)]

    return apply


def _parse_widths(options: Options) -> tuple[float, ...]:
    """Parse the widths that the user gives, ``0.05/0.10``; empty if none are given."""
    if "sigmas" not in options:
        return ()
    widths: list[float] = []
    for text in options["sigmas"].split("/"):
        widths.append(parse_sigma("posthoc-ema:sigmas=A/B, each of them,", text))
    return tuple(widths)


def _list_profiles(record: RunRecord, given: Sequence[float]) -> list[_Profile]:
    """Return the weights over training of each snapshot.

    Raises:
        RunError: A step or a width is not known, or two snapshots have the same of both.
    """
    profiles: list[_Profile] = []
    for position, width in enumerate(_assign_widths(record, given)):
        step = record.steps[position]
        if step is None or step <= 0:
            known, remedy = "none", "`ckptavg inspect` shows the steps."
            if step is not None:
                known, remedy = f"{step:g}", "Leave out the start with `.steps(1)`."
            raise RunError(
                f"posthoc-ema needs a step above 0 for every snapshot, and "
                f"{record.describe(position)} has {known}",
                remedy,
            )
        profile = _Profile.of_snapshot(Decimal(step), width)
        # Two equal rows would make the linear system singular.
        if profile in profiles:
            twin = record.describe(profiles.index(profile))
            raise RunError(
                f"{twin} and {record.describe(position)} have the same step {step:g} and the same "
                f"sigma {width:g}",
                "Average each snapshot once, or correct the sigmas.",
            )
        profiles.append(profile)
    return profiles


def _assign_widths(record: RunRecord, given: Sequence[float]) -> list[float]:
    """Return the width of each snapshot: as given, else as recorded or named.

    Raises:
        RunError: A width is not known, or another number of widths is given.
    """
    if given:
        return _spread_widths(record, given)
    widths: list[float] = []
    for position, recorded in enumerate(record.widths or [None] * len(record)):
        if recorded is None:
            raise RunError(
                f"the sigma of {record.describe(position)} is neither recorded nor in its name",
                "Add the sigmas to the scheme, one per run or one per snapshot of a step: "
                "sigmas=0.05/0.10.",
            )
        widths.append(recorded)
    return widths


def _spread_widths(record: RunRecord, given: Sequence[float]) -> list[float]:
    """Return the width of each snapshot, given one each, one per run or one per snapshot of a step.

    Raises:
        RunError: There is another number of widths.
    """
    if len(given) == len(record):
        return list(given)
    lengths = record.lengths or (len(record),)
    widths: list[float] = []
    if len(given) == len(lengths):
        for width, length in zip(given, lengths, strict=True):
            widths += [width] * length
        return widths
    # Snapshots of a step stand beside each other, in the order of their names.
    groups = [len(list(group)) for _, group in groupby(record.steps)]
    if set(groups) == {len(given)}:
        return [*given] * len(groups)
    raise RunError(
        f"{len(given)} sigmas are given for {len(record)} snapshots of {len(groups)} steps in "
        f"{len(lengths)} {_plural('run', len(lengths))}",
        "Give one per run, one per snapshot of a step or one per snapshot, in the run's order.",
    )


def _target_profile(profiles: Sequence[_Profile], sigma: float) -> _Profile:
    """Return the weights of the EMA to reconstruct, at the last snapshot's step."""
    return _Profile.of_snapshot(max(profile.step for profile in profiles), sigma)


def _solve(rows: list[list[Decimal]]) -> list[Decimal]:
    """Solve a symmetric positive definite linear system by Gaussian elimination.

    Args:
        rows: Row i of the n × n matrix from column i on, followed by the right-hand side. The
            rows are overwritten.

    Returns:
        The n unknowns.
    """
    # A positive definite matrix needs no exchange of rows, and stays symmetric.
    for number, pivot_row in enumerate(rows):
        for offset in range(1, len(rows) - number):
            factor = pivot_row[offset] / pivot_row[0]
            row, above = rows[number + offset], pivot_row[offset:]
            rows[number + offset] = [x - factor * y for x, y in zip(row, above, strict=True)]
    unknowns: list[Decimal] = []
    for first, *others, right in reversed(rows):
        known = sum(map(operator.mul, others, unknowns), Decimal(0))
        unknowns.insert(0, (right - known) / first)
    return unknowns


def _measure_misfit(
    profiles: Sequence[_Profile], target: _Profile, coefficients: Sequence[float]
) -> float:
    """Compute the relative distance of the reconstructed weights over training from the target's.

    This is ‖Σ xᵢ pᵢ / Σ xᵢ − p‖ / ‖p‖ for snapshots pᵢ and the target p.

    Args:
        profiles: The snapshots' weights over training.
        target: The target's weights over training.
        coefficients: The least-squares solution x, for which xᵀ A x = xᵀ b.
    """
    total = Decimal(math.fsum(coefficients))
    product = Decimal(0)
    for profile, coefficient in zip(profiles, coefficients, strict=True):
        product += Decimal(coefficient) * profile.correlate(target)
    norm = target.correlate(target)
    square = norm - (2 / total - 1 / total**2) * product
    # Rounding may leave the square of an exact fit a little below 0.
    return math.sqrt(max(square, Decimal(0)) / norm)


def _remark_on_fit(options: Options) -> Remark:
    """Make the remark on widths that were found, on a poor fit, and on amplified rounding."""
    given = _parse_widths(options)
    sigma = options.get("sigma", "")

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where the widths are given and the fit is good."""
        if record.is_empty:
            return ""
        remarks: list[str] = []
        if not given and any(record.widths):
            widths = sorted({width for width in record.widths if width is not None})
            listed = ", ".join(f"{width:g}" for width in widths)
            remarks.append(f"the sigmas of the snapshots, as recorded or named: {listed}")
        with decimal.localcontext(_CONTEXT):
            profiles = _list_profiles(record, given)
            target = _target_profile(profiles, float(sigma))
            misfit = _measure_misfit(profiles, target, coefficients)
        if misfit >= _POOR_FIT:
            remarks.append(
                f"the snapshots give an EMA of sigma {sigma} only to within {misfit:.0%}: more of "
                "them, or of sigmas on both sides, fit better"
            )
        if (size := math.fsum(map(abs, normalize(coefficients)))) >= _AMPLIFIED:
            remarks.append(
                f"the absolute coefficients add up to {size:.3g}, by which the rounding of the "
                "snapshots grows"
            )
        return "; ".join(remarks)

    return remark


def _plural(noun: str, count: int) -> str:
    if count == 1:
        return noun
    return f"{noun}s"


POSTHOC_EMA = SchemeKind(
    "posthoc-ema", "posthoc-ema:sigma=S", "that of EMA snapshots; sigmas=0.05/0.1",
    _posthoc_ema, ("sigma", "sigmas"), example=("sigma=0.1",), make_remark=_remark_on_fit,
    takes_series=True,
    other_names=("phema", "post-hoc-ema", "posthoc", "post-hoc"),
)  # fmt: skip
