"""Average the checkpoints of a training run, after the fact.

Importing this package does not import torch; using what it offers does.
"""

# Nothing is imported at this point, not even of the standard library: ``python -m ckptavg`` comes
# by here while modules of the working directory, perhaps a stranger's, still go before all others.
TYPE_CHECKING = False  # as type checkers know it

if TYPE_CHECKING:
    from typing import Any

    from ckptavg.averaging import average as average
    from ckptavg.batchnorm import update_bn as update_bn
    from ckptavg.candidates import Candidate as Candidate
    from ckptavg.comparison import compare as compare
    from ckptavg.errors import CkptavgError as CkptavgError
    from ckptavg.errors import StaleStatisticsWarning as StaleStatisticsWarning
    from ckptavg.evaluation import evaluate as evaluate
    from ckptavg.formats import Checkpoint as Checkpoint
    from ckptavg.formats import open_checkpoint as open_checkpoint
    from ckptavg.loaders import Subset as Subset
    from ckptavg.many import average_many as average_many
    from ckptavg.results import Result as Result
    from ckptavg.results import Results as Results
    from ckptavg.run import Run as Run
    from ckptavg.run import open_run as open_run
    from ckptavg.tasks import Task as Task
    from ckptavg.version import __version__ as __version__
    from ckptavg.weight_space import geometry as geometry

_HOMES = {
    "average": "averaging",
    "average_many": "many",
    "update_bn": "batchnorm",
    "CkptavgError": "errors",
    "StaleStatisticsWarning": "errors",
    "Candidate": "candidates",
    "evaluate": "evaluation",
    "compare": "comparison",
    "Result": "results",
    "Results": "results",
    "Checkpoint": "formats",
    "open_checkpoint": "formats",
    "geometry": "weight_space",
    "Run": "run",
    "open_run": "run",
    "Subset": "loaders",
    "Task": "tasks",
    "__version__": "version",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> "Any":
    import importlib  # noqa: PLC0415

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckptavg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
