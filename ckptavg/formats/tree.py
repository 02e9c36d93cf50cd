"""A saved object as a tree of containers: its tensors, and what stands at a dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptavg.errors import short
from ckptavg.formats import pickled_module
from ckptavg.formats.inert_values import Opaque, Refused, Sharded, Storage, TensorView
from ckptavg.formats.record import TRAINING_STATE

EXTRA_STATE = "_extra_state"  # a module's own values in its state dict
TENSORS = (TensorView, Sharded, Refused)
Entry = Mapping[Any, Any]
LONGEST_NAME = 500  # characters of a name that could be typed after --key
_LONGEST_INDEX = 9  # digits


@dataclass(frozen=True)
class Place:
    """Where in a saved object the weights lie.

    Attributes:
        value: The object that holds them.
        entry: The same as a state dict.
        within_plain: Whether all that it lies in are dicts, lists and tuples.
    """

    value: Any
    entry: Entry
    within_plain: bool

    @property
    def pickled(self) -> bool:
        """Whether the weights are those of a module that was pickled whole."""
        return self.entry is not self.value


def join(*parts: str) -> str:
    """A dotted path of those parts that are not empty."""
    return ".".join(part for part in parts if part)


def holds_tensors(value: Any) -> bool:
    """Whether a value is a dict that holds tensors by name."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(part, TENSORS) for name, part in value.items()
    )


def count_tensors(tree: Any) -> int:
    """How many tensors a saved value holds. What it holds many times is looked into once."""
    seen: set[int] = set()
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        count += isinstance(value, TENSORS)
        if id(value) in seen or not isinstance(value, (dict, list, tuple, Opaque)):
            continue
        seen.add(id(value))
        if isinstance(value, Opaque):
            waiting.append(value.state)
        else:
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return count


def refuse_unknown(entry: Entry) -> Entry:
    """An entry whose objects that are made of tensors or storages are refused tensors.

    A tensor of a library's own class is one: it would be lost, were it taken for a value.
    """
    known: dict[int, bool] = {}
    objects: dict[str, Refused] = {}
    for name, value in entry.items():
        if not isinstance(value, Opaque) or not _may_be_tensor(name):
            continue
        parts = (value.args, value.state)
        for part in parts:
            if id(part) not in known:
                known[id(part)] = _is_made_of_tensors(part)
        if any(known[id(part)] for part in parts):
            objects[name] = Refused(f"an object of {short(str(value.type))}, not known here")
    return {**entry, **objects} if objects else entry


def _may_be_tensor(name: Any) -> bool:
    """Whether a value's name is neither that of a module's own values nor of training state."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or name.endswith(EXTRA_STATE):
        return False
    return not TRAINING_STATE.fullmatch(name)


def _is_made_of_tensors(part: Any) -> bool:
    values = part.values() if isinstance(part, dict) else part
    if not isinstance(part, (dict, list, tuple)):
        return False
    return any(isinstance(value, (*TENSORS, Storage)) for value in values)


def locate(tree: Any, key: str) -> Place | None:
    """Find an entry by its dotted path, whose parts may have dots themselves; None if it is not.

    Raises:
        MalformedPickle: A module at that place holds itself.
    """
    steps = walk(tree, key)
    if steps is None:
        return None
    within_plain = not any(isinstance(value, Opaque) for _, value in steps[:-1])
    value = steps[-1][1]
    if pickled_module.is_module(value):
        return Place(value, pickled_module.state_dict(value), within_plain)
    return Place(value, value, within_plain)


def walk(tree: Any, key: str) -> list[tuple[str, Any]] | None:
    """What lies on a dotted path, from the tree itself to what the path names.

    Returns:
        Dotted path and value of each step; None where the path leads nowhere.
    """
    steps: list[tuple[str, Any]] = [("", tree)]
    rest = key
    while rest:
        above, value = steps[-1]
        match = next((k for k in prefixes(rest) if child(value, k) is not None), None)
        if match is None:
            return None
        steps.append((join(above, match), child(value, match)))
        rest = rest[len(match) + 1 :]
    return steps


def child(container: Any, name: str) -> Any:
    """What a dict holds under a name or a list at an index; None where there is nothing.

    Of an object the attributes count.
    """
    container = container.state if isinstance(container, Opaque) else container
    if isinstance(container, dict) and name in container:
        return container[name]
    if len(name) > _LONGEST_INDEX or not (name.isascii() and name.isdecimal()):
        return None
    index = int(name)
    if isinstance(container, (list, tuple)):
        return container[index] if index < len(container) else None
    return container.get(index) if isinstance(container, dict) else None


def children(container: Any) -> list[tuple[str, Any]]:
    """The parts of a dict, a list or a tuple that a dotted path can name, in order."""
    if isinstance(container, (list, tuple)):
        return [(str(index), part) for index, part in enumerate(container)]
    entries = container.items() if isinstance(container, dict) else ()
    return [
        (str(name), part)
        for name, part in entries
        if type(name) is int or (isinstance(name, str) and len(name) <= LONGEST_NAME)
    ]


def prefixes(dotted: str) -> list[str]:
    """``a.b.c``, ``a.b``, ``a``: keys may themselves contain dots."""
    parts = dotted.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
