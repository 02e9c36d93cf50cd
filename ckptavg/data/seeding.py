"""Temporary seeding of the global random number generators."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The generators are global. A loader may read from another loader, hence the reentrant lock.
_in_use = threading.RLock()


class Generators:
    """Private states of the global generators of torch, numpy and Python.

    Data loading draws crops, flips and orders from the global generators. Within ``in_use`` the
    generators continue from the end of the previous ``in_use``. On exit the caller's states are
    restored. One thread at a time is within ``in_use`` of any ``Generators``; the others wait.

    Args:
        seed: Initial seed of every generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states: dict[str, Any] = {}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Swap the private states in for the duration of a context."""
        with _in_use:
            callers = _states()
            # numpy may be imported between two uses; a generator is seeded when first seen.
            for name in callers.keys() - self._states.keys():
                _seed(name, self.seed)
            _restore(self._states)
            try:
                yield
            finally:
                self._states = _states()
                _restore(callers)


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's global generator of the CPU within a context, and restore its state on exit."""
    with _in_use:
        state = torch.get_rng_state()
        _seed("torch", seed)
        try:
            yield
        finally:
            torch.set_rng_state(state)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python permanently."""
    torch.manual_seed(seed)
    for name in _states():
        _seed(name, seed)


def _states() -> dict[str, Any]:
    """Return the states of the global generators by name; numpy only where imported."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        states["numpy"] = numpy.random.get_state()
    return states


def _seed(name: str, seed: int) -> None:
    """Seed a global generator."""
    if name == "torch":
        # Not torch.manual_seed, which also seeds the generators of all devices.
        torch.default_generator.manual_seed(seed)
    elif name == "python":
        random.seed(seed)
    else:
        # numpy takes seeds of 32 bits only.
        sys.modules["numpy"].random.seed(seed % 2**32)


def _restore(states: dict[str, Any]) -> None:
    """Set the states of global generators."""
    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        else:
            sys.modules["numpy"].random.set_state(state)
