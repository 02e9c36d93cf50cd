"""Options that say how checkpoints are averaged, and which of their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from ckptavg.averaging.planning.rules import OUTPUT_DTYPES
from ckptavg.averaging.schemes import SCHEMES
from ckptavg.cli.options.declare import bundle, option
from ckptavg.cli.options.param_types import numbers, scheme

if TYPE_CHECKING:
    from ckptavg.averaging.plan import Average
    from ckptavg.runs.run import Run

_HOW = "How they are weighted"
_WHAT = "What is averaged"
_KEY = "The entry that holds the weights, such as ema or state.model"


@dataclass(frozen=True)
class WeightingOptions:
    """Options that weight checkpoints.

    Attributes:
        scheme: Name of a scheme, with its options.
        weights: A number per checkpoint, in place of a scheme.
    """

    scheme: str
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class TensorOptions:
    """Options on the tensors of an average.

    Attributes:
        include: Patterns of the names of averaged tensors; empty for all.
        exclude: Patterns of names of tensors that are not averaged.
        base: Checkpoint of the tensors that are not averaged; None for the last.
        dtype: Type of averaged floats, or ``keep``.
        on_nonfinite: ``error`` or ``keep``.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    base: str | None
    dtype: str
    on_nonfinite: str

    @property
    def keep_nonfinite(self) -> bool:
        """True to write averages that are not finite."""
        return self.on_nonfinite == "keep"


def plan_selection(selection: Run, weighting: WeightingOptions, tensors: TensorOptions) -> Average:
    """Plan the average of a selection.

    Args:
        selection: Checkpoints to average.
        weighting: The scheme or the weights.
        tensors: Options on the tensors.

    Raises:
        CkptavgError: The checkpoints cannot be averaged in this way.
    """
    from ckptavg.averaging.plan import plan_average  # noqa: PLC0415 - help is shown without torch

    return plan_average(
        selection,
        weighting.scheme,
        weights=weighting.weights,
        include=tensors.include,
        exclude=tensors.exclude,
        base=tensors.base,
        dtype=tensors.dtype,
    )


weighting_options = bundle(
    "weighting", WeightingOptions,
    option(
        _HOW, "--scheme", metavar="NAME[:k=v,...]", default="uniform", show_default=True,
        type=scheme, common=True,
        values=[(kind.usage, kind.summary) for kind in SCHEMES.values()],
        help="How much each counts: one of the schemes below.",
    ),
    option(
        _HOW, "--weights", type=numbers, metavar="A,B,...",
        help="One number per checkpoint, in place of a scheme; they are divided by their sum.",
    ),
)  # fmt: skip
key_option = option(
    _WHAT, "--key", metavar="KEY", common=True, help=f"{_KEY}.  [default: found]"
)  # fmt: skip
keys_option = option(
    _WHAT, "--key", "keys", multiple=True, metavar="KEY", common=True,
    help=f"{_KEY}; may be repeated, to score several side by side.  [default: found]",
)  # fmt: skip
tensor_options = bundle(
    "tensors", TensorOptions,
    option(
        _WHAT, "--include", multiple=True, metavar="PATTERN",
        help="Average only tensors with matching names; may be repeated.  [default: all]",
    ),
    option(
        _WHAT, "--exclude", multiple=True, metavar="PATTERN",
        help="Do not average tensors with matching names; may be repeated.",
    ),
    option(
        _WHAT, "--base", metavar="CKPT",
        help="The checkpoint of the tensors that are not averaged.  [default: the last]",
    ),
    option(
        _WHAT, "--dtype", default="keep", show_default=True,
        type=click.Choice(OUTPUT_DTYPES),
        help="Type of the averaged floats.",
    ),
    option(
        _WHAT, "--on-nonfinite", type=click.Choice(["error", "keep"]), default="error",
        show_default=True, help="What to do if an average has NaN or inf.",
    ),
)  # fmt: skip
