"""Options of SWAG: ``swag:samples=20,rank=10,scale=0.5,seed=0``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckptavg.errors import UsageError
from ckptavg.errors.spelling import close_names, did_you_mean

NAME = "swag"
# Factor of the covariance in the paper, for the diagonal and the low-rank part together.
_PAPER_SCALE = 0.5
# Factor of the diagonal alone, SWAG-Diagonal.
_DIAGONAL_SCALE = 1.0


@dataclass(frozen=True)
class Swag:
    """Sampling from SWAG, the Gaussian of Maddox et al. 2019, after the training.

    The mean is the plain average of n checkpoints θ₁ ... θₙ. The covariance is
    scale · (diag + DᵀD / (K − 1)), with scale = ½ in the paper (section 3.3). diag is the variance
    of each weight over all checkpoints, the mean of squares less the square of the mean. The K rows
    of D are θᵢ less the mean of θ₁ ... θᵢ, for the last K checkpoints.

    Attributes:
        samples: Number of samples.
        rank: Largest K. Fewer checkpoints give K = n. 0 leaves out D (SWAG-Diagonal).
        scale: Factor of the covariance. None for 0.5; for 1 where the rank is 0.
        seed: Seed of the samples.

    Raises:
        UsageError: An option has a value that cannot be meant.
    """

    samples: int = 20
    rank: int = 10
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("rank", 0), ("seed", 0)):
            value = getattr(self, name)
            # A bool is an int too.
            if type(value) is not int or value < least:
                raise UsageError(
                    f"{name} of swag is expected to be a whole number from {least} on but is "
                    f"{value!r}"
                )
        if self.rank == 1:
            raise UsageError(
                "rank of swag is expected to be 2 or more but is 1: a covariance needs two columns",
                "rank=0 samples from the diagonal alone.",
            )
        scale = self.scale
        is_number = isinstance(scale, (int, float)) and math.isfinite(scale) and scale >= 0
        if scale is not None and not is_number:
            raise UsageError(f"scale of swag is expected to be 0 or more but is {scale!r}")

    @property
    def covariance_scale(self) -> float:
        """Factor of the covariance."""
        if self.scale is not None:
            return float(self.scale)
        if self.rank:
            return _PAPER_SCALE
        return _DIAGONAL_SCALE

    @property
    def title(self) -> str:
        """Name of the ensemble: the number of samples, and options that are not the default."""
        options = []
        if self.rank != Swag.rank:
            options.append(f"rank {self.rank}")
        if self.scale is not None:
            options.append(f"scale {self.scale:g}")
        if self.seed != Swag.seed:
            options.append(f"seed {self.seed}")
        if not options:
            return f"SWAG ensemble of {self.samples}"
        return f"SWAG ensemble of {self.samples} ({', '.join(options)})"

    def columns(self, checkpoints: int) -> int:
        """Return K, the number of deviations in the low-rank part.

        Args:
            checkpoints: Number of checkpoints.
        """
        return min(self.rank, checkpoints)

    def describe(self, checkpoints: int) -> dict[str, Any]:
        """Return the options as plain values for JSON.

        Args:
            checkpoints: Number of checkpoints.
        """
        return {
            "samples": self.samples,
            "rank": self.rank,
            "columns": self.columns(checkpoints),
            "scale": self.covariance_scale,
            "seed": self.seed,
        }


def parse_swag(text: str) -> Swag:
    """Parse ``swag[:key=value,...]``.

    Raises:
        UsageError: An option or a value is unknown.
    """
    _, _, options = text.strip().partition(":")
    values: dict[str, Any] = {}
    for part in options.split(","):
        stripped = part.strip()
        if not stripped:
            continue
        key, separator, value = (piece.strip() for piece in stripped.partition("="))
        if key not in _OPTIONS or not separator or key in values:
            expected = ", ".join(f"{name}=..." for name in _OPTIONS)
            raise UsageError(
                f"the options of swag are expected to be {expected} but got {stripped!r}",
                _suggest(key, value, values),
            )
        values[key] = _convert(key, value)
    return Swag(**values)


def _suggest(key: str, value: str, given: dict[str, Any]) -> str:
    """Guess the option that was meant; empty without a guess."""
    if key in given:
        return f"Give {key} once."
    close = close_names(key, _OPTIONS, 1)
    return did_you_mean([f"{name}={value or '...'}" for name in close])


def _convert(key: str, value: str) -> int | float:
    try:
        return _OPTIONS[key](value)
    except ValueError:
        raise UsageError(f"{key} of swag is expected to be a number but got {value!r}") from None


def _parse_whole(text: str) -> int:
    # int() alone would also accept spaces and underscores.
    if not text.isdecimal():
        raise ValueError
    return int(text)


_OPTIONS: dict[str, Callable[[str], int | float]] = {
    "samples": _parse_whole,
    "rank": _parse_whole,
    "scale": float,
    "seed": _parse_whole,
}
