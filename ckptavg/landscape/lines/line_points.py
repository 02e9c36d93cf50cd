"""Points on lines of weight space as candidates, and what is scored of these."""

from __future__ import annotations

from ckptavg.averaging.plan import plan_average
from ckptavg.evaluation.candidates import Candidate
from ckptavg.landscape.landscape import L2_LOSS
from ckptavg.landscape.named_points import NamedPoint
from ckptavg.landscape.points import PointScorer
from ckptavg.runs.run import Run
from ckptavg.tasks import Metric, Task


def has_statistics_to_recompute(scorer: PointScorer) -> bool:
    """Return True if points need statistics of their own, and there is data to recompute these.

    Args:
        scorer: Scores the points.
    """
    if scorer.training is None:
        return False
    return plan_average(scorer.run).batchnorm not in ("none", "frozen")


def candidate_of(run: Run, point: NamedPoint, *, recompute: bool) -> Candidate:
    """Return the candidate of a named point, with the bits that ``evaluate`` scores.

    Args:
        run: The checkpoints.
        point: A checkpoint, or the average of several.
        recompute: True to recompute the statistics of a checkpoint, too.
    """
    if point.position is not None:
        return Candidate.of_checkpoint(run[point.position], recompute=recompute)
    # A uniform average is a sum that is divided once: 1/n each would round otherwise.
    largest = max(point.coefficients)
    weights = [coefficient / largest for coefficient in point.coefficients]
    return Candidate.of_average(run, weights=weights, recompute=recompute)


def metrics_with_l2(task: Task) -> tuple[Metric, ...]:
    """Return the metrics of a task, and the loss with the L2 term on training data.

    Args:
        task: The task that scores.
    """
    metrics = list(task.metrics)
    for metric in task.metrics:
        if metric.key == task.loss:
            title = f"{metric.title} with L2 term"
            metrics.append(Metric(L2_LOSS, title, metric.form, metric.higher, metric.unit))
    return tuple(metrics)


def mark_name(point: NamedPoint, *, recompute: bool) -> str:
    """Return the name of a landmark: a checkpoint keeps statistics that points on lines do not.

    Args:
        point: The point.
        recompute: True if the statistics of points on lines are recomputed.
    """
    if point.position is not None and recompute:
        return f"{point.name}, its own statistics"
    return point.name
