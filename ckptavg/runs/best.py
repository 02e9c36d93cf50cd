"""Best checkpoints of a run by a metric that training recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ckptavg.errors import RunError, UsageError, first_few
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.formats import Checkpoint
from ckptavg.formats.metric_names import prominence, words_of
from ckptavg.io.paths import Location
from ckptavg.runs.metric_columns import choose_metric_columns

Mode = Literal["max", "min"]
MODES: tuple[str, ...] = get_args(Mode)

# An error is better when small, whatever other words the name has: iou_loss, top1_error.
_ERRORS = frozenset(["loss", "losses", "err", "error", "errors", "cost"])
_LOWER = frozenset([
    "bpb", "bpc", "bpd", "brier", "cer", "dcf", "ece", "eer", "epe", "fid", "fnr", "fpr", "fvd",
    "hd95", "kid", "kl", "kld", "lpips", "mae", "mape", "mase", "mcd", "mse", "msle", "nll",
    "nrmse", "perplexity", "ppl", "rmsd", "rmse", "rmsle", "smape", "ter", "wape", "wer",
])  # fmt: skip
_HIGHER = frozenset([
    "acc", "accuracy", "ap", "ar", "auc", "auprc", "auroc", "bleu", "chrf", "cider", "corr", "dice",
    "dsc", "elbo", "em", "f1", "fbeta", "fwiou", "hits", "hmean", "hota", "idf1", "iou", "jaccard",
    "kappa", "lddt", "likelihood", "map", "mar", "mcc", "meteor", "miou", "mota", "mrr", "ndcg",
    "nmi", "pck", "pearson", "pesq", "prec", "precision", "psnr", "r2", "recall", "rouge", "sdr",
    "sensitivity", "sisdr", "sisnr", "snr", "spearman", "specificity", "spice", "ssim", "stoi",
    "success", "tnr", "top", "tpr", "winrate",
])  # fmt: skip
# Words that count only if no other word decides: a brier_score is better when low.
_MOSTLY_HIGHER = frozenset([
    "elo", "fitness", "return", "returns", "rew", "reward", "rewards", "score", "scores",
])  # fmt: skip
_NEGATIONS = frozenset(["neg", "negative", "minus"])


@dataclass(frozen=True)
class Criterion:
    """Recorded metric, and the direction in which values are better."""

    metric: str
    mode: Mode


def choose_criterion(
    checkpoints: Sequence[Checkpoint], metric: str | None, mode: Mode | None
) -> Criterion:
    """Complete the user's choice of a metric, by which checkpoints are ranked.

    Args:
        checkpoints: Checkpoints to choose from.
        metric: Name of a recorded metric; None for the only metric that is recorded.
        mode: ``max`` or ``min``; None to derive the mode from the metric's name.

    Raises:
        UsageError: There are several metrics, or the name does not tell which values are better.
        RunError: No metric is recorded, or no metric of that name.
    """
    if mode is not None and mode not in MODES:
        raise UsageError(f"mode is expected to be one of {', '.join(MODES)} but got {mode!r}")
    if metric is None:
        metric = _only_metric(checkpoints)
    elif checkpoints and not any(metric in c.record.metrics for c in checkpoints):
        raise unknown_metric(metric, checkpoints[-1].path, checkpoints[-1].record.metrics)
    chosen = mode or derive_mode(metric)
    if chosen is None:
        raise UsageError(
            f"the name of the metric {metric!r} does not tell which of its values are better",
            "Name the mode: max or min.",
        )
    return Criterion(metric, chosen)


def select_best(
    criterion: Criterion, checkpoints: Sequence[Checkpoint], count: int
) -> list[Checkpoint]:
    """Select the ``count`` best checkpoints, in the given order.

    Args:
        criterion: Metric and mode.
        checkpoints: Checkpoints to choose from.
        count: Number of checkpoints. Fewer are returned if fewer have a finite value.

    Raises:
        RunError: A checkpoint does not record the metric.
    """
    metric = criterion.metric
    for checkpoint in checkpoints:
        if metric not in checkpoint.record.metrics:
            raise unknown_metric(metric, checkpoint.path, checkpoint.record.metrics)
    values = [checkpoint.record.metrics[metric] for checkpoint in checkpoints]
    # NaN and infinity are never the best, and NaN would break the sort.
    finite = [position for position, value in enumerate(values) if math.isfinite(value)]
    # Of equal values the first is taken, in both modes.
    sign = -1.0 if criterion.mode == "max" else 1.0
    ranked = sorted(finite, key=lambda position: sign * values[position])
    return [checkpoints[position] for position in sorted(ranked[:count])]


def derive_mode(metric: str) -> Mode | None:
    """Derive the mode from a metric's dotted name; None if the name does not tell.

    The last part of the name decides if possible, as in ``loss.accuracy``.
    """
    names = metric.split(".")
    for part in (names[-1], metric):
        mode = _mode_of_words(words_of(part))
        if mode is not None:
            return mode
    return None


def _mode_of_words(words: frozenset[str]) -> Mode | None:
    """Derive the mode from the words of a name; None if the words do not decide."""
    lower = not words.isdisjoint(_LOWER)
    higher = not words.isdisjoint(_HIGHER)
    if not words.isdisjoint(_ERRORS):
        lower, higher = True, False
    elif not lower and not words.isdisjoint(_MOSTLY_HIGHER):
        higher = True
    if lower == higher:
        return None
    # neg_loss: the sign is reversed.
    if not words.isdisjoint(_NEGATIONS):
        lower = not lower
    if lower:
        return "min"
    return "max"


def unknown_metric(metric: str, path: Location | str, recorded: Iterable[str]) -> RunError:
    """Word the error for a metric that a checkpoint does not record.

    Args:
        metric: Name of the metric.
        path: Path of the checkpoint.
        recorded: Names of the metrics that the checkpoint records.
    """
    names = sorted(recorded, key=prominence)
    message = f"{path} records no metric {metric!r}"
    if not names:
        return RunError(message, "It records none at all.")
    if close := close_names(metric, names):
        return RunError(message, did_you_mean(close))
    return RunError(message, f"It records {first_few(names, 8)}.")


def _only_metric(checkpoints: Sequence[Checkpoint]) -> str:
    """Return the name of the only metric that checkpoints record.

    Raises:
        UsageError: There are several metrics.
        RunError: There is no metric.
    """
    names = choose_metric_columns(checkpoints).names
    if not names:
        raise RunError(
            "the checkpoints record no metric to choose the best by",
            "Select by `.last()`, `.every()` or `glob`.",
        )
    if len(names) > 1:
        raise UsageError(
            f"the best by which metric? The checkpoints record {first_few(list(names), 8)}",
            "Name the metric.",
        )
    return names[0]
