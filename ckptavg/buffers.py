"""Float buffers that are no weights: what they hold has no mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ckptavg.formats.table import Tensor
from ckptavg.modules import Modules, split_name
from ckptavg.samples import sample

_MASK = re.compile(r"(?:[^\n]*_)?masks?\d{0,3}")
_SCALES = ("scale", "scales", "scaling_factor")
_ZERO_POINTS = ("zero_point", "zero_points", "zeropoint", "zp")
_OBSERVERS = ("observer", "quant", "zero_point")  # of which a quantizer's names have one
_BESIDE_RANGE = ("eps", "histogram")  # what an observer keeps beside its range
_COUNTS = re.compile(r"(?:[^\n]*_)?(?:cluster_size|counts?|usage|elem|N)")
_SUMS = re.compile(r"(?:[^\n]*_)?(?:avg|sum|ema|ema_w)")
_COUNTER = re.compile(
    r"(?:[^\n]*_)?(?:num_batches_tracked|steps?|iterations?|iter|counter|count|num_updates"
    r"|n_averaged)"
)


def find_buffers(modules: Modules, names: Iterable[str]) -> set[str]:
    """Float buffers of a checkpoint that are no weights, by the company that they are in.

    These are pruning masks, the ranges and the scale of a quantizer, the counts and sums of a
    codebook, and counters that are floats. Of masks and counters some values are read: a mask
    holds zeros and ones, a counter a whole number.

    Args:
        modules: The checkpoint's tensors.
        names: Those that are asked about.

    Raises:
        CheckpointError: The values cannot be read.
    """
    asked = set(names)
    observed = {module: _has_quantizer(tensors) for module, tensors in modules}
    buffers: set[str] = set()
    for module, tensors in modules:
        around = split_name(module[:-1])[0]
        floats = {
            leaf: tensor
            for leaf, tensor in tensors.items()
            if tensor.dtype.kind == "float" and module + leaf in asked
        }
        for leaves in (
            _quantizer_scales(tensors),
            _ranges(floats, observed=observed[module] or observed.get(around, False)),
            _codebook_sums(floats),
            _masks(floats),
            _counters(floats),
        ):
            buffers.update(module + leaf for leaf in leaves if leaf in floats)
    return buffers


def _quantizer_scales(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Scales that stand beside as many integer zero points."""
    for leaf, points in tensors.items():
        ending = next((e for e in _ZERO_POINTS if leaf.endswith(e)), None)
        if ending is None or points.dtype.kind != "int":
            continue
        stem = leaf.removesuffix(ending)
        for name in _SCALES:
            scale = tensors.get(stem + name)
            if scale is not None and scale.numel == points.numel:
                yield stem + name


def _has_quantizer(leaves: Iterable[str]) -> bool:
    """Whether the names of a module's tensors are those of a quantizer."""
    return any(part in leaf for leaf in leaves for part in _OBSERVERS)


def _ranges(floats: Mapping[str, Tensor], *, observed: bool) -> Iterator[str]:
    """The least and the largest value that a quantizer's observer has seen.

    Args:
        floats: Tensors of the observer's module.
        observed: Whether a quantizer is there or in the module around it.
    """
    for low in floats:
        high = low.replace("min", "max")
        if low == high or high not in floats or floats[low].shape != floats[high].shape:
            continue
        if observed or low == "min_val":
            yield from (low, high, *_BESIDE_RANGE)


def _codebook_sums(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Counts of a codebook's entries, and the sums over what was counted."""
    extents = {
        (len(tensor.shape) - 1, extent) for tensor in floats.values() for extent in tensor.shape
    }
    counted: set[tuple[int, int]] = set()
    for leaf, counts in floats.items():
        key = (len(counts.shape), counts.shape[-1] if counts.shape else 0)
        if counts.numel > 1 and key in extents and _COUNTS.fullmatch(leaf):
            counted.add(key)
            yield leaf
    for leaf, tensor in floats.items():
        keys = {(len(tensor.shape) - 1, extent) for extent in tensor.shape}
        if keys & counted and _SUMS.fullmatch(leaf):
            yield leaf


def _masks(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Masks, which say so or stand beside the weight that they are a part of."""
    for leaf, tensor in floats.items():
        weight = floats.get(leaf.rpartition("_")[0] + "_orig")
        beside = weight is not None and weight is not tensor and weight.shape == tensor.shape
        if beside or _MASK.fullmatch(leaf):
            values = sample(tensor)
            if values.numel() and bool(((values == 0) | (values == 1)).all()):
                yield leaf


def _counters(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Counts of batches or steps."""
    for leaf, tensor in floats.items():
        if tensor.numel == 1 and _COUNTER.fullmatch(leaf):
            value = float(sample(tensor)[0])
            if value >= 0 and value.is_integer():
                yield leaf
