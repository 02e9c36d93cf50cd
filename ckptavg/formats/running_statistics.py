"""The state of running statistics: stale, frozen or recomputed, and for which layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptavg.errors import UsageError, first_few
from ckptavg.errors.spelling import close_patterns, did_you_mean

State = Literal["none", "own", "frozen", "stale", "partly recomputed", "recomputed"]
"""``none``: no layer keeps running statistics.
``own``: statistics and weights are of one checkpoint.
``frozen``: no layer changed in training, so all checkpoints have the same statistics.
``stale``: the statistics are of other weights.
``recomputed``: stale statistics were replaced.
``partly recomputed``: the statistics of some layers were replaced, the others are still stale."""

RECOMPUTED: tuple[State, ...] = ("recomputed", "partly recomputed")
# The entry beside ``bn`` in provenance and in results.
LAYERS = "bn_layers"


@dataclass(frozen=True)
class Statistics:
    """The state of running statistics, with the layers that are exceptions.

    Attributes:
        state: The state of all layers together.
        layers: Names of all layers that keep running statistics.
        frozen: Layers whose statistics did not change in training. Frozen statistics are kept.
        excluded: Layers that the user excluded from recomputation.
        not_recomputed: Layers that could not be recomputed, or that no data went through.
    """

    state: State
    layers: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    not_recomputed: tuple[str, ...] = ()

    @property
    def listed(self) -> dict[str, list[str]]:
        """The exceptional layers as plain values: kind → names, without empty kinds."""
        kinds = {
            "frozen": self.frozen,
            "excluded": self.excluded,
            "not_recomputed": self.not_recomputed,
        }
        return {kind: list(names) for kind, names in kinds.items() if names}

    @property
    def plain(self) -> dict[str, Any]:
        """The state under ``bn``, and the exceptional layers, if any, under ``bn_layers``."""
        return {"bn": self.state} | ({LAYERS: self.listed} if self.listed else {})

    def after(self, excluded: Collection[str], written: Collection[str]) -> Statistics:
        """Derive the state after a pass over training data.

        Args:
            excluded: Layers that the user excluded from the pass.
            written: Layers that got new statistics in the pass.
        """
        skipped = {*self.frozen, *excluded}
        wanted = [layer for layer in self.layers if layer not in skipped]
        missed = tuple(layer for layer in wanted if layer not in written)
        # Without a single recomputed layer the state stays.
        state = self.state
        if len(missed) < len(wanted):
            state = "partly recomputed" if missed else "recomputed"
        return Statistics(
            state,
            self.layers,
            self.frozen,
            tuple(layer for layer in self.layers if layer in excluded),
            missed,
        )


def match_layers(patterns: str | Sequence[str], layers: Iterable[str]) -> set[str]:
    """Find the layers whose names match shell patterns.

    Args:
        patterns: One or more patterns for names of layers, such as ``stem.*``.
        layers: Names of all layers that keep running statistics.

    Raises:
        UsageError: A pattern matches no layer.
    """
    layer_names = list(layers)
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [name for name in layer_names if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            listed = (
                f"The layers are {first_few(layer_names, 6)}." if layer_names else "There are none."
            )
            raise UsageError(
                f"{pattern!r} matches no BatchNorm layer",
                did_you_mean(close_patterns(pattern, layer_names)) or listed,
            )
        matched.update(names)
    return matched
