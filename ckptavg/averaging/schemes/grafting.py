"""Filter grafting: coefficients per layer, by the information in the weights of two networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ckptavg.averaging.schemes.options import read_number
from ckptavg.averaging.schemes.run_record import RunRecord
from ckptavg.averaging.schemes.scheme import Coefficients, Options, SchemeKind
from ckptavg.errors import RunError, UsageError

Measure = Literal["entropy", "l1"]
_MEASURES: dict[str, Measure] = {"entropy": "entropy", "l1": "l1"}


@dataclass(frozen=True)
class Grafting:
    """Filter grafting of one network into another (Meng et al. 2020, section 3.3).

    For every layer of network i and the same layer of network i − 1, the grafted weight is
    α Wᵢ + (1 − α) Wᵢ₋₁, with α = (A / π) arctan(c (Hᵢ − Hᵢ₋₁)) + ½. H is the information in the
    layer's weight: the entropy of its values over equal bins, or its L1 norm. So the network with
    more information in a layer gets up to ½ + A / 2 of that layer.

    Attributes:
        measure: ``entropy`` or ``l1``.
        a: A, from 0 to 1: how far the coefficients of layers may be from ½.
        c: How steeply the coefficients follow the difference of information.
        bins: Number of bins of the entropy.
    """

    measure: Measure = "entropy"
    a: float = 0.4
    c: float = 500.0
    bins: int = 10

    def coefficient(self, own: float, other: float) -> float:
        """Compute α, the coefficient of a network's layer (Meng et al. 2020, equation 5).

        Args:
            own: Information in the layer's weight.
            other: Information in the same weight of the network that is grafted into it.
        """
        return self.a / math.pi * math.atan(self.c * (own - other)) + 0.5


def parse_grafting(options: Options) -> Grafting:
    """Parse the options of grafting.

    Args:
        options: Option → value.

    Raises:
        UsageError: A value is wrong.
    """
    measure = _MEASURES[options.get("measure", "entropy")]
    if measure != "entropy" and "bins" in options:
        raise UsageError("grafting:bins belongs to measure=entropy, but the measure is l1")
    a = read_number(options.get("a", "0.4"))
    if not 0 <= a <= 1:
        raise UsageError(f"grafting:a=A is expected to have 0 <= A <= 1 but got {options['a']!r}")
    c = read_number(options.get("c", "500"))
    if not 0 <= c < math.inf:
        raise UsageError(f"grafting:c=C is expected to have 0 <= C < inf but got {options['c']!r}")
    bins = options.get("bins", "10")
    if not bins.isdecimal() or int(bins) < 2:
        raise UsageError(
            f"grafting:bins=N is expected to have a whole N from 2 on but got {bins!r}"
        )
    return Grafting(measure, a, c, int(bins))


def _grafting(options: Options) -> Coefficients:
    """Make the coefficients of a network and its predecessor, before the layers are measured.

    The networks stand in a cycle, and each network gets its predecessor grafted. The result stands
    for the last network, so only the last network and its predecessor count.
    """
    parse_grafting(options)

    def apply(record: RunRecord) -> list[float]:
        """Return ½ for the last network and its predecessor, and 0 for all others."""
        if len(record) < 2:
            raise RunError(
                "grafting needs two networks or more, and one is selected",
                "Name the paths of several.",
            )
        return [0.0] * (len(record) - 2) + [0.5, 0.5]

    return apply


GRAFTING = SchemeKind(
    "grafting", "grafting", "per layer of two networks (Meng et al. 2020)",
    _grafting, ("measure", "a", "c", "bins"), {"measure": tuple(_MEASURES)},
    make_grafting=parse_grafting, other_names=("graft", "filter-grafting"),
)  # fmt: skip
