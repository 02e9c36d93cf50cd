"""Which tensors are averaged, and what the output's floats are."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint

OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Rules:
    """Which tensors are averaged, and what the output's floats are.

    Attributes:
        include: Shell patterns of the names to average; all where empty.
        exclude: Shell patterns of the names not to.
        base: The checkpoint that the rest comes from; the last one where None.
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
        """Whether a tensor is averaged."""
        included = not self.include or _matches(name, self.include)
        return included and not _matches(name, self.exclude)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
