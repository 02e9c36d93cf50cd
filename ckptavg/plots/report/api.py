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
from ckptavg.data.argument_checks import check_data, check_forward, check_model
from ckptavg.data.loaders import Subset, as_subset
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.compare import open_selection
from ckptavg.formats import Checkpoint
from ckptavg.landscape.points import PointScorer
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.load import unwrap_distributed
from ckptavg.models.runtime import Runtime
from ckptavg.plots.report.build import Report, build_report, check_output, write_report
from ckptavg.plots.report.figures import FIGURES, check_figures
from ckptavg.plots.report.recipe import Invocation, keywords_of
from ckptavg.plots.report.subject import Subject
from ckptavg.runs.run import Run, RunLike
from ckptavg.tasks import Task
from ckptavg.tasks.named import as_task


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

    The page needs nothing else, no network and no script. It has the verdict from the paired
    comparison of the average with the last checkpoint, the scores of all candidates, figures of the
    run, the code that makes the average, and the origin of all of it::

        run = ckptavg.open_run("runs/swa")
        report = ckptavg.report(run, model, val_data, train_data=train_data, out="report.html")
        print(report)

    The same inputs give the same bytes on the same machine: the page has no other date than
    ``date`` and those of the run's files.

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
        date: Text below the heading, such as the date of the report.

    Returns:
        The report: ``verdict``, ``results``, ``html``; printed as the sentence of the verdict.

    Raises:
        OutputError: The file exists, or cannot be written.
        CkptavgError: As for ``compare``.
    """
    target = None if out is None else Path(out)
    check_model(model)
    check_forward(forward)
    check_data(data)
    kinds = check_figures(figures)
    task = as_task(task)
    rules = TensorRules(include=include_tensors, exclude=exclude_tensors, base=base, dtype=dtype)
    runtime = Runtime.on(
        device, model, amp=amp, workers=workers, seed=seed,
        batch_size=task.batch_size if batch_size is None else batch_size,
    )  # fmt: skip
    averaging = keywords_of(
        {"scheme": scheme, "weights": weights, **rules, "on_nonfinite": on_nonfinite}
    )
    recomputing = keywords_of(
        {"device": device, "forward": forward, "exclude": exclude, "amp": amp,
         "batch_size": runtime.batch_size, "workers": workers, "seed": seed,
         "bn_samples": bn_samples}
    )  # fmt: skip
    invocation = _describe_call(run, model, data, train_data, averaging, recomputing)
    if target is not None:
        check_output(target, overwrite=overwrite)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        opened, selection = open_selection(run, selection)
        if target is not None:
            check_output(target, overwrite=overwrite, inputs=opened.members)
        further = {}
        for name, request in (also or {}).items():
            further[name] = plan_request(name, opened, request, **rules)
        planned = plan_average(selection, scheme, weights=weights, **rules)
        keep_nonfinite = parse_on_nonfinite(on_nonfinite)
        has_rules = bool(keywords_of({**rules}))
        subject = Subject(opened, selection, planned, further, each, has_rules, keep_nonfinite)
        scorer = PointScorer(
            opened, model, data, train_data, task, runtime, forward, exclude, as_subset(bn_samples)
        )
        made = build_report(
            subject, scorer, invocation, figures=kinds, notes=notes, date=date, progress=reporter
        )
    if target is not None:
        write_report(made, target, overwrite=overwrite)
    return made


def _describe_call(
    run: RunLike,
    model: nn.Module,
    data: Batches | Dataset[Any],
    train_data: Batches | Dataset[Any] | None,
    averaging: Mapping[str, Any],
    recomputing: Mapping[str, Any],
) -> Invocation:
    """Describe the arguments of a report by what Python shows of them."""
    paths: tuple[str, ...] = ()
    if isinstance(run, (str, os.PathLike)):
        paths = (str(run),)
    return Invocation(
        paths=paths,
        opening={},
        averaging=averaging,
        recomputing=recomputing,
        model=type(unwrap_distributed(model)).__name__,
        data=_describe_data(data),
        training=None if train_data is None else _describe_data(train_data),
    )


def _describe_data(data: Batches | Dataset[Any]) -> str:
    """Word data by their class, that of the Dataset within a loader."""
    return type(getattr(data, "dataset", data)).__name__
