"""The state that the running statistics of some weights are in, layer by layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckptavg.errors import UsageError, first_few
from ckptavg.errors.spelling import close_patterns, did_you_mean

State = Literal["none", "own", "frozen", "stale", "partly recomputed", "recomputed"]
"""``none``: there are no such layers. ``own``: statistics and weights are of one checkpoint.
``frozen``: no layer changed its statistics in training, so that those of all weights are the same.
``stale``: they are of other weights. ``recomputed``: they were stale, and no longer are.
``partly recomputed``: those of some layers still are."""

RECOMPUTED: tuple[State, ...] = ("recomputed", "partly recomputed")
LAYERS = "bn_layers"  # beside ``bn`` in provenance and in results


@dataclass(frozen=True)
class Statistics:
    """The state of running statistics, with the layers that it does not hold for.

    Attributes:
        state: That of them all.
        layers: Names of all layers that keep some.
        frozen: Those whose statistics did not change in training: they are kept.
        excluded: Those that the user kept from being recomputed.
        not_recomputed: Those that were to be and could not, or that no data went through.
    """

    state: State
    layers: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    not_recomputed: tuple[str, ...] = ()

    @property
    def listed(self) -> dict[str, list[str]]:
        """The layers that stand out, as plain values: kind → names, where there are any."""
        kinds = {
            "frozen": self.frozen,
            "excluded": self.excluded,
            "not_recomputed": self.not_recomputed,
        }
        return {kind: list(names) for kind, names in kinds.items() if names}

    @property
    def plain(self) -> dict[str, Any]:
        """The state as ``bn`` and the layers that stand out as ``bn_layers``."""
        return {"bn": self.state} | ({LAYERS: self.listed} if self.listed else {})

    def after(self, excluded: Collection[str], written: Collection[str]) -> Statistics:
        """Their state after a pass over training data.

        Args:
            excluded: Layers that the user kept from it.
            written: Layers that it gave new statistics.
        """
        kept = {*self.frozen, *excluded}
        wanted = [layer for layer in self.layers if layer not in kept]
        missed = tuple(layer for layer in wanted if layer not in written)
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
    """Find the layers that shell patterns name.

    Args:
        patterns: Of names of layers, such as ``stem.*``.
        layers: Names of all layers that keep running statistics.

    Raises:
        UsageError: A pattern matches none of them.
    """
    known = list(layers)
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            listed = f"The layers are {first_few(known, 6)}." if known else "There are none."
            raise UsageError(
                f"{pattern!r} matches no BatchNorm layer",
                did_you_mean(close_patterns(pattern, known)) or listed,
            )
        matched.update(names)
    return matched


def listed_layers(made: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the layers that provenance says ``bn`` does not hold for, by kind."""
    listed = made.get(LAYERS)
    known = listed.items() if isinstance(listed, Mapping) else ()
    return {
        kind: layers
        for kind, layers in known
        if isinstance(layers, list) and all(isinstance(layer, str) for layer in layers)
    }


def with_statistics(made: Mapping[str, Any], statistics: Statistics) -> dict[str, Any]:
    """Return provenance that tells of other statistics."""
    rest = {key: value for key, value in made.items() if key != LAYERS}
    return {**rest, **statistics.plain}
