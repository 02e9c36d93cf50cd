"""The rules by which tensors are averaged, and the type of the output's floats."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptavg.errors import UsageError
from ckptavg.errors.spelling import close_patterns, did_you_mean
from ckptavg.formats import Checkpoint

OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Rules:
    """The selection of the tensors to average, and the type of the output's floats.

    Attributes:
        include: Shell patterns of the names to average; all where empty.
        exclude: Shell patterns of the names not to average. They win over ``include``.
        base: The checkpoint that the other tensors come from; the last one where None.
        dtype: One of ``OUTPUT_DTYPES``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    base: Checkpoint | None = None
    dtype: str = "keep"

    def __post_init__(self) -> None:
        if self.dtype not in OUTPUT_DTYPES:
            expected = ", ".join(OUTPUT_DTYPES)
            raise UsageError(f"dtype is expected to be one of {expected} but got {self.dtype!r}")

    def averages(self, name: str) -> bool:
        """Return True if the rules select a tensor name for averaging."""
        included = not self.include or _matches(name, self.include)
        return included and not _matches(name, self.exclude)


def parse_on_nonfinite(choice: str) -> bool:
    """Parse the argument ``on_nonfinite``: True if averages that are not finite are written.

    Raises:
        UsageError: The choice is neither ``error`` nor ``keep``.
    """
    if choice not in ("error", "keep"):
        raise UsageError(f"on_nonfinite is expected to be error or keep but got {choice!r}")
    return choice == "keep"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # Not fnmatch.fnmatch, which ignores case on Windows.
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _all_names(checkpoint: Checkpoint) -> list[str]:
    """List the names of a checkpoint's tensors, refused tensors last."""
    return [*checkpoint.tensors, *checkpoint.refused]


def select_names(last: Checkpoint, rules: Rules) -> list[str]:
    """List the names of the tensors to average.

    Raises:
        UsageError: The patterns leave nothing to average.
    """
    all_names = _all_names(last)
    names = [name for name in all_names if rules.averages(name)]
    if not names:
        raise UsageError(
            f"the include and exclude patterns leave no tensor of {last.path} to average",
            did_you_mean(_suggest_patterns(rules, all_names)),
        )
    return names


def note_idle_patterns(last: Checkpoint, rules: Rules) -> list[str]:
    """Make a note per pattern that matches no tensor: mistyped, or meant for files."""
    names = _all_names(last)
    notes: list[str] = []
    for pattern in _idle_patterns(rules, names):
        remedy = " (`glob` selects files)"
        if close := close_patterns(pattern, sorted(names)):
            remedy = f". {did_you_mean(close)}"
        notes.append(f"the pattern {pattern!r} matches no tensor{remedy}")
    return notes


def _suggest_patterns(rules: Rules, names: Sequence[str]) -> list[str]:
    """List similar patterns that match tensors, for each pattern that matches no tensor."""
    suggestions: list[str] = []
    for pattern in _idle_patterns(rules, names):
        suggestions += close_patterns(pattern, sorted(names))
    return suggestions


def _idle_patterns(rules: Rules, names: Sequence[str]) -> list[str]:
    """List the patterns that match no name."""
    idle: list[str] = []
    for pattern in (*rules.include, *rules.exclude):
        if not any(_matches(name, (pattern,)) for name in names):
            idle.append(pattern)
    return idle
