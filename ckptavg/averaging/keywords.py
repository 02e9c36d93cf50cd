"""Types of the keywords that overloads of public functions share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypedDict

from ckptavg.averaging.pipeline import RecomputeLike
from ckptavg.display.progress import ProgressLike
from ckptavg.formats import Checkpoint


class TensorRules(TypedDict):
    """Keywords of ``plan_average`` on the tensors of an average."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    base: str | os.PathLike[str] | Checkpoint | None
    dtype: str


class ManyOptions(TypedDict, total=False):
    """Keywords of ``average_many`` that do not decide the type of the result."""

    include: str | Sequence[str]
    exclude: str | Sequence[str]
    base: str | os.PathLike[str] | Checkpoint | None
    dtype: str
    overwrite: bool
    on_nonfinite: str
    digests: bool
    recompute: RecomputeLike | None
    progress: ProgressLike


class AverageOptions(ManyOptions, total=False):
    """Keywords of ``average`` that do not decide the type of the result."""

    weights: Sequence[float] | None
