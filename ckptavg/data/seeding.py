"""The global generators of random numbers, seeded for a while and then left as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Generators:
    """The states of torch's, numpy's and Python's own generators for one purpose.

    What loads data draws crops, flips and orders from them. Within ``in_use`` they go on from where
    they were at its last end; outside they are the caller's, who sees nothing of it.

    Args:
        seed: Of all of them at first.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states: dict[str, Any] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put these states in the place of the caller's for the time being."""
        callers = _states()
        for name in callers.keys() - self._states.keys():  # numpy may come late
            _seed(name, self.seed)
        _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(callers)


def seed_all(seed: int) -> None:
    """Seed all of them, on every device, for good."""
    torch.manual_seed(seed)
    for name in _states():
        _seed(name, seed)


def _states() -> dict[str, Any]:
    """The generators' states by name, numpy's where it has been imported."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        found["numpy"] = numpy.random.get_state()
    return found


def _seed(name: str, seed: int) -> None:
    if name == "torch":
        torch.default_generator.manual_seed(seed)
    elif name == "python":
        random.seed(seed)
    else:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _restore(states: dict[str, Any]) -> None:
    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        else:
            sys.modules["numpy"].random.set_state(state)
