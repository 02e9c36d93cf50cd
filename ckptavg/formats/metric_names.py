"""Names of measured numbers: losses, accuracies, and the best values so far."""

from __future__ import annotations

import re

METRIC_WORDS = frozenset([
    "acc", "accuracy", "ap", "ar", "auc", "auprc", "auroc", "bleu", "brier", "cer", "chrf",
    "corr", "dcf", "dice", "ece", "eer", "elo", "em", "err", "error", "f1", "fid", "fitness",
    "fwiou", "iou", "kappa", "kid", "kl", "lpips", "loss", "losses", "map", "mae", "mape",
    "mar", "mcc", "mcd", "meteor", "metric", "metrics", "miou", "mse", "nll", "pck", "pearson",
    "perplexity", "pesq", "ppl", "precision", "psnr", "r2", "recall", "result", "results",
    "reward", "rmse", "rouge", "score", "scores", "sdr", "sensitivity", "sisdr", "sisnr", "snr",
    "spearman", "specificity", "ssim", "stoi", "success", "ter", "top", "winrate", "wer",
])  # fmt: skip
# Further words of metrics. In the name of a file they may stand for a model or a data set instead.
_FURTHER_METRIC_WORDS = frozenset([
    "ade", "bpb", "bpc", "bpd", "cider", "cost", "dsc", "elbo", "epe", "fde", "fnr", "fpr", "fvd",
    "hd95", "hits", "hmean", "hota", "idf1", "jaccard", "kld", "lddt", "mota", "mrr", "ndcg", "nmi",
    "objective", "prec", "return", "returns", "rew", "rewards", "rmsd", "spice", "tnr", "tpr",
])  # fmt: skip
_MEASURES = METRIC_WORDS | _FURTHER_METRIC_WORDS
_BEST = frozenset(["best", "monitor"])
_ACCURACIES = frozenset(["acc", "accuracy", "top"])
_LOSSES = frozenset(["loss", "losses"])
_VALIDATION = frozenset(["val", "valid", "validation", "eval", "dev"])
_TEST, _TRAINING = frozenset(["test"]), frozenset(["train", "training"])
# Periods over which a metric is averaged (loss_epoch). Without a metric beside: a clock.
_PERIODS = frozenset(["batch", "ep", "epoch", "it", "iter", "iteration", "step"])
# Words that turn the name of a metric into a setting or a position: loss_weight, best_epoch.
_SETTING_WORDS = _PERIODS | frozenset([
    "alpha", "beta", "coef", "coeff", "count", "counter", "decay", "delta", "epochs", "every",
    "factor", "fn", "frac", "fraction", "freq", "func", "function", "gamma", "hash", "idx",
    "index", "interval", "iterations", "k", "key", "lambda", "length", "limit", "lr", "margin",
    "mode", "name", "num", "number", "p", "patience", "percent", "period", "power", "rank",
    "ratio", "samples", "scale", "scaler", "seed", "size", "smoothing", "split", "std", "steps",
    "temperature", "thr", "thresh", "threshold", "type", "update", "updates", "version",
    "weight", "weights", "weighted", "window", "workers",
])  # fmt: skip
# Words of counters, clocks and rates of training, which say nothing about the weights.
_BOOKKEEPING = _PERIODS | frozenset([
    "batches", "count", "counter", "date", "elapsed", "epochs", "eta", "flos", "iterations",
    "iters", "itr", "lr", "lrs", "momentum", "num", "patience", "runtime", "second", "seconds",
    "seed", "steps", "time", "timestamp", "update", "updates", "version", "wd",
])  # fmt: skip
# Words of counters only where no metric stands beside: samples, but not a loss over samples.
_WEAK_BOOKKEEPING = frozenset([
    "duration", "examples", "gb", "mb", "mem", "memory", "samples", "sec", "secs", "tokens", "wall",
    "world",
])  # fmt: skip
_LEARNING_RATE = frozenset(["learning", "rate"])
# Entries that hold settings only, even under names of metrics.
SETTINGS = frozenset([
    "args", "cfg", "conf", "config", "ds_config", "hparams", "hyper_parameters",
    "hyperparameters", "hyper_params", "datamodule_hyper_parameters", "kwargs", "model_args",
    "model_config", "opt", "options", "params", "settings", "train_args",
])  # fmt: skip
_CHUNK = re.compile(r"[A-Za-z]+\d*")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def is_metric(path: str) -> bool:
    """Return True if the number under a dotted path is a measurement and not a setting."""
    names = path.split(".")
    # An element of a list belongs to a history of training, which stays true.
    if any(name in SETTINGS or name.isdecimal() for name in names):
        return False
    if is_setting(names[-1]) or is_bookkeeping(names[-1]):
        return False
    return any(words_of(name) & (_MEASURES | _BEST | _VALIDATION) for name in names)


def is_setting(name: str) -> bool:
    """Return True if a name is that of a setting or a position: loss_weight, best_epoch."""
    words = words_of(name)
    settings = words & _SETTING_WORDS
    return bool(settings) and not _is_of_period(words, settings)


def is_bookkeeping(name: str) -> bool:
    """Return True if a name is that of a clock, a rate or a count, and not of a metric."""
    words = words_of(name)
    accounts = words & _BOOKKEEPING
    if words >= _LEARNING_RATE or (words & _WEAK_BOOKKEEPING and not words & _MEASURES):
        return True
    return bool(accounts) and not _is_of_period(words, accounts)


def prominence(path: str) -> tuple[object, ...]:
    """Return a sort key for metrics, with the most informative about the weights first.

    Accuracies and losses come before other metrics. Validation comes before training. Best values
    so far come last, since an earlier checkpoint may have reached the best value.
    """
    names = path.split(".")
    last = words_of(names[-1])
    words = frozenset[str]().union(*map(words_of, names))
    is_accuracy, is_loss = not last.isdisjoint(_ACCURACIES), not last.isdisjoint(_LOSSES)
    is_known = not words.isdisjoint(_MEASURES | _VALIDATION) and not is_setting(names[-1])
    kinds = (is_accuracy or is_loss, is_known, True)
    return not words.isdisjoint(_BEST), kinds.index(True), _split(words), is_loss, len(names), path


def _split(words: frozenset[str]) -> int:
    """Rank the data that a metric was measured on: validation 0, test 1, unknown 2, training 3."""
    for rank, names in enumerate((_VALIDATION, _TEST)):
        if words & names:
            return rank
    return 3 if words & _TRAINING else 2


def _is_of_period(words: frozenset[str], others: frozenset[str]) -> bool:
    """Return True if the other words of a metric name only the period of a mean: loss_epoch."""
    return others <= _PERIODS and bool(words & _MEASURES) and not words & _BEST


def words_of(name: str) -> frozenset[str]:
    """List the words of a name in lower case, each with and without the digits at the end."""
    words: set[str] = set()
    for chunk in _CHUNK.findall(name):
        words |= {chunk.lower(), chunk.rstrip("0123456789").lower()}
        words.update(word.lower() for word in _CAMEL.findall(chunk))
    return frozenset(words)
