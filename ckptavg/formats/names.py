"""Names of tensors, and the layers that they tell of."""

from __future__ import annotations

from collections.abc import Iterable


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
