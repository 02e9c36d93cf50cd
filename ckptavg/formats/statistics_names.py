"""Names of tensors, and the layers with running statistics found by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Layers outside torch use other words: running_std (batch renormalization),
# running_covar (complex numbers), moving_variance, running_wm (whitening), avg_var.
_PREFIX = r"(?:running|moving)_(?:avg_|average_)?"
# Prefixes that count only before mean, var and std: the other tensors are no statistics.
_OTHER_PREFIX = r"(?:ema|avg|average|pop|population)_"
_SUFFIX = r"_(?:ema|running|moving)"
_MEAN = re.compile(
    rf"{_PREFIX}(?:mean|avg|mu)[^\n]*|{_OTHER_PREFIX}mean|mean{_SUFFIX}", re.IGNORECASE
)
_SPREAD = re.compile(
    rf"{_PREFIX}(?:var|std|cov|sigma|(?:mean_?)?sq|ms|m2|v[ri]{{2}}|wm|whiten|proj)[^\n]*"
    rf"|{_OTHER_PREFIX}(?:var|variance|std)|(?:var|variance|std){_SUFFIX}",
    re.IGNORECASE,
)
_PLAIN_MEAN, _PLAIN_SPREAD = re.compile("_?mean"), re.compile("_?(?:var|variance|std)")
_WEIGHTS = frozenset({"weight", "gamma", "scale"})
_COUNT = "num_batches_tracked"


def layer_statistics(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Find the layers that keep running statistics, by the names of the tensors.

    Returns:
        Layer → full names of the layer's means and spreads (variances, deviations), layers sorted
        by name.
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    layers: dict[str, tuple[str, ...]] = {}
    for module in sorted(modules):
        leaves = modules[module]
        spreads = [leaf for leaf in leaves if _SPREAD.fullmatch(leaf)]
        means = [leaf for leaf in leaves if _MEAN.fullmatch(leaf) and leaf not in spreads]
        # Without a weight, mean and var are the constants that images are normalized with.
        if not spreads and not means and not _WEIGHTS.isdisjoint(leaves):
            spreads = [leaf for leaf in leaves if _PLAIN_SPREAD.fullmatch(leaf)]
            means = [leaf for leaf in leaves if _PLAIN_MEAN.fullmatch(leaf)]
            if not spreads or not means:
                continue
        # A spread without a mean is an observer's, unless the layer also has a weight.
        if spreads and (means or "weight" in leaves):
            layers[module] = tuple(_join(module, leaf) for leaf in (*means, *spreads))
    return layers


def batchnorm_layers(names: Iterable[str]) -> tuple[str, ...]:
    """List the layers that keep running statistics, by the names of the tensors."""
    return tuple(layer_statistics(names))


def running_statistics(names: Iterable[str]) -> set[str]:
    """Return the names of all running statistics and of all layers' batch counters."""
    tensors: set[str] = set()
    for layer, statistics in layer_statistics(names).items():
        tensors.update(statistics)
        tensors.add(batch_count(layer))
    return tensors


def batch_count(layer: str) -> str:
    """Return the name of the tensor that counts the batches in a layer's running statistics."""
    return _join(layer, _COUNT)


def updated_layers(layers: Mapping[str, Iterable[str]], written: Iterable[str]) -> set[str]:
    """Find the layers whose running statistics were all replaced.

    Args:
        layers: Layer → names of the layer's statistics.
        written: Names of the statistics that were replaced.
    """
    names = set(written)
    return {layer for layer, statistics in layers.items() if names.issuperset(statistics)}


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf
