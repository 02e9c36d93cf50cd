"""Conversion to dicts of pickled objects whose classes derive from dict.

A pickle fills such objects item by item.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptavg.formats.safe_pickle.values import NumpyArray, Opaque, Refused, TensorView

_TENSORS = (TensorView, Refused, NumpyArray)
# Levels of containers: a checkpoint, and the state dict within.
_LEVELS = 2


def unfold_mappings(tree: Any) -> Any:
    """Replace objects that hold tensors by name with dicts.

    Objects without tensors stay, since their class may be needed later.

    Returns:
        The tree, whose dicts and lists are changed; a dict where the tree itself is such an object.
    """
    root = [tree]
    waiting: list[Any] = [root]
    visited: set[int] = set()
    finder = _Mappings()
    while waiting:
        container = waiting.pop()
        if id(container) in visited or not isinstance(container, (dict, list, tuple, Opaque)):
            continue
        visited.add(id(container))
        if isinstance(container, Opaque):
            waiting.append(container.state)
            continue
        if not isinstance(container, tuple):
            for key, value in _places(container):
                container[key] = finder.unfold(value)
        if isinstance(container, dict):
            waiting.extend(container.values())
        else:
            waiting.extend(container)
    return root[0]


class _Mappings:
    """Converter of dict-like objects, which converts each object of a tree once."""

    def __init__(self) -> None:
        self._unfolded: dict[int, Any] = {}
        self._telling: dict[tuple[int, int], bool] = {}

    def unfold(self, value: Any) -> Any:
        """Convert an object that holds tensors by name to a dict; return any other value."""
        if not isinstance(value, Opaque) or not value.items:
            return value
        if id(value) not in self._unfolded:
            self._unfolded[id(value)] = value
            if self._names_tensors(value, _LEVELS):
                self._unfolded[id(value)] = dict(value.items)
        return self._unfolded[id(value)]

    def _names_tensors(self, value: Any, levels: int) -> bool:
        """Return True if a value holds tensors by name, down to a number of levels."""
        key = (id(value), levels)
        if key not in self._telling:
            self._telling[key] = levels > 0 and any(
                isinstance(part, _TENSORS) or self._names_tensors(part, levels - 1)
                for part in _values(value)
            )
        return self._telling[key]


def _values(value: Any) -> list[Any]:
    """List the values of a dict, or of an object whose items all have names."""
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, Opaque) and all(map(_is_pair, value.items)):
        return [part for _, part in value.items]
    return []


def _places(container: dict[Any, Any] | list[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the keys or indices of a container with the values, safe against changes."""
    if isinstance(container, dict):
        yield from list(container.items())
    else:
        yield from list(enumerate(container))


def _is_pair(item: Any) -> bool:
    """Return True if an item was stored under a name."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
