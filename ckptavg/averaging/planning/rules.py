"""The rules by which tensors are averaged, and the type of the output's floats."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from ckptavg.errors import UsageError
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


def keeps_nonfinite(choice: str) -> bool:
    """Return True if the choice ``on_nonfinite`` is to write averages that are not finite.

    Raises:
        UsageError: The choice is neither ``error`` nor ``keep``.
    """
    if choice not in ("error", "keep"):
        raise UsageError(f"on_nonfinite is expected to be error or keep but got {choice!r}")
    return choice == "keep"


def require_output(*, digests: bool) -> None:
    """Refuse digests for a result in memory, since digests are recorded in an output.

    Raises:
        UsageError: Digests are requested.
    """
    if digests:
        raise UsageError("digests are recorded in an output, and none is named", "Name one.")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
