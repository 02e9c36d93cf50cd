"""Layers of a network by the names of its tensors, for coefficients per layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ckptavg.averaging.planning.modules import split_name
from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.formats.statistics_names import running_statistics

_NUMBER = re.compile(r"(\d+)")
_NUMBERED = re.compile(r"\D*(?P<number>\d+)")

_NaturalKey = list[list[tuple[int, str]]]


def measured_tensors(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """List the tensors whose values decide the coefficients of layers.

    These are the averaged weights with two dimensions or more: of convolutions, linear layers and
    embeddings. In a network without such weights, each tensor is a layer.

    Args:
        tensors: All tensors of an average.
    """
    statistics = running_statistics(tensor.name for tensor in tensors)
    averaged: list[TensorPlan] = []
    for tensor in tensors:
        is_weight = tensor.name not in statistics and tensor.tied_to is None
        if is_averaged(tensor) and is_weight and tensor.output.numel:
            averaged.append(tensor)
    weights = [tensor for tensor in averaged if len(tensor.shape) > 1]
    return weights or averaged


def is_averaged(tensor: TensorPlan) -> bool:
    """Tell whether a tensor is averaged over several checkpoints, and not only converted."""
    return tensor.averaged and len(tensor.sources) > 1


def is_alphabetical(tensors: Sequence[TensorPlan]) -> bool:
    """Tell whether tensors stand in alphabetical order per type, as safetensors files keep them.

    Such an order says nothing about the order of layers.
    """
    by_type: dict[str, list[str]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype.name, []).append(tensor.name)
    return all(names == sorted(names) for names in by_type.values())


def assign_in_order(names: Sequence[str], measured: Sequence[str]) -> dict[str, str]:
    """Assign each tensor to itself if measured, else to the measured tensor before, else the first.

    Args:
        names: All names in the order of the network's layers.
        measured: Names of the measured tensors, in the same order.

    Returns:
        Name → name of the measured tensor.
    """
    known = set(measured)
    current = measured[0]
    assigned: dict[str, str] = {}
    for name in names:
        if name in known:
            current = name
        assigned[name] = current
    return assigned


def assign_by_name(names: Sequence[str], measured: Sequence[str]) -> dict[str, str]:
    """Assign each tensor to a measured tensor, where the order of layers is not known.

    A tensor belongs to the measured tensor of its own module, as a bias does; else to that of the
    sibling with the same number, as bn1 to conv1; else to the last one up to it in natural order,
    in which 2 comes before 10.

    Args:
        names: All names.
        measured: Names of the measured tensors.

    Returns:
        Name → name of the measured tensor.
    """
    by_module: dict[str, str] = {}
    by_number: dict[tuple[str, str], str] = {}
    for name in sorted(measured, key=_natural_key):
        module = split_name(name)[0]
        by_module.setdefault(module, name)
        if numbered := _parent_and_number(module):
            by_number.setdefault(numbered, name)
    ordered = sorted(names, key=_natural_key)
    assigned = assign_in_order(ordered, sorted(measured, key=_natural_key))
    known = set(measured)
    for name in names:
        module = split_name(name)[0]
        if name not in known:
            assigned[name] = _assign_to_neighbour(module, by_module, by_number) or assigned[name]
    return assigned


def _assign_to_neighbour(
    module: str, by_module: Mapping[str, str], by_number: Mapping[tuple[str, str], str]
) -> str | None:
    """Return the measured tensor of a module, or of its sibling with the same number."""
    if module in by_module:
        return by_module[module]
    numbered = _parent_and_number(module)
    if numbered is None:
        return None
    return by_number.get(numbered)


def _parent_and_number(module: str) -> tuple[str, str] | None:
    """Split a module's name, as in layer1.0.bn2, into its parent and its number; None without one.

    A name that is a number alone, as in a Sequential, is a position and pairs with no sibling.
    """
    parent, leaf = split_name(module[:-1])
    match = _NUMBERED.fullmatch(leaf)
    if match is None or leaf.isdecimal():
        return None
    return parent, match["number"]


def _natural_key(name: str) -> _NaturalKey:
    """Return a key that sorts names by modules, and numbers in names by value."""
    key: _NaturalKey = []
    for part in name.split("."):
        pieces: list[tuple[int, str]] = []
        for position, piece in enumerate(_NUMBER.split(part)):
            # Texts and numbers alternate, beginning with a text, which may be empty.
            pieces.append((int(piece), "") if position % 2 else (0, piece))
        key.append(pieces)
    return key
