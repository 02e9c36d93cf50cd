"""Float buffers that are no weights: what they hold has no mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ckptavg.formats.table import Tensor
from ckptavg.modules import Modules
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
    buffers: set[str] = set()
    for module, tensors in modules:
        floats = {
            leaf: tensor
            for leaf, tensor in tensors.items()
            if tensor.dtype.kind == "float" and module + leaf in asked
        }
        for leaves in (
            _quantizer_scales(tensors),
            _ranges(floats, {*tensors, *modules.beside(module)}),
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


def _ranges(floats: Mapping[str, Tensor], company: Iterable[str]) -> Iterator[str]:
    """The least and the largest value that a quantizer's observer has seen.

    Args:
        floats: Tensors of the observer's module.
        company: Last parts of all names there and in the module around it.
    """
    observed = any(part in leaf for leaf in company for part in _OBSERVERS)
    for low in floats:
        high = low.replace("min", "max")
        if low == high or high not in floats or floats[low].shape != floats[high].shape:
            continue
        if observed or low == "min_val":
            yield from (low, high, *_BESIDE_RANGE)


def _codebook_sums(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Counts of a codebook's entries, and the sums over what was counted."""
    for leaf, counts in floats.items():
        if not counts.shape or counts.numel < 2 or not _COUNTS.fullmatch(leaf):
            continue
        entries = {
            other
            for other, tensor in floats.items()
            if len(tensor.shape) == len(counts.shape) + 1 and counts.shape[-1] in tensor.shape
        }
        if entries:
            yield leaf
            yield from (entry for entry in entries if _SUMS.fullmatch(entry))


def _masks(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Masks, which say so or stand beside the weight that they are a part of."""
    pruned = [leaf for leaf in floats if leaf.endswith("_orig")]
    parts = {
        leaf
        for weight in pruned
        for leaf, tensor in floats.items()
        if leaf.startswith(weight.removesuffix("orig")) and tensor.shape == floats[weight].shape
    }
    for leaf, tensor in floats.items():
        if (_MASK.fullmatch(leaf) or leaf in parts) and leaf not in pruned:
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
