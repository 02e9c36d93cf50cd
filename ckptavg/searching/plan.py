"""All that decides a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ckptavg.batchnorm.recompute import Recompute
from ckptavg.errors import UsageError
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.evaluation.identity import EvaluationCall
from ckptavg.models.batches import Batches
from ckptavg.runs.run import Run
from ckptavg.searching.families import SearchedFamily
from ckptavg.tasks import Metric, Task


@dataclass(frozen=True)
class SearchPlan:
    """All that decides a search.

    Attributes:
        run: The checkpoints.
        call: Model, data and options of the scoring.
        metric: The metric that decides.
        families: Families to search.
        budget: Largest number of candidates.
        report_data: Data that judge; None to divide the evaluation data.
        select_fraction: Share of the evaluation data that chooses.
        repeats: Number of further splits.
    """

    run: Run
    call: EvaluationCall
    metric: Metric
    families: tuple[SearchedFamily, ...]
    budget: int
    report_data: Batches | Dataset[Any] | None
    select_fraction: float
    repeats: int

    def __post_init__(self) -> None:
        if len(self.run) < 2:
            raise UsageError(
                "a search needs two checkpoints or more: there is one",
                "Name a run, not a checkpoint.",
            )
        if self.budget < 2:
            raise UsageError(f"the budget is expected to be 2 or more but is {self.budget}")
        if self.repeats < 0:
            raise UsageError(f"repeats are expected to be 0 or more but are {self.repeats}")

    @property
    def recompute(self) -> Recompute | None:
        """The recomputation of statistics from the training data; None without any."""
        call = self.call
        if call.training is None:
            return None
        runtime = call.runtime
        return Recompute(
            call.model, call.training, device=runtime.device, forward=call.forward,
            exclude=call.excluded, amp=runtime.amp, batch_size=runtime.batch_size,
            workers=runtime.workers, seed=runtime.seed, bn_samples=call.subset,
        )  # fmt: skip

    @property
    def seed(self) -> int:
        """Seed of the split and of the test."""
        return self.call.runtime.seed


def find_metric(task: Task, name: str | None) -> Metric:
    """Return the metric of a task that has a name; the first where the name is None.

    Raises:
        UsageError: The task has no such metric, or the metric does not tell which is better.
    """
    metric = task.metrics[0]
    if name is not None:
        by_key = {metric.key: metric for metric in task.metrics}
        if name not in by_key:
            raise UsageError(
                f"the metric is expected to be one of {', '.join(by_key)} but got {name!r}",
                did_you_mean(close_names(name, by_key)),
            )
        metric = by_key[name]
    if metric.higher is None:
        raise UsageError(f"{metric.key} does not tell which candidate is better")
    return metric
