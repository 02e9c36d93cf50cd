"""The report of a run, as Python calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.keywords import TensorRules
from ckptavg.averaging.many import Asked, plan_request
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.rules import parse_on_nonfinite
from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.compare import open_selection
from ckptavg.formats import Checkpoint
from ckptavg.landscape.points import PointScorer
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.load import unwrap_distributed
from ckptavg.plots.report.build import (
    Report,
    build_report,
    check_output,
    require_packages,
    write_report,
)
from ckptavg.plots.report.figures import FIGURES, check_figures
from ckptavg.plots.report.recipe import Invocation, keywords_of, recomputing_of
from ckptavg.plots.report.subject import Subject
from ckptavg.runs.run import Run, RunLike
from ckptavg.tasks import Task


def report(  # noqa: D417 - arguments of `compare` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    out: str | os.PathLike[str] | None = None, overwrite: bool = False,
    train_data: Batches | Dataset[Any] | None = None,
    selection: Run | None = None,
    scheme: str = "uniform", weights: Sequence[float] | None = None,
    each: bool = False, also: Asked | None = None,
    figures: Sequence[str] = FIGURES,
    include_tensors: str | Sequence[str] = (), exclude_tensors: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep", on_nonfinite: str = "error",
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None, date: str | None = None,
    progress: ProgressLike = None,
) -> Report:  # fmt: skip
    """Report on a run in one HTML page: whether its average is better, and how to make it.

    The page needs no network and no script::

        report = ckptavg.report(run, model, val_data, train_data=train_data, out="report.html")
        print(report)

    The same inputs give the same bytes on the same machine.

    Args:
        run, model, data, train_data, selection, scheme, weights, also, include_tensors,
            exclude_tensors, base, dtype, on_nonfinite: As for ``compare``.
        out: The ``.html`` file; None to write none.
        overwrite: True to replace an existing file.
        each: True to list every selected checkpoint in the table.
        figures: Some of ``curve``, ``geometry``, ``segment`` and ``reliability``. The points of
            curve and segment are scored besides; they share the passes over the data.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, progress: As
            for ``evaluate``.
        date: Text below the heading; the page has no other date than those of the run's files.

    Returns:
        The report: ``verdict``, ``results``, ``figures``, ``html``; printed as the verdict.

    Raises:
        OutputError: The file exists, or cannot be written.
        CkptavgError: As for ``compare``.
    """
    kinds = check_figures(figures)
    target = None if out is None else Path(out)
    rules = TensorRules(include=include_tensors, exclude=exclude_tensors, base=base, dtype=dtype)
    require_packages()
    if target is not None:
        check_output(target, overwrite=overwrite)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        opened, selection = open_selection(run, selection)
        if target is not None:
            check_output(target, overwrite=overwrite, inputs=opened.members)
        scorer = PointScorer.open(
            opened, model, data, train_data=train_data, task=task, device=device, forward=forward,
            exclude=exclude, amp=amp, batch_size=batch_size, workers=workers, seed=seed,
            bn_samples=bn_samples,
        )  # fmt: skip
        further = {}
        for name, request in (also or {}).items():
            further[name] = plan_request(name, opened, request, **rules)
        subject = Subject(
            opened, selection, plan_average(selection, scheme, weights=weights, **rules), further,
            each, bool(keywords_of({**rules})), parse_on_nonfinite(on_nonfinite),
        )  # fmt: skip
        averaging = {"scheme": scheme, "weights": weights, **rules, "on_nonfinite": on_nonfinite}
        invocation = _describe_call(run, scorer, averaging, device)
        finished = build_report(
            subject, scorer, invocation, figures=kinds, notes=notes, date=date, progress=reporter
        )
    if target is not None:
        write_report(finished, target, overwrite=overwrite)
    return finished


def _describe_call(
    run: RunLike,
    scorer: PointScorer,
    averaging: Mapping[str, Any],
    device: str | torch.device | None,
) -> Invocation:
    """Describe the arguments of a report by what Python shows of them.

    Args:
        run: The run as it was passed.
        scorer: Model, data and settings.
        averaging: Keywords of ``average``.
        device: The device as it was passed.
    """
    paths: tuple[str, ...] = ()
    if isinstance(run, (str, os.PathLike)):
        paths = (str(run),)
    training = None
    if scorer.training is not None:
        training = _describe_data(scorer.training)
    return Invocation(
        paths=paths,
        opening={},
        averaging=keywords_of(averaging),
        recomputing=keywords_of(recomputing_of(scorer, device, scorer.subset)),
        model=type(unwrap_distributed(scorer.model)).__name__,
        data=_describe_data(scorer.data),
        training=training,
    )


def _describe_data(data: Batches | Dataset[Any]) -> str:
    """Word data by their class, that of the Dataset within a loader."""
    return type(getattr(data, "dataset", data)).__name__
