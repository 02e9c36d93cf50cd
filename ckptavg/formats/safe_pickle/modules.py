"""State dict of a pickled module, read without the class of the module."""

from __future__ import annotations

from typing import Any

from ckptavg.formats.safe_pickle.values import MalformedPickle, Opaque

# Limits that end the walk when a module contains itself.
_MOST_MODULES = 100_000
_LONGEST_NAME = 1000


def is_module(value: Any) -> bool:
    """Return True if a placeholder has the pickled state of a ``torch.nn.Module``."""
    if not isinstance(value, Opaque) or not isinstance(value.state, dict):
        return False
    parts = (value.state.get(key) for key in ("_parameters", "_buffers", "_modules"))
    return all(isinstance(part, dict) for part in parts)


def state_dict(module: Opaque) -> dict[str, Any]:
    """Build the state dict of a module, with the names and order of ``Module.state_dict()``.

    Raises:
        MalformedPickle: The module holds more modules than any network, or itself.
    """
    tensors: dict[str, Any] = {}
    waiting: list[tuple[str, Opaque]] = [("", module)]
    visited = 0
    while waiting:
        prefix, submodule = waiting.pop()
        visited += 1
        if visited > _MOST_MODULES or len(prefix) > _LONGEST_NAME:
            raise MalformedPickle("a module holds more others than any network does")
        for name, value in _persistent_tensors(submodule).items():
            tensors[prefix + name] = value
        children = [*submodule.state["_modules"].items()]
        # Reversed, since the last of the list is visited first.
        for name, child in reversed(children):
            if isinstance(name, str) and is_module(child):
                waiting.append((f"{prefix}{name}.", child))
    return tensors


def _persistent_tensors(module: Opaque) -> dict[str, Any]:
    """Return the parameters and persistent buffers of a module, without those of submodules."""
    hidden = module.state.get("_non_persistent_buffers_set")
    if not isinstance(hidden, (set, frozenset)):
        hidden = set()
    tensors: dict[str, Any] = {}
    for name, value in {**module.state["_parameters"], **module.state["_buffers"]}.items():
        if isinstance(name, str) and value is not None and name not in hidden:
            tensors[name] = value
    return tensors
