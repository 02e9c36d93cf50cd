"""A task's scores of outputs that come in batches, or from several processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from ckptavg import Task


def score_batches(
    task: Task, outputs: torch.Tensor, targets: torch.Tensor, sizes: Sequence[int] | None = None
) -> Any:
    """Score outputs in batches of these sizes; as one batch where none are given."""
    scores = task.scores()
    batches = list(sizes or [len(targets)])
    for batch, truth in zip(outputs.split(batches), targets.split(batches), strict=True):
        scores.update(task.predict(batch, truth), truth)
    return scores


def score_shares(
    task: Task, outputs: torch.Tensor, targets: torch.Tensor, shares: Sequence[Sequence[int]]
) -> Any:
    """Score outputs in several processes, and merge the states, which travel as JSON.

    Args:
        task: The task.
        outputs: Outputs of a model.
        targets: The truth, as many.
        shares: Sizes of each process's batches. A process may have none.
    """
    sizes = [size for share in shares for size in share]
    batches = zip(outputs.split(sizes), targets.split(sizes), strict=True)
    merged = task.scores()
    for share in shares:
        scores = task.scores()
        for _ in share:
            batch, truth = next(batches)
            scores.update(task.predict(batch, truth), truth)
        merged.merge(json.loads(json.dumps(scores.state(), allow_nan=False)))
    return merged
