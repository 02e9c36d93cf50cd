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
        hidden = submodule.state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, frozenset)) else ()
        entries = {**submodule.state["_parameters"], **submodule.state["_buffers"]}
        tensors |= {
            prefix + name: value
            for name, value in entries.items()
            if isinstance(name, str) and value is not None and name not in hidden
        }
        children = [
            (f"{prefix}{name}.", child)
            for name, child in submodule.state["_modules"].items()
            if isinstance(name, str) and is_module(child)
        ]
        # Reversed, since the last one in the list is visited first.
        waiting.extend(reversed(children))
    return tensors
