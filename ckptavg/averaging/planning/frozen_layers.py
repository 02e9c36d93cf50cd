"""Layers that were frozen in training: the same running statistics in every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.reader import Reader
from ckptavg.formats.statistics_names import batch_count, layer_statistics, running_statistics
from ckptavg.runs.duplicates import Contents, SameWeights

_COARSE_BITS = 16
_Contents = list[tuple[str, bytes]]
"""Type and bytes of each tensor."""


def find_frozen_layers(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Find the layers whose running statistics were not updated while the weights were trained.

    The statistics are read. Where all are equal, weights are read too, until a difference is found:
    checkpoints with equal weights say nothing about training.

    Args:
        checkpoints: The checkpoints that are averaged, all of one network.

    Returns:
        Names of the layers, in order; none for a single checkpoint.

    Raises:
        CheckpointError: A file cannot be read, or has become shorter.
    """
    if len(checkpoints) < 2:
        return ()
    last = checkpoints[-1]
    layers = layer_statistics(last.tensors)
    with closing(Reader()) as reader:
        same = _find_same_statistics(reader, checkpoints, layers)
        counted = _find_counted(reader, checkpoints, same)
    # Where the same weights were saved several times, every layer looks frozen.
    if not same or (len(same) == len(layers) and not _are_trained(checkpoints)):
        return ()
    frozen: list[str] = []
    for layer, names in layers.items():
        if layer not in same:
            continue
        # A layer that never tracks statistics has no count, FrozenBatchNorm2d above all.
        has_count = batch_count(layer) in last.tensors
        # Batches were counted, so that rounding to 16 bits may have lost their updates.
        may_have_changed = layer in counted and _is_coarse(last, names)
        # An untouched layer has no statistics yet.
        if has_count and (may_have_changed or _is_untouched(same[layer])):
            continue
        frozen.append(layer)
    return tuple(frozen)


def _find_same_statistics(
    reader: Reader, checkpoints: Sequence[Checkpoint], layers: Mapping[str, Sequence[str]]
) -> dict[str, _Contents]:
    """Find the layers whose statistics are the same in all checkpoints.

    Args:
        reader: Reads the files.
        checkpoints: The checkpoints.
        layers: Layer → names of the layer's statistics.

    Returns:
        Layer → the statistics.
    """
    same = _read(reader, checkpoints[0], layers)
    for checkpoint in checkpoints[1:]:
        # Once all layers differ, nothing more is read.
        contents = _read(reader, checkpoint, {layer: layers[layer] for layer in same})
        same = {layer: same[layer] for layer in contents if contents[layer] == same[layer]}
    return same


def _find_counted(
    reader: Reader, checkpoints: Sequence[Checkpoint], layers: Iterable[str]
) -> set[str]:
    """Find the layers whose number of batches differs between checkpoints."""
    names = {layer: (batch_count(layer),) for layer in layers}
    first = _read(reader, checkpoints[0], names)
    counted: set[str] = set()
    for checkpoint in checkpoints[1:]:
        counts = _read(reader, checkpoint, names)
        counted.update(layer for layer in names if counts.get(layer) != first.get(layer))
    return counted


def _read(
    reader: Reader, checkpoint: Checkpoint, layers: Mapping[str, Sequence[str]]
) -> dict[str, _Contents]:
    """Read tensors of layers.

    Args:
        reader: Reads the files.
        checkpoint: The checkpoint.
        layers: Layer → names of tensors.

    Returns:
        Layer → contents, for the layers that have all of these tensors as plain bytes.
    """
    tensors: dict[str, list[Tensor]] = {}
    requests: list[tuple[Tensor, int, int]] = []
    for layer, names in layers.items():
        layer_tensors = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        if len(layer_tensors) == len(names) and all(tensor.dtype.size for tensor in layer_tensors):
            tensors[layer] = layer_tensors
            requests += [(tensor, 0, tensor.numel) for tensor in layer_tensors if tensor.numel]
    # Remote files get one request for all, not one per tensor.
    reader.fetch(requests)
    contents: dict[str, _Contents] = {}
    for layer, layer_tensors in tensors.items():
        contents[layer] = [
            (tensor.dtype.name, _bytes_of(reader, tensor)) for tensor in layer_tensors
        ]
    return contents


def _bytes_of(reader: Reader, tensor: Tensor) -> bytes:
    raw = bytearray(tensor.nbytes)
    if raw:
        reader.read(tensor, 0, tensor.numel, memoryview(raw))
    return bytes(raw)


def _is_untouched(statistics: _Contents) -> bool:
    """Tell whether statistics are the initial zeros and ones of a layer."""
    for dtype, raw in statistics:
        if raw:
            tensor = torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype))
            if not bool((tensor == 0).all()) and not bool((tensor == 1).all()):
                return False
    return True


def _is_coarse(checkpoint: Checkpoint, names: Iterable[str]) -> bool:
    """Tell whether statistics are of a type in which small changes may be lost."""
    return all(checkpoint.tensors[name].dtype.bits <= _COARSE_BITS for name in names)


def _are_trained(checkpoints: Sequence[Checkpoint]) -> bool:
    """Tell whether the weights of some checkpoint differ from the first's."""
    weights = SameWeights(Contents())
    weights.add(_without_statistics(checkpoints[0]))
    for checkpoint in checkpoints[1:]:
        if weights.find(_without_statistics(checkpoint)) is None:
            return True
    return False


def _without_statistics(checkpoint: Checkpoint) -> Checkpoint:
    statistics = running_statistics(checkpoint.tensors)
    tensors = dict(checkpoint.tensors)
    for name in statistics:
        tensors.pop(name, None)
    return replace(checkpoint, tensors=tensors)
