"""Keywords that public functions share, for the type checker's sake."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

from ckptavg.display.progress import ProgressLike
from ckptavg.formats import Checkpoint


class ManyOptions(TypedDict, total=False):
    """Keywords of ``average_many`` that do not decide what it returns."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    base: str | os.PathLike[str] | Checkpoint | None
    dtype: str
    overwrite: bool
    on_nonfinite: str
    digests: bool
    progress: ProgressLike


class AverageOptions(ManyOptions, total=False):
    """Keywords of ``average`` that do not decide what it returns."""

    weights: Sequence[float] | None
