"""Names of numbers that were measured: a loss, an accuracy, the best of either so far."""

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
_BEST = frozenset(["best", "monitor"])
# Words that make a setting or a position of what stands beside them: loss_weight, best_epoch.
_SETTING_WORDS = frozenset([
    "alpha", "batch", "beta", "coef", "coeff", "count", "counter", "decay", "delta", "epoch",
    "epochs", "every", "factor", "fn", "freq", "func", "function", "gamma", "hash", "idx",
    "index", "interval", "iter", "iteration", "iterations", "k", "key", "lambda", "length",
    "limit", "margin", "mode", "name", "num", "number", "p", "patience", "period", "power",
    "rank", "scale", "scaler", "seed", "size", "smoothing", "std", "step", "steps",
    "temperature", "thr", "thresh", "threshold", "type", "update", "updates", "version",
    "weight", "weights", "weighted", "window",
])  # fmt: skip
# Entries that hold settings, whatever is called like a metric in them.
_SETTINGS = frozenset([
    "args", "cfg", "conf", "config", "ds_config", "hparams", "hyper_parameters",
    "hyperparameters", "hyper_params", "datamodule_hyper_parameters", "kwargs", "model_args",
    "model_config", "opt", "options", "params", "settings", "train_args",
])  # fmt: skip
_CHUNK = re.compile(r"[A-Za-z]+\d*")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def is_metric(path: str) -> bool:
    """Tell whether a number under a dotted path was measured, and not set."""
    names = path.split(".")
    # An element of a list belongs to a history of training, which stays true.
    if any(name in _SETTINGS or name.isdecimal() for name in names):
        return False
    if _words(names[-1]) & _SETTING_WORDS:
        return False
    return any(_words(name) & (METRIC_WORDS | _BEST) for name in names)


def _words(name: str) -> set[str]:
    """List the words of a name, in lower case, with the digits at their end and without."""
    words: set[str] = set()
    for chunk in _CHUNK.findall(name):
        words |= {chunk.lower(), chunk.rstrip("0123456789").lower()}
        words.update(word.lower() for word in _CAMEL.findall(chunk))
    return words
