"""The average against the ensemble of the same checkpoints, as their number grows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.loaders import Subset
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.errors import UsageError
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.candidates import Candidate
from ckptavg.inspection.geometry import Geometry, geometry
from ckptavg.landscape.curves.joint_scorer import LAST_GAP, OUTPUT_GAP, JointScorer
from ckptavg.landscape.curves.series import average_of
from ckptavg.landscape.curves.verdict import PairComparison
from ckptavg.landscape.landscape import Landmark, Landscape, Point
from ckptavg.landscape.plane import length
from ckptavg.landscape.points import PointLike, PointScore
from ckptavg.landscape.store import Key, Scores, check_results, score_landscape
from ckptavg.models.batches import Batches, Forward
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.runs.order import paths_of
from ckptavg.runs.run import Run, RunLike, as_run
from ckptavg.runs.selection_notes import note_run
from ckptavg.tasks import Metric, Task

Order = Literal["last", "first"]
AVERAGE, ENSEMBLE = "average", "ensemble"
# Most numbers of checkpoints that are scored, spread evenly over longer runs.
_MOST_COUNTS = 20


def ensemble_growth(  # noqa: D417 - arguments of `evaluate` share a line
    run: RunLike, model: nn.Module, data: Batches | Dataset[Any], *,
    train_data: Batches | Dataset[Any] | None = None, order: Order = "last",
    task: Task | str | None = None, device: str | torch.device | None = None,
    forward: Forward | None = None, exclude: str | Sequence[str] = (), amp: str = "off",
    batch_size: int | None = None, workers: int = 0, seed: int = 0,
    bn_samples: int | Subset | None = None,
    results: str | os.PathLike[str] | None = None, resume: bool = False,
    progress: ProgressLike = None,
) -> Landscape:  # fmt: skip
    """Score the average and the ensemble of 1, 2, ... checkpoints.

    The mean of the checkpoints' outputs (FGE, Garipov et al. 2018) differs from the output of the
    average by O(Δ²) only, where Δ is the largest distance of a checkpoint to the average, while the
    output of a single checkpoint differs by O(Δ) (Izmailov et al. 2018, section 3.5)::

        growth = ckptavg.ensemble_growth(run.last(10), model, val_data, train_data=train_data)
        print(growth.facts["text"])

    Args:
        run: The run, a selection of it, or a path.
        model: A module that the weights fit; a copy is used, the module does not change.
        data: Evaluation data, as for ``evaluate``.
        train_data: Training data, for the averages' statistics; all points are scored on it, too.
        order: ``last`` to take the last n checkpoints, ``first`` to take the first n.
        task, device, forward, exclude, amp, batch_size, workers, seed, bn_samples, results, resume,
            progress: As for ``evaluate``; results are a ``.json`` or ``.npz`` file.

    Returns:
        A landscape of kind ``ensemble``. x is the number of checkpoints, and the series are
        ``average`` and ``ensemble``. Points of the ensemble have besides the metrics
        ``output_gap``, the mean L2 distance of its outputs to those of the average, and
        ``last_gap``, that of the checkpoint at x = 1 to the average. ``facts`` has Δ under
        ``delta``, for each of the ``counts``, and a verdict under ``text``.

    Raises:
        UsageError: There is a single checkpoint, or the order is unknown.
        CkptavgError: As for ``evaluate``.
    """
    check_results(results, "ensemble", resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        opened = as_run(run)
        note_run(opened)
        check_growth(opened, order)
        scorer = JointScorer.open(
            opened, model, data, train_data=train_data, task=task, device=device, forward=forward,
            exclude=exclude, amp=amp, batch_size=batch_size, workers=workers, seed=seed,
            bn_samples=bn_samples,
        )  # fmt: skip
        growth = _Growth(opened, order, scorer.task, geometry(opened))
        points = growth.to_score(recompute=train_data is not None)
        stored = _stored_comparisons(results, resume=resume)

        def build(scores: Scores) -> Landscape:
            return growth.lay_out(scores, describe_comparisons(scorer.comparisons) or stored)

        return score_landscape(
            scorer, points, build, results=results, resume=resume, progress=reporter,
            settings={"order": order}, notes=notes,
        )  # fmt: skip


def check_growth(run: Run, order: Order) -> None:
    """Refuse a run of a single checkpoint, and an unknown order.

    Raises:
        UsageError: There is a single checkpoint, or the order is unknown.
    """
    if order not in get_args(Order):
        raise UsageError(f"`order` is expected to be last or first but is {order!r}")
    if len(run) < 2:
        raise UsageError(
            "an ensemble needs two checkpoints, and there is a single one", "Select more of them."
        )


@dataclass(frozen=True)
class _Growth:
    """Averages and ensembles of more and more checkpoints.

    Attributes:
        run: The checkpoints.
        order: End of the run that the growth begins at.
        task: The task that scores.
        geometry: Inner products of the checkpoints.
    """

    run: Run
    order: Order
    task: Task
    geometry: Geometry

    @property
    def counts(self) -> list[int]:
        """Numbers of checkpoints, from 1 to all."""
        total = len(self.run)
        if total <= _MOST_COUNTS:
            return list(range(1, total + 1))
        spread = torch.linspace(1, total, _MOST_COUNTS).round().int().tolist()
        return sorted(set(spread))

    def members(self, count: int) -> Run:
        """Return the last, or the first, checkpoints."""
        if self.order == "last":
            return self.run[len(self.run) - count :]
        return self.run[:count]

    def coefficients(self, count: int) -> tuple[float, ...]:
        """Return the coefficients of the average over all checkpoints."""
        weighted, rest = (1 / count,) * count, (0.0,) * (len(self.run) - count)
        if self.order == "last":
            return rest + weighted
        return weighted + rest

    def to_score(self, *, recompute: bool) -> dict[Key, PointLike]:
        """List the averages and the ensembles by their keys.

        Args:
            recompute: True to recompute the averages' statistics if they are stale.
        """
        single = self.members(1)[0]
        listed: dict[Key, PointLike] = {
            self.coefficients(1): Candidate.of_checkpoint(single, recompute=False)
        }
        for count in self.counts[1:]:
            members = self.members(count)
            listed[self.coefficients(count)] = average_of(members, recompute=recompute)
            listed[ENSEMBLE, count] = Candidate.of_ensemble(members)
        return listed

    def lay_out(self, scores: Scores, comparisons: Sequence[Mapping[str, Any]]) -> Landscape:
        """Lay out the points that have scores.

        Args:
            scores: Scores by the keys of ``to_score``.
            comparisons: Each ensemble against the average, as facts.
        """
        points: list[Point] = []
        for count in self.counts:
            average = scores.get(self.coefficients(count))
            ensemble = scores.get((ENSEMBLE, count))
            coefficients = self.coefficients(count)
            if average is not None:
                points.append(_point(count, coefficients, average, AVERAGE))
            # The ensemble of a single checkpoint is that checkpoint.
            if count == 1 and average is not None:
                points.append(_point(count, coefficients, average, ENSEMBLE))
            if ensemble is not None:
                points.append(_point(count, None, ensemble, ENSEMBLE))
        return Landscape(
            kind="ensemble",
            axes=("number of checkpoints", ""),
            metrics=(*self.task.metrics, *GAPS),
            points=tuple(points),
            checkpoints=tuple(self._landmarks()),
            facts=self._facts(scores, comparisons),
        )

    def _landmarks(self) -> list[Landmark]:
        """Return the checkpoints, each where it joins the average."""
        checkpoints = self.run.checkpoints
        names = short_names(paths_of(checkpoints))
        landmarks: list[Landmark] = []
        for position, checkpoint in enumerate(checkpoints):
            x = position + 1
            if self.order == "last":
                x = len(checkpoints) - position
            landmarks.append(
                Landmark(
                    names[position], str(checkpoint.path), checkpoint.step, checkpoint.record.lr, x
                )
            )
        return landmarks

    def _facts(self, scores: Scores, comparisons: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        sentences = [comparison["text"] for comparison in comparisons[-1:]]
        sentences += self._describe_gap(scores)
        lines = [{"series": name, "run": "", "line": name} for name in (AVERAGE, ENSEMBLE)]
        return {
            "order": self.order,
            "lines": lines,
            "counts": self.counts,
            "delta": [self._largest_distance(count) for count in self.counts],
            "comparisons": list(comparisons),
            "sentences": sentences,
            "text": ". ".join(sentences),
        }

    def _describe_gap(self, scores: Scores) -> list[str]:
        """Word the distances of outputs at the largest number of checkpoints, where known."""
        count = self.counts[-1]
        ensemble = scores.get((ENSEMBLE, count))
        if ensemble is None or not {OUTPUT_GAP, LAST_GAP} <= ensemble.data.keys():
            return []
        return [
            f"the outputs of the two differ by {ensemble.data[OUTPUT_GAP]:.4g} in the mean "
            f"(L2 distance), those of the {self.order} checkpoint and the average by "
            f"{ensemble.data[LAST_GAP]:.4g}; the average costs one forward pass, the ensemble "
            f"{count}"
        ]

    def _largest_distance(self, count: int) -> float:
        """Return Δ, the largest distance of an averaged checkpoint to the average."""
        mean = torch.tensor(self.coefficients(count), dtype=torch.float64)
        distances: list[float] = []
        for position in mean.nonzero().flatten().tolist():
            offset = -mean
            offset[position] += 1
            distances.append(length(self.geometry.differences, offset))
        return max(distances)


def describe_comparisons(comparisons: Sequence[PairComparison]) -> list[dict[str, Any]]:
    """Return the comparisons of ensembles with averages as facts, each with a sentence."""
    facts: list[dict[str, Any]] = []
    for comparison in comparisons:
        plain = comparison.as_json(ENSEMBLE, AVERAGE)
        facts.append({**plain, "text": comparison.describe()})
    return facts


def _stored_comparisons(
    results: str | os.PathLike[str] | None, *, resume: bool
) -> list[dict[str, Any]]:
    """Return the comparisons in a file that is continued.

    They hold if all points of the file are taken; else new ones take their place.
    """
    if not resume or results is None or not Path(results).exists():
        return []
    comparisons: list[dict[str, Any]] = Landscape.load(results).facts.get("comparisons", [])
    return comparisons


GAPS = (
    Metric(OUTPUT_GAP, "ensemble's outputs to the average's", ".4f", None),
    Metric(LAST_GAP, "single checkpoint's outputs to the average's", ".4f", None),
)


def _point(
    count: int, coefficients: tuple[float, ...] | None, score: PointScore, series: str
) -> Point:
    return Point(count, None, coefficients, score.data, score.train, score.interval, series)
