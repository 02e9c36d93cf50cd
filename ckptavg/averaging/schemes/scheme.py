"""Schemes with chosen options, and the kinds of schemes that the registry lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptavg.averaging.schemes.run_record import RunRecord, Steps
from ckptavg.errors import RunError, UsageError

if TYPE_CHECKING:
    from ckptavg.averaging.schemes.grafting import Grafting

Options = Mapping[str, str]
Coefficients = Callable[[RunRecord], list[float]]
Remark = Callable[[RunRecord, Sequence[float]], str]

# Share of the weight above which an average is nearly a single checkpoint.
_ALMOST_ALL = 0.95


@dataclass(frozen=True)
class SchemeKind:
    """Averaging method of the registry, with options that are not chosen yet.

    Attributes:
        name: Name in specifications.
        usage: The specification's form, with a letter for each value.
        summary: Line of the help: the coefficients, and the source.
        make: Function that makes the coefficients' function of options, and refuses wrong ones.
        options: Names of the options; a number alone is meant for the first.
        choices: Option → the only values it takes.
        example: Options that make a good start, if the scheme needs any.
        make_remark: Function that makes the remark on surprising coefficients of options.
        other_names: Words for the scheme in papers and other tools, for suggestions.
        takes_series: True if a run may hold several checkpoints of each step.
        make_grafting: Function that parses the options of coefficients per layer; None for a scheme
            with the same coefficients for all layers.
    """

    name: str
    usage: str
    summary: str
    make: Callable[[Options], Coefficients]
    options: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    example: tuple[str, ...] = ()
    make_remark: Callable[[Options], Remark] | None = None
    other_names: tuple[str, ...] = ()
    takes_series: bool = False
    make_grafting: Callable[[Options], Grafting] | None = None

    def choose(self, options: Options, text: str) -> Scheme:
        """Make the scheme of chosen options.

        Args:
            options: Option → value.
            text: The whole specification.

        Raises:
            UsageError: A value of a closed set is unknown, another value is wrong, or an option is
                missing.
        """
        for name, choices in self.choices.items():
            if options.get(name, choices[0]) not in choices:
                raise UsageError(
                    f"{name} is expected to be one of {', '.join(choices)} but got "
                    f"{options[name]!r}"
                )
        remark: Remark | None = None
        if self.make_remark is not None:
            remark = self.make_remark(options)
        grafting: Grafting | None = None
        if self.make_grafting is not None:
            grafting = self.make_grafting(options)
        return Scheme(self.name, text, self.make(options), remark, self.takes_series, grafting)


@dataclass(frozen=True)
class Scheme:
    """An averaging method with options, ready to be applied to a run.

    Attributes:
        name: One of ``SCHEMES``, or ``weights``.
        text: The whole specification, as stored in the provenance.
        takes_series: True if a run may hold several checkpoints of each step, as of several EMAs.
        grafting: Options of coefficients per layer; None for the same in all layers.
    """

    name: str
    text: str
    _apply: Coefficients = field(repr=False, compare=False)
    _remark: Remark | None = field(default=None, repr=False, compare=False)
    takes_series: bool = field(default=False, repr=False, compare=False)
    grafting: Grafting | None = field(default=None, repr=False)

    def coefficients(self, run: RunRecord | Steps) -> list[float]:
        """Compute the coefficients of a run.

        Args:
            run: Records of the checkpoints, oldest first. The steps alone do for schemes that need
                no more; None where a step is unknown.

        Returns:
            One coefficient per checkpoint, oldest first. The sum is positive but need not be 1.

        Raises:
            RunError: The run lacks records that the scheme needs, or has another number of
                checkpoints, or the coefficients have no positive sum.
        """
        record = _as_record(run)
        if not len(record):
            raise RunError("there is no checkpoint to average")
        coefficients = self._apply(record)
        if not math.fsum(coefficients) > 0:
            raise RunError(
                f"the coefficients of {self.text} do not have a positive sum for these checkpoints",
                "Choose other options, another scheme or other checkpoints.",
            )
        return coefficients

    def note(self, coefficients: Sequence[float], run: RunRecord | Steps | None = None) -> str:
        """Describe a surprising property of the scheme's coefficients; empty if there is none.

        Args:
            coefficients: One per checkpoint, oldest first.
            run: Records of the checkpoints, by which the note names them; None if not known.
        """
        if self._remark is None:
            return ""
        if run is None:
            run = [None] * len(coefficients)
        return self._remark(_as_record(run), coefficients)


def normalize(coefficients: Sequence[float]) -> list[float]:
    """Divide coefficients by the sum of all coefficients."""
    total = math.fsum(coefficients)
    return [coefficient / total for coefficient in coefficients]


def remark_on_one(name: str, advice: str) -> Remark:
    """Make a remark for averages in which one checkpoint has almost all of the weight.

    Args:
        name: Name of the scheme.
        advice: A way to give more weight to the other checkpoints, for the remark.
    """

    def remark(record: RunRecord, coefficients: Sequence[float]) -> str:
        """Return the remark; empty where the weight is shared."""
        shares = normalize(coefficients)
        position = max(range(len(shares)), key=shares.__getitem__)
        if len(shares) == 1 or shares[position] < _ALMOST_ALL:
            return ""
        return (
            f"{name} gives {_format_weight(shares[position])} of the weight to "
            f"{record.describe(position)}, so that the average is nearly that checkpoint: {advice}"
        )

    return remark


def _format_weight(share: float) -> str:
    """Format a share of the weight, which is 1 only if it is all."""
    if share >= 1:
        return "all"
    return f"{min(share, 0.9999):.4g}"


def _as_record(run: RunRecord | Steps) -> RunRecord:
    """Return the records of a run, which may be given by its steps alone."""
    if isinstance(run, RunRecord):
        return run
    return RunRecord(tuple(run))
