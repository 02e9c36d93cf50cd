"""Curves over training: each checkpoint beside the average so far."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors import UsageError
from ckptavg.errors.notes import collect_notes
from ckptavg.landscape.curves.named_runs import (
    NamedRun,
    RunsLike,
    StepAxis,
    choose_steps,
    join_runs,
    landmarks_of,
    name_runs,
)
from ckptavg.landscape.curves.recorded import (
    note_missing_rates,
    recorded_metrics,
    recorded_points,
)
from ckptavg.landscape.curves.scored_curve import ScoredCurve
from ckptavg.landscape.curves.series import check_window, lines_of
from ckptavg.landscape.landscape import Landmark, Landscape
from ckptavg.landscape.points import PointScorer
from ckptavg.landscape.store import check_results
from ckptavg.models.batches import Batches, Forward
from ckptavg.tasks import Task


def curve(  # noqa: D417 - arguments of `evaluate` share a line
    runs: RunsLike,
    model: nn.Module | None = None,
    data: Batches | Dataset[Any] | None = None,
    *,
    train_data: Batches | Dataset[Any] | None = None, window: int | None = None,
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (), amp: str = "off",
    batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score each checkpoint of a run, and the average so far (Izmailov et al. 2018, fig. 2, 6, 7).

    The selection decides with which checkpoint the average begins::

        run = ckptavg.open_run("runs/swa").steps(first=160)
        ckptavg.curve(run, model, val_data, train_data=train_data, window=5).save_figure("c.png")

    Args:
        runs: A run, several runs, or a dict of runs by name.
        model: A module that the weights fit; it does not change. None for a curve of the metrics
            that training recorded.
        data: Evaluation data, a Dataset or a loader, as for ``evaluate``.
        train_data: Training data, for the averages' statistics; all points are scored on it, too,
            so that the gap to the evaluation data shows over- and underfitting.
        window: Number of checkpoints of a sliding average beside the running one.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, results, resume,
            progress: As for ``evaluate``; results are a ``.json`` or ``.npz`` file.

    Returns:
        A landscape of kind ``curve``. x is the step, or the epoch, or the position in the run. The
        series are ``checkpoints``, ``running average`` and ``average of the last W``, after the
        run's name where there are several runs. ``facts`` has under ``text`` a verdict in words.

    Raises:
        UsageError: A run has a single checkpoint, or the window is larger than a run.
        RunError: There is no model, and the checkpoints record no metric.
        CkptavgError: As for ``evaluate``.
    """
    check_results(results, "curve", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        named = name_runs(runs)
        check_window(named, window)
        axis = choose_steps(named)
        note_missing_rates(named)
        if model is None or data is None:
            _refuse_scoring(
                model=model is not None, data=data is not None, train_data=train_data is not None,
                window=window is not None, resume=resume,
            )  # fmt: skip
            return _draw_recorded(named, axis, results, notes)
        scorer = PointScorer.open(
            join_runs(named), model, data, train_data=train_data, task=task, device=device,
            forward=forward, exclude=exclude, amp=amp, batch_size=batch_size, workers=workers,
            seed=seed, bn_samples=bn_samples,
        )  # fmt: skip
        scored = ScoredCurve(named, axis, window, scorer)
        return scored.score(results, resume=resume, progress=reporter, notes=notes)


def _refuse_scoring(**given: bool) -> None:
    """Refuse arguments that need a model and data, of which one is missing.

    Args:
        given: True for each argument that is given.

    Raises:
        UsageError: There is such an argument.
    """
    for name, is_given in given.items():
        if is_given:
            missing = "data" if name == "model" else "model"
            raise UsageError(f"`{name}` needs `{missing}`: points are scored by both")


def _draw_recorded(
    runs: Sequence[NamedRun],
    axis: StepAxis,
    results: str | os.PathLike[str] | None,
    notes: Sequence[str],
) -> Landscape:
    """Make the curve of recorded metrics, and store it.

    Args:
        runs: The runs.
        axis: Coordinate of each checkpoint.
        results: File of the landscape; None for none.
        notes: Remarks, which grow meanwhile.
    """
    metrics = recorded_metrics(join_runs(runs).checkpoints)
    points = recorded_points(runs, axis, metrics)
    landmarks: list[Landmark] = []
    for landmark, point in zip(landmarks_of(runs, axis), points, strict=True):
        landmarks.append(replace(landmark, data=point.data))
    landscape = Landscape(
        "curve", (axis.title, ""), metrics, points, tuple(landmarks),
        facts={"lines": lines_of(runs, None, scored=False)}, notes=tuple(notes),
    )  # fmt: skip
    # Of several processes the first writes.
    if results is not None and find_peers().rank == 0:
        landscape.save(results)
    return landscape
