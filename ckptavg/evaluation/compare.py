"""Comparison of a run's last checkpoint, averages and ensemble on the same data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.keywords import TensorRules
from ckptavg.averaging.many import Asked, plan_request
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.rules import parse_on_nonfinite
from ckptavg.data.argument_checks import check_forward, check_model
from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike
from ckptavg.errors import UsageError, short
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.candidates import CandidateLike, as_candidates, candidates_of
from ckptavg.evaluation.ensembles import make_swag_candidates, parse_ensembles
from ckptavg.evaluation.evaluate import evaluate
from ckptavg.evaluation.results import Results, without_repeats
from ckptavg.formats import Checkpoint
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.runs.selection_notes import note_run, note_selection
from ckptavg.tasks import Task
from ckptavg.tasks.named import as_task


def compare(  # noqa: D417 - arguments of `evaluate` and `average` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None,
    selection: Run | None = None,
    scheme: str = "uniform", weights: Sequence[float] | None = None,
    each: bool = False, ensemble: bool | str | Iterable[str] = False, stale: bool = True,
    also: Asked | None = None,
    candidates: Iterable[CandidateLike] | Mapping[str, CandidateLike] = (),
    include_tensors: str | Sequence[str] = (), exclude_tensors: str | Sequence[str] = (),
    base: str | os.PathLike[str] | Checkpoint | None = None,
    dtype: str = "keep", on_nonfinite: str = "error",
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (),
    amp: str = "off", batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Results:  # fmt: skip
    """Score the last checkpoint and averages of a run on the same data.

    The same as ``ckptavg eval`` of a run: no checkpoint is written, all averages come from one read
    of the checkpoints, and all that memory holds share a pass over the data::

        run = ckptavg.open_run("runs/swa")
        results = ckptavg.compare(run, model, val_data, train_data=train_data, each=True,
                                  also={"last 5": run.last(5), "ema": "ema:decay=0.9"})
        print(results)

    Args:
        run: The run, or a path. The last checkpoint is the baseline of all comparisons.
        model: A module that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, a Dataset or a loader, as for ``evaluate``.
        train_data: Training data; with it, averages are also scored with recomputed statistics.
        selection: The part of the run to average; the whole run where None.
        scheme, weights, base, dtype, on_nonfinite: As for ``average``.
        each: True to score every selected checkpoint.
        ensemble: True or ``fge`` to score the mean of the selected checkpoints' outputs; ``swag``,
            or with options ``swag:samples=20,rank=10``, to score the mean of the outputs of weights
            sampled from SWAG, see ``Candidate.of_swag``; or a list of these.
        stale: True to score averages with statistics as averaged beside recomputed ones.
        also: Further averages by name, each as for ``average_many``.
        candidates: Further candidates, as for ``evaluate``; first in the table.
        include_tensors, exclude_tensors: As include and exclude of ``average``.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, results, resume,
            progress: As for ``evaluate``.

    Returns:
        The results; ``notes`` includes remarks on the run. An average whose statistics could not
        be recomputed is listed once.

    Raises:
        CkptavgError: As for ``average`` and ``evaluate``.
    """
    # Wrong arguments are met before checkpoints are read.
    check_model(model)
    check_forward(forward)
    task = as_task(task)
    keep_nonfinite = parse_on_nonfinite(on_nonfinite)
    ensembles = parse_ensembles(ensemble)
    rules = TensorRules(include=include_tensors, exclude=exclude_tensors, base=base, dtype=dtype)
    recompute = train_data is not None
    with collect_notes() as notes:
        run, selection = open_selection(run, selection)
        further = {}
        for name, request in (also or {}).items():
            further[name] = plan_request(name, run, request, **rules)
        planned = plan_average(selection, scheme, weights=weights, **rules)
        sampled = []
        if ensembles.swag:
            # The mean of SWAG is uniform, whatever the scheme of the average.
            mean = plan_average(selection, **rules)
            sampled = make_swag_candidates(mean, ensembles.swag, recompute=recompute)
        every = as_candidates(candidates, has_training=recompute) + candidates_of(
            run, selection, planned, each=each, ensemble=ensembles.fge, sampled=sampled,
            recompute=recompute, stale=stale, further=further,
        )  # fmt: skip
        scored = evaluate(
            every, model, data, train_loader=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples, keep_nonfinite=keep_nonfinite, results=results,
            resume=resume, progress=progress,
        )  # fmt: skip
    return Results(without_repeats(scored), scored.task, notes)


def open_selection(run: RunLike, selection: Run | None) -> tuple[Run, Run]:
    """Open a run, check the selection, and note remarks on both.

    Args:
        run: The run, or a path.
        selection: The part of the run to average; the whole run where None.

    Raises:
        UsageError: The selection is not a part of the run.
    """
    opened = as_run(run)
    note_run(opened)
    selection = _check_selection(selection, opened)
    note_selection(opened, selection)
    return opened, selection


def _check_selection(selection: Run | None, run: Run) -> Run:
    """Return the selection, or the whole run where None.

    Raises:
        UsageError: The selection is not a part of the run.
    """
    if selection is None:
        return run
    if not isinstance(selection, Run):
        raise UsageError(
            f"selection is expected to be a part of the run but is {short(repr(selection))}",
            "Select from the very run that is passed: selection=run.last(5).",
        )
    # Compared by identity: an equal checkpoint of a run that was opened again does not count.
    run_ids = {id(checkpoint) for checkpoint in run.opened}
    if not run_ids.issuperset(map(id, selection.opened)):
        raise UsageError(
            "the selection has checkpoints that the run does not have",
            "Select from the very run that is passed: selection=run.last(5).",
        )
    return selection
