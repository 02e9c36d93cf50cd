"""Average the checkpoints of a training run, after the fact.

Importing this package does not import torch; using what it offers does.
"""

# Nothing is imported at this point, not even of the standard library: ``python -m ckptavg`` comes
# by here while modules of the working directory, perhaps a stranger's, still go before all others.
TYPE_CHECKING = False  # as type checkers know it

if TYPE_CHECKING:
    from typing import Any

    from ckptavg._version import __version__ as __version__
    from ckptavg.averaging.api import average as average
    from ckptavg.averaging.many import average_many as average_many
    from ckptavg.batchnorm.recompute import Recompute as Recompute
    from ckptavg.batchnorm.update import update_bn as update_bn
    from ckptavg.data.loaders import Subset as Subset
    from ckptavg.errors import CkptavgError as CkptavgError
    from ckptavg.errors import StaleStatisticsWarning as StaleStatisticsWarning
    from ckptavg.evaluation.candidates import Candidate as Candidate
    from ckptavg.evaluation.compare import compare as compare
    from ckptavg.evaluation.evaluate import evaluate as evaluate
    from ckptavg.evaluation.results import Result as Result
    from ckptavg.evaluation.results import Results as Results
    from ckptavg.formats import Checkpoint as Checkpoint
    from ckptavg.formats import open_checkpoint as open_checkpoint
    from ckptavg.inspection.geometry import geometry as geometry
    from ckptavg.inspection.verify import verify as verify
    from ckptavg.landscape.curves.curve import curve as curve
    from ckptavg.landscape.curves.ensemble_growth import ensemble_growth as ensemble_growth
    from ckptavg.landscape.lines.rays import rays as rays
    from ckptavg.landscape.lines.segment import segment as segment
    from ckptavg.landscape.planes.scored_plane import pca as pca
    from ckptavg.landscape.planes.scored_plane import plane as plane
    from ckptavg.landscape.reliability import reliability as reliability
    from ckptavg.plots.report.api import report as report
    from ckptavg.runs.run import Run as Run
    from ckptavg.runs.run import open_run as open_run
    from ckptavg.searching.result import SearchResult as SearchResult
    from ckptavg.searching.search import search as search
    from ckptavg.tasks import Task as Task

_HOMES = {
    "average": "averaging.api",
    "average_many": "averaging.many",
    "Recompute": "batchnorm.recompute",
    "update_bn": "batchnorm.update",
    "CkptavgError": "errors",
    "StaleStatisticsWarning": "errors",
    "Candidate": "evaluation.candidates",
    "evaluate": "evaluation.evaluate",
    "compare": "evaluation.compare",
    "Result": "evaluation.results",
    "Results": "evaluation.results",
    "Checkpoint": "formats",
    "open_checkpoint": "formats",
    "geometry": "inspection.geometry",
    "verify": "inspection.verify",
    "curve": "landscape.curves.curve",
    "ensemble_growth": "landscape.curves.ensemble_growth",
    "rays": "landscape.lines.rays",
    "segment": "landscape.lines.segment",
    "reliability": "landscape.reliability",
    "report": "plots.report.api",
    "pca": "landscape.planes.scored_plane",
    "plane": "landscape.planes.scored_plane",
    "Run": "runs.run",
    "open_run": "runs.run",
    "search": "searching.search",
    "SearchResult": "searching.result",
    "Subset": "data.loaders",
    "Task": "tasks",
    "__version__": "_version",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> "Any":
    import importlib  # noqa: PLC0415

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"ckptavg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
