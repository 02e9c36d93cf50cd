"""Objects of classes derived from dict, which a pickle fills item by item."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptavg.formats.safe_pickle.values import NumpyArray, Opaque, Refused, TensorView

_TENSORS = (TensorView, Refused, NumpyArray)
_LEVELS = 2  # a checkpoint of such a class, and the state dict in it


def unfold_mappings(tree: Any) -> Any:
    """Put dicts in the place of the objects that hold tensors by name.

    Objects without tensors stay: what is known of their classes may be needed.

    Returns:
        The tree, whose dicts and lists are changed; a dict where the tree itself is such an object.
    """
    root = [tree]
    waiting: list[Any] = [root]
    seen: set[int] = set()
    finder = _Mappings()
    while waiting:
        container = waiting.pop()
        if id(container) in seen or not isinstance(container, (dict, list, tuple, Opaque)):
            continue
        seen.add(id(container))
        if isinstance(container, Opaque):
            waiting.append(container.state)
            continue
        if not isinstance(container, tuple):
            for place, value in _places(container):
                container[place] = finder.unfold(value)
        waiting.extend(container.values() if isinstance(container, dict) else container)
    return root[0]


class _Mappings:
    """The objects of a tree that are dicts, each unfolded once."""

    def __init__(self) -> None:
        self._unfolded: dict[int, Any] = {}
        self._telling: dict[tuple[int, int], bool] = {}

    def unfold(self, value: Any) -> Any:
        """The value, or a dict where it is an object that holds tensors by name."""
        if not isinstance(value, Opaque) or not value.items:
            return value
        if id(value) not in self._unfolded:
            holds = self._names_tensors(value, _LEVELS)
            self._unfolded[id(value)] = dict(value.items) if holds else value
        return self._unfolded[id(value)]

    def _names_tensors(self, value: Any, levels: int) -> bool:
        key = (id(value), levels)
        if key not in self._telling:
            self._telling[key] = levels > 0 and any(
                isinstance(part, _TENSORS) or self._names_tensors(part, levels - 1)
                for part in _values(value)
            )
        return self._telling[key]


def _values(value: Any) -> list[Any]:
    """What a dict holds, or an object all of whose items have names."""
    if isinstance(value, dict):
        return [*value.values()]
    if isinstance(value, Opaque) and all(map(_is_pair, value.items)):
        return [part for _, part in value.items]
    return []


def _places(container: dict[Any, Any] | list[Any]) -> Iterator[tuple[Any, Any]]:
    return iter([*container.items()] if isinstance(container, dict) else [*enumerate(container)])


def _is_pair(item: Any) -> bool:
    """Whether an item was stored under a name."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)
