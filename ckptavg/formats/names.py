"""Names of tensors, and the layers that they tell of."""

from __future__ import annotations

from collections.abc import Iterable

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batchnorm_layers(names: Iterable[str]) -> tuple[str, ...]:
    """List the layers that keep running statistics, by their tensors' names."""
    existing = set(names)
    suffix = "running_mean"
    layers: list[str] = []
    for name in existing:
        prefix = name.removesuffix(suffix)
        # One statistic alone is not BatchNorm's: an observer may keep a mean too.
        if name.endswith(suffix) and prefix + "running_var" in existing:
            layers.append(prefix.rstrip("."))
    return tuple(sorted(layers))


def running_statistics(names: Iterable[str]) -> set[str]:
    """Return the names of the running statistics of all layers that keep some."""
    layers = batchnorm_layers(names)
    return {f"{layer}.{name}".lstrip(".") for layer in layers for name in _STATISTICS}
