"""A saved object as a tree of containers, with tensors and values at dotted paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptavg.errors import short
from ckptavg.formats.safe_pickle import modules
from ckptavg.formats.safe_pickle.values import Opaque, Refused, Sharded, Storage, TensorView
from ckptavg.formats.training_record import TRAINING_STATE

# The entry of a state dict with the extra state of a module (get_extra_state).
EXTRA_STATE = "_extra_state"
TENSORS = (TensorView, Sharded, Refused)
Entry = Mapping[Any, Any]
# Characters. Nobody types a longer name, and an untrusted file may have names of megabytes.
LONGEST_NAME = 500
# Digits of an index. No list is longer, and ``int`` takes quadratic time for very many digits.
_LONGEST_INDEX = 9


@dataclass(frozen=True)
class EntryLocation:
    """The location of the weights in a saved object.

    Attributes:
        value: The object that holds the weights.
        entry: The same object as a state dict.
        within_plain: True if all containers around the object are dicts, lists and tuples.
    """

    value: Any
    entry: Entry
    within_plain: bool

    @property
    def pickled(self) -> bool:
        """True if the weights belong to a module that was pickled whole."""
        return self.entry is not self.value


def join(*parts: str) -> str:
    """Join the parts that are not empty into a dotted path."""
    return ".".join(part for part in parts if part)


def holds_tensors(value: Any) -> bool:
    """Return True if a value is a dict with named tensors."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and isinstance(entry, TENSORS) for name, entry in value.items()
    )


def count_tensors(tree: Any, visited: set[int] | None = None) -> int:
    """Count the tensors in a saved value. A container that is held many times counts once.

    Args:
        tree: The value.
        visited: Identities of containers that have been counted. Containers met here are added.
    """
    visited = set() if visited is None else visited
    waiting, count = [tree], 0
    while waiting:
        value = waiting.pop()
        count += isinstance(value, TENSORS)
        # By identity: a pickle of a few bytes can hold one list in itself exponentially often.
        if id(value) in visited or not isinstance(value, (dict, list, tuple, Opaque)):
            continue
        visited.add(id(value))
        if isinstance(value, Opaque):
            waiting.append(value.state)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        else:
            waiting.extend(value)
    return count


def refuse_unknown(entry: Entry) -> Entry:
    """Mark the objects in an entry that are made of tensors or storages as refused tensors.

    A tensor of a class that a library defines is one example. As a plain value the tensor would be
    lost without notice.
    """
    made_of_tensors: dict[int, bool] = {}
    objects: dict[str, Refused] = {}
    for name, value in entry.items():
        if not isinstance(value, Opaque) or not _may_be_tensor(name):
            continue
        contents = (value.args, value.state)
        for content in contents:
            # Many objects may share one state, which is searched once.
            if id(content) not in made_of_tensors:
                made_of_tensors[id(content)] = _is_made_of_tensors(content)
        if any(made_of_tensors[id(content)] for content in contents):
            objects[name] = Refused(f"an object of {short(str(value.type))}, not known here")
    return {**entry, **objects} if objects else entry


def _may_be_tensor(name: Any) -> bool:
    """Return True unless a name is that of a module's extra state or of training state."""
    if not isinstance(name, str) or len(name) > LONGEST_NAME or name.endswith(EXTRA_STATE):
        return False
    return not TRAINING_STATE.fullmatch(name)


def _is_made_of_tensors(content: Any) -> bool:
    """Return True if a container directly holds a tensor or a storage."""
    if isinstance(content, dict):
        content = content.values()
    elif not isinstance(content, (list, tuple)):
        return False
    return any(isinstance(value, (*TENSORS, Storage)) for value in content)


def locate(tree: Any, key: str) -> EntryLocation | None:
    """Find an entry by dotted path; return None if the path leads nowhere.

    Args:
        tree: The saved object.
        key: The path. The names in the path may contain dots.

    Raises:
        MalformedPickle: A module at the end of the path holds itself.
    """
    steps = walk(tree, key)
    if steps is None:
        return None
    within_plain = not any(isinstance(value, Opaque) for _, value in steps[:-1])
    value = steps[-1][1]
    entry = value
    if modules.is_module(value):
        entry = modules.state_dict(value)
    return EntryLocation(value, entry, within_plain)


def walk(tree: Any, key: str) -> list[tuple[str, Any]] | None:
    """List the values on a dotted path, from the tree to the value that the path names.

    Returns:
        Dotted path and value of each step; None if the path leads nowhere.
    """
    steps: list[tuple[str, Any]] = [("", tree)]
    remaining = key
    while remaining:
        above, value = steps[-1]
        # The longest name that exists is taken, since names may contain dots.
        for name in prefixes(remaining):
            below = child(value, name)
            if below is not None:
                steps.append((join(above, name), below))
                remaining = remaining[len(name) + 1 :]
                break
        else:
            return None
    return steps


def value_at(tree: Any, key: str) -> Any:
    """Return the value that a dotted path names; None if the path leads nowhere."""
    steps = walk(tree, key)
    if steps is None:
        return None
    return steps[-1][1]


def child(container: Any, name: str) -> Any:
    """Return the value under a name in a dict, or at an index in a list; None if absent.

    For an object of an unknown class, the name is that of an attribute.
    """
    if isinstance(container, Opaque):
        container = container.state
    if isinstance(container, dict) and name in container:
        return container[name]
    if len(name) > _LONGEST_INDEX or not (name.isascii() and name.isdecimal()):
        return None
    index = int(name)
    if isinstance(container, (list, tuple)) and index < len(container):
        return container[index]
    # A dict may have integers as keys, as the state of an optimizer does.
    if isinstance(container, dict):
        return container.get(index)
    return None


def entry_within(tree: Mapping[Any, Any], name: str, inner: str) -> Any:
    """Return the value under an inner name in an entry; None if there is no such value.

    Args:
        tree: The saved object.
        name: Name of the entry.
        inner: Name in the entry.
    """
    entry = tree.get(name)
    return entry.get(inner) if isinstance(entry, dict) else None


def identity(view: TensorView) -> object:
    """Return a key that is equal for views of the very same elements."""
    return view.storage, view.dtype.name, view.offset, view.shape, view.stride


def children(container: Any) -> list[tuple[str, Any]]:
    """List the values in a dict, a list or a tuple that a dotted path can name, in order."""
    if isinstance(container, (list, tuple)):
        return [(str(index), value) for index, value in enumerate(container)]
    if not isinstance(container, dict):
        return []
    named: list[tuple[str, Any]] = []
    for name, value in container.items():
        # By the exact type: True is an int too, but no path can name True.
        if type(name) is int or (isinstance(name, str) and len(name) <= LONGEST_NAME):
            named.append((str(name), value))
    return named


def prefixes(dotted: str) -> list[str]:
    """List the beginnings of a dotted path, longest first: ``a.b.c``, ``a.b``, ``a``.

    Names may contain dots, so each beginning may be a single name.
    """
    names = dotted.split(".")
    return [".".join(names[:count]) for count in range(len(names), 0, -1)]
