"""Reasons for which paths are left out of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ckptavg.io.paths import Location


class Reason(Enum):
    """Reason for leaving a path out of a run, in words; ``{}`` stands for a detail."""

    AVERAGE = "an average that ckptavg wrote"
    DAMAGED = "cannot be opened, and is outside the selection"
    NAMED_AVERAGE = "an average already, by its name"
    NAMED_EMA = "an EMA copy, by its name"
    NAMED_INITIAL = "from before training, by its name"
    NO_MATCH = "does not match {}"
    NO_WEIGHTS = "{}"
    NOT_WEIGHTS = "not a model's weights"
    OWN_RUN = "a run of its own"
    PIPELINE = "a model of several directories, unlike its steps"
    REFRESHED = "a copy of {} with recomputed statistics"
    REPEATS = "repeats {}"
    REPLICA = "the same weights as those of the first rank"
    SKIPPED = "skipped, as asked for"
    SUFFIX = "its suffix is none of the default ones; name it, or match it by `glob`"
    TEMPORARY = "a temporary file, by its name"
    UNNUMBERED = "without a number, unlike its neighbours"
    WITHOUT_WEIGHTS = "holds no weights, unlike its neighbours"


@dataclass(frozen=True)
class LeftOut:
    """Path that is left out of a run.

    Attributes:
        path: The file or directory.
        reason: Reason for leaving out the path.
        detail: Words that complete the reason; empty where the reason needs none.
    """

    path: Location
    reason: Reason
    detail: str = ""

    @property
    def why(self) -> str:
        """Reason in words, with the detail."""
        return self.reason.value.format(self.detail)

    @property
    def note(self) -> str:
        """Note that tells the user about this path alone."""
        if self.reason is Reason.REPEATS:
            return f"{self.path} {self.why} and counts once"
        return f"{self.path} is left out: {self.why}"
