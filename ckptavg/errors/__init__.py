"""Error classes, each with a message, a remedy and an exit code of the command line."""

from __future__ import annotations

# Modules that log import these errors, too: the logger is set up before its first record.
import ckptavg.errors.notes  # noqa: F401
from ckptavg.errors.printable import printable


class CkptavgError(Exception):
    """Base class of all errors that ckptavg raises.

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
        if self.message.endswith((".", "?", "!")):
            return f"{self.message} {self.remedy}"
        return f"{self.message}. {self.remedy}"


class UsageError(CkptavgError, ValueError):
    """Error for an argument that is invalid whatever the files hold."""

    exit_code = 2


class CheckpointError(CkptavgError):
    """Error for a checkpoint that cannot be opened, or in which no weights are found."""


class NoWeightsError(CheckpointError):
    """Error for a readable file without weights, for example an optimizer's state or a history."""


class PlacementError(CheckpointError):
    """Error for tensors of a remote file at other offsets than the file's directory implies."""


class RunError(CkptavgError):
    """Error for no run, several runs, or a selection that a run cannot fulfil."""


class MismatchError(CkptavgError):
    """Error for checkpoints that do not hold the same tensors."""


class UnsupportedTensorError(CkptavgError):
    """Error for tensors without a meaningful average: float8, quantized, sparse."""


class NonFiniteError(CkptavgError):
    """Error for an average that is not finite."""


class OutputError(CkptavgError):
    """Error for an output that may not or could not be written."""


class IntegrityError(CkptavgError):
    """Error for contents that differ from the recorded contents."""


class ProcessesError(CkptavgError):
    """Error for processes that cannot make an output together."""


class PeerError(ProcessesError):
    """Error for the failure or death of another process of the same group."""


class SpecError(CkptavgError):
    """Error for a model or data specification that cannot be used."""


class ModelError(CkptavgError):
    """Error for weights that do not fit the model."""


class BatchNormError(CkptavgError):
    """Error for BatchNorm statistics that cannot be recomputed."""


class EvaluationError(CkptavgError):
    """Error for candidates that cannot be scored on the data."""


class MissingPackageError(CkptavgError, ImportError):
    """Error for an optional package that is not installed."""


class StaleStatisticsWarning(UserWarning):
    """Warning that BatchNorm statistics do not belong to the weights.

    So it is in a plain average, whose statistics have not been recomputed.
    """


def short(name: object) -> str:
    """Return a name, cut to 200 characters, for a message.

    A file may have any object as a name: the type stands for an object that is no string.
    """
    if not isinstance(name, str):
        return f"a {type(name).__name__}"
    return printable(name[:200])


def first_few(names: list[str], count: int = 3) -> str:
    """Join the first names of a list for a short message, with the number of further names."""
    shown = ", ".join(names[:count])
    if len(names) <= count:
        return shown
    return f"{shown} and {len(names) - count} more"


def _without_traceback(message: str) -> str:
    """Return the text below the traceback that a DataLoader's worker puts into a message.

    A message without such a traceback is returned unchanged.
    """
    _, heading, traceback = message.partition("\nOriginal Traceback (most recent call last):\n")
    if not heading:
        return message
    lines = traceback.rstrip().split("\n")
    # Lines of the traceback are indented; the text of the error follows the last of these.
    text_start = 0
    for number, line in enumerate(lines, 1):
        if line.startswith("  "):
            text_start = number
    return "\n".join(lines[text_start:]) or message
