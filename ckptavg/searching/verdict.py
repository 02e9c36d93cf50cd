"""The verdict of a search in one sentence, and the command that makes the winner."""

from __future__ import annotations

import shlex
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
    if metric.unit == "%":
        title, unit = metric.title.removesuffix("%").rstrip(), " points"
    elif metric.unit:
        unit = f" {metric.unit}"
    return f"{title} {value}{unit} [{low}, {high}]"


@dataclass(frozen=True)
class Words:
    """Words of the command line that makes the winner.

    Attributes:
        paths: Path of each checkpoint of the searched run.
        sources: Paths that give the whole searched run to ``average``; empty to name checkpoints.
        flags: Further flags of ``average``, such as ``--key model``.
        statistics: Flags that recompute statistics, such as ``--model model.py:make``.
        out: Path of the output.
    """

    paths: tuple[str, ...]
    sources: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    out: str = "average.safetensors"


def write_command(recipe: Recipe, words: Words, *, recomputed: bool) -> str:
    """Write the command line that makes an average.

    The last k of a run are selected by their number, other checkpoints are named each.

    Args:
        recipe: Selection and scheme.
        words: Words of the run and of the statistics.
        recomputed: True to recompute the BatchNorm statistics.
    """
    count, size = len(words.paths), len(recipe.positions)
    command = ["ckptavg", "average"]
    is_tail = recipe.positions == tuple(range(count - size, count))
    if words.sources and is_tail and recipe.weights is None:
        command += [*words.sources, *words.flags]
        if size < count:
            command += ["--last", str(size)]
    else:
        command += [words.paths[position] for position in recipe.positions]
        command += words.flags
    if recipe.weights is not None:
        command += ["--weights", ",".join(f"{weight:.17g}" for weight in recipe.weights)]
    elif recipe.scheme != "uniform":
        command += ["--scheme", recipe.scheme]
    command += ["-o", words.out]
    if recomputed:
        command += words.statistics
    return shlex.join(command)
