"""Ensembles to compare with an average, by name: ``fge``, ``swag[:key=value,...]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptavg.averaging.swag.specification import NAME as SWAG
from ckptavg.averaging.swag.specification import Swag, parse_swag
from ckptavg.errors import UsageError, short
from ckptavg.errors.spelling import close_names, did_you_mean

if TYPE_CHECKING:
    from ckptavg.averaging.plan import Average
    from ckptavg.evaluation.candidates import Candidate

FGE = "fge"
_NAMES = (FGE, SWAG)


@dataclass(frozen=True)
class Ensembles:
    """Ensembles of a selection of checkpoints.

    Attributes:
        fge: True for the mean of the checkpoints' outputs (FGE, Garipov et al. 2018).
        swag: Options of each ensemble of samples from SWAG.
    """

    fge: bool = False
    swag: tuple[Swag, ...] = ()


def parse_ensembles(value: bool | str | Iterable[str]) -> Ensembles:
    """Parse the argument ``ensemble``.

    Args:
        value: True for ``fge``, False for none; or a name, or several.

    Raises:
        UsageError: A name or an option is unknown.
    """
    if isinstance(value, bool):
        return Ensembles(fge=value)
    texts = value
    if isinstance(value, str):
        texts = [value]
    if not isinstance(texts, Iterable) or not all(isinstance(text, str) for text in texts):
        raise UsageError(
            "ensemble is expected to be True, fge, swag or swag:key=value but is "
            f"{short(repr(value))}"
        )
    fge = False
    # A dict keeps the order, and an ensemble that is named twice counts once.
    swag: dict[Swag, None] = {}
    for text in texts:
        name, _, options = text.strip().partition(":")
        if name == FGE and not options:
            fge = True
        elif name == SWAG:
            swag[parse_swag(text)] = None
        else:
            raise _unknown(text, name)
    return Ensembles(fge, tuple(swag))


def _unknown(text: str, name: str) -> UsageError:
    if name == FGE:
        return UsageError(f"fge has no options but got {text!r}")
    return UsageError(
        f"ensemble is expected to be fge or swag[:key=value,...] but got {text!r}",
        did_you_mean(close_names(name, _NAMES, 1)),
    )


def make_swag_candidates(
    mean: Average, options: Sequence[Swag], *, recompute: bool
) -> list[Candidate]:
    """Make the candidates that average the outputs of samples from SWAG.

    Args:
        mean: The uniform average of the checkpoints.
        options: Options of each candidate.
        recompute: True if there is training data to recompute BatchNorm statistics from.

    Raises:
        UsageError: The samples need BatchNorm statistics and there is no training data.
        RunError: There are fewer than two checkpoints.
    """
    from ckptavg.evaluation.candidates import (  # noqa: PLC0415 - options are read without torch
        Candidate,
    )

    candidates = []
    for swag in options:
        candidate = Candidate.of_swag(
            mean, samples=swag.samples, rank=swag.rank, scale=swag.scale, seed=swag.seed
        )
        if candidate.recompute and not recompute:
            raise UsageError(
                "recomputing the BatchNorm statistics of swag's samples needs training data "
                "(`train_data`)"
            )
        candidates.append(candidate)
    return candidates
