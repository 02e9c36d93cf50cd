"""Layers that were frozen in training: the same running statistics in every checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.names import batch_count, layer_statistics, running_statistics
from ckptavg.formats.reader import Reader
from ckptavg.runs.duplicates import Contents, SameWeights

_COARSE_BITS = 16


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
        same = _read(reader, checkpoints[0], layers)
        for checkpoint in checkpoints[1:]:
            values = _read(reader, checkpoint, {layer: layers[layer] for layer in same})
            same = {layer: same[layer] for layer in values if values[layer] == same[layer]}
            if not same:
                return ()
        counts = [_read(reader, c, _count_names(same)) for c in checkpoints]
    # Where the same weights were saved several times, every layer looks frozen.
    if len(same) == len(layers) and not _are_trained(checkpoints):
        return ()
    frozen: list[str] = []
    for layer, names in layers.items():
        if layer not in same:
            continue
        # A layer that never tracks statistics has no count, FrozenBatchNorm2d above all.
        if batch_count(layer) in last.tensors:
            counted = any(count.get(layer) != counts[0].get(layer) for count in counts)
            # An untouched layer has no statistics yet.
            if _is_untouched(same[layer]) or (counted and _is_coarse(last, names)):
                continue
        frozen.append(layer)
    return tuple(frozen)


def _count_names(layers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {layer: (batch_count(layer),) for layer in layers}


def _read(
    reader: Reader, checkpoint: Checkpoint, layers: Mapping[str, Sequence[str]]
) -> dict[str, list[tuple[str, bytes]]]:
    """Read tensors of layers.

    Returns:
        Layer → type and bytes of each, for the layers that have all of them as plain bytes.
    """
    tensors: dict[str, list[Tensor]] = {}
    for layer, names in layers.items():
        layer_tensors = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        if len(layer_tensors) == len(names) and all(tensor.dtype.size for tensor in layer_tensors):
            tensors[layer] = layer_tensors
    reader.fetch(
        (t, 0, t.numel) for layer_tensors in tensors.values() for t in layer_tensors if t.numel
    )
    return {
        layer: [(tensor.dtype.name, _bytes_of(reader, tensor)) for tensor in layer_tensors]
        for layer, layer_tensors in tensors.items()
    }


def _bytes_of(reader: Reader, tensor: Tensor) -> bytes:
    raw = bytearray(tensor.nbytes)
    if raw:
        reader.read(tensor, 0, tensor.numel, memoryview(raw))
    return bytes(raw)


def _is_untouched(values: Sequence[tuple[str, bytes]]) -> bool:
    """Tell whether statistics are the initial zeros and ones of a layer."""
    for dtype, raw in values:
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
    return any(weights.find(_without_statistics(c)) is None for c in checkpoints[1:])


def _without_statistics(checkpoint: Checkpoint) -> Checkpoint:
    statistics = running_statistics(checkpoint.tensors)
    tensors = {name: t for name, t in checkpoint.tensors.items() if name not in statistics}
    return replace(checkpoint, tensors=tensors)
