"""One tree of errors: each says what happened, knows its exit code and its remedy."""

from __future__ import annotations

import ckptavg.errors.notes  # noqa: F401 - whatever logs has these errors, too
from ckptavg.errors.printable import printable


class CkptavgError(Exception):
    """The work could not be done.

    Args:
        message: What happened and where, without a final full stop.
        remedy: What the user can do about it.

    Attributes:
        exit_code: The exit status of the command line for this error.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = printable(_without_traceback(message))
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        if not self.remedy:
            return self.message
        stop = "" if self.message.endswith((".", "?", "!")) else "."
        return f"{self.message}{stop} {self.remedy}"


class UsageError(CkptavgError, ValueError):
    """An argument that is wrong by itself, whatever the files hold."""

    exit_code = 2


class CheckpointError(CkptavgError):
    """A checkpoint that cannot be opened, or holds no weights that can be found."""


class NoWeightsError(CheckpointError):
    """A file that opens but is no checkpoint: an optimizer's state, a history."""


class PlacementError(CheckpointError):
    """Tensors that lie elsewhere in a remote file than its directory let expect."""


class RunError(CkptavgError):
    """No run, more than one, or a selection that it cannot fulfil."""


class MismatchError(CkptavgError):
    """Checkpoints that do not hold the same tensors."""


class UnsupportedTensorError(CkptavgError):
    """Tensors that have no meaningful average: float8, quantized, sparse."""


class NonFiniteError(CkptavgError):
    """An average that is not finite."""


class OutputError(CkptavgError):
    """An output that may not or could not be written."""


class IntegrityError(CkptavgError):
    """Contents that are not those that were recorded."""


class ProcessesError(CkptavgError):
    """Processes that cannot make one output together."""


class PeerError(ProcessesError):
    """Another of several processes has failed or died."""


class SpecError(CkptavgError):
    """A model or data specification that leads to nothing usable."""


class ModelError(CkptavgError):
    """Weights that do not fit the model."""


class BatchNormError(CkptavgError):
    """Statistics that cannot be recomputed."""


class EvaluationError(CkptavgError):
    """Candidates that cannot be scored on the data."""


class MissingPackageError(CkptavgError, ImportError):
    """A package that not everyone needs and that is not installed."""


class StaleStatisticsWarning(UserWarning):
    """BatchNorm statistics that are not those of the weights, as in an average as it is."""


def short(name: object) -> str:
    """A name for a message, whatever a file has as one and however long."""
    return printable(name[:200]) if isinstance(name, str) else f"a {type(name).__name__}"


def first_few(names: list[str], count: int = 3) -> str:
    """The first names of a list and how many more there are, for a one-line message."""
    shown = ", ".join(names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _without_traceback(message: str) -> str:
    """A message without the traceback that a DataLoader's worker puts in: what stands below it."""
    _, found, traceback = message.partition("\nOriginal Traceback (most recent call last):\n")
    lines = traceback.rstrip().split("\n")
    own = next((i for i in range(len(lines), 0, -1) if lines[i - 1].startswith("  ")), 0)
    return "\n".join(lines[own:]) if found and lines[own:] else message
