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
        plain: dict[str, Any] = {"bn": self.state}
        if self.listed:
            plain[LAYERS] = self.listed
        return plain

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
        if wanted and not missed:
            state = "recomputed"
        elif len(missed) < len(wanted):
            state = "partly recomputed"
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
    if isinstance(patterns, str):
        patterns = [patterns]
    matched: set[str] = set()
    for pattern in patterns:
        names = _match(layer_names, pattern)
        if not names:
            raise UsageError(
                f"{pattern!r} matches no BatchNorm layer", _suggest_layers(layer_names, pattern)
            )
        matched.update(names)
    return matched


def _match(layers: Iterable[str], pattern: str) -> list[str]:
    return [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]


def _suggest_layers(layers: list[str], pattern: str) -> str:
    """Suggest layers for a pattern that matches none."""
    if close := close_patterns(pattern, layers):
        return did_you_mean(close)
    if not layers:
        return "There are none."
    return f"The layers are {first_few(layers, 6)}."
