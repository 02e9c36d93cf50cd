"""Names of tensors, and the layers that they tell of."""

from __future__ import annotations

from collections.abc import Iterable

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def batchnorm_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the layers that keep running statistics, by their tensors' names."""
    known = set(names)
    suffix = "running_mean"
    return tuple(
        sorted(
            name[: -len(suffix)].rstrip(".")
            for name in known
            if name.endswith(suffix) and name[: -len(suffix)] + "running_var" in known
        )
    )


def running_statistics(names: Iterable[str]) -> set[str]:
    """Names of the running statistics of all layers that keep some."""
    layers = batchnorm_layers(names)
    return {f"{layer}.{name}".lstrip(".") for layer in layers for name in _STATISTICS}
