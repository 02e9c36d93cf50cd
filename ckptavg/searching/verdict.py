"""The verdict of a search in one sentence, and the command that makes the winner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ckptavg.evaluation.significance import Difference
from ckptavg.searching.families import Recipe
from ckptavg.tasks import Metric

Outcome = Literal["average", "checkpoint", "keep-last"]


@dataclass(frozen=True)
class Verdict:
    """Answer of a search.

    Attributes:
        outcome: ``average`` or ``checkpoint`` if one is better than the last checkpoint, also on
            the samples that had no say; ``keep-last`` if none is.
        text: The answer in a sentence.
    """

    outcome: Outcome
    text: str


def judge(
    winner: str,
    size: int,
    metric: Metric,
    difference: Difference | None,
    others: int,
    counts: str,
) -> Verdict:
    """Word the verdict.

    Args:
        winner: Name of the winner.
        size: Number of checkpoints of the winner.
        metric: The metric that decides.
        difference: The winner minus the last checkpoint on the samples that judge, in the metric's
            unit; None if the last checkpoint won.
        others: Number of other candidates that cannot be told from the best.
        counts: Word for the samples.
    """
    if difference is None:
        return Verdict(
            "keep-last", "nothing is better than the last checkpoint on these data: keep it"
        )
    size_text = _difference_text(difference, metric)
    where = f"on {difference.n:,} {counts} that had no say in choosing it"
    # The best of many is ahead on the samples that chose it by their choice alone.
    if not _is_better(difference, metric):
        return Verdict(
            "keep-last",
            f"{winner} was ahead on the {counts} that chose it, but not for certain ({size_text}) "
            f"{where}: keep the last checkpoint",
        )
    outcome: Outcome = "average" if size > 1 else "checkpoint"
    text = f"{winner}: {size_text} over the last checkpoint {where}"
    if others == 1:
        text += "; 1 other cannot be told from the best"
    elif others:
        text += f"; {others} others cannot be told from the best"
    return Verdict(outcome, text)


def _is_better(difference: Difference, metric: Metric) -> bool:
    """Tell whether the whole 95 % interval is on the better side."""
    if metric.higher is False:
        return difference.high < 0
    return difference.low > 0


def _difference_text(difference: Difference, metric: Metric) -> str:
    """Write a difference with its interval: ``top-1 +1.32 points [+0.5, +2.1]``."""
    form = f"+{metric.form}"
    texts: list[str] = []
    for number in (difference.value, difference.low, difference.high):
        texts.append(format(number, form).replace("-", "−"))
    value, low, high = texts
    title, unit = metric.title, ""
    # A difference of percentages is one of points: 1 % more than 90 % may mean 90.9 %.
    if metric.unit == "%":
        title, unit = metric.title.removesuffix("%").rstrip(), " points"
    elif metric.unit:
        unit = f" {metric.unit}"
    return f"{title} {value}{unit} [{low}, {high}]"


def write_code(recipe: Recipe, paths: Sequence[str], out: str) -> str:
    """Write the Python call that makes an average of named checkpoints.

    Args:
        recipe: Selection and scheme.
        paths: Path of each checkpoint of the searched run.
        out: Path of the output.
    """
    words = [repr([paths[position] for position in recipe.positions])]
    if recipe.weights is not None:
        words.append(f"weights={list(recipe.weights)}")
    elif recipe.scheme != "uniform":
        words.append(f"scheme={recipe.scheme!r}")
    words.append(f"out={out!r}")
    return f"ckptavg.average({', '.join(words)})"
