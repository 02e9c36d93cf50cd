"""Float buffers that are not weights, and whose values have no mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from ckptavg.averaging.planning.modules import Modules, split_name
from ckptavg.averaging.planning.samples import sample
from ckptavg.formats.checkpoint import Tensor

_MASK = re.compile(r"(?:[^\n]*_)?masks?\d{0,3}")
_SCALES = ("scale", "scales", "scaling_factor")
_ZERO_POINTS = ("zero_point", "zero_points", "zeropoint", "zp")
# Parts of names, of which a quantizer's tensors have one.
_OBSERVERS = ("observer", "quant", "zero_point")
# Further buffers of torch.ao's observers, which belong to the range.
_BESIDE_RANGE = ("eps", "histogram")
# vector-quantize-pytorch has cluster_size and embed_avg, pytorch-vq-vae _ema_cluster_size and
# _ema_w.
_COUNTS = re.compile(r"(?:[^\n]*_)?(?:cluster_size|counts?|usage|elem|N)")
_SUMS = re.compile(r"(?:[^\n]*_)?(?:avg|sum|ema|ema_w)")
# num_updates is of latent-diffusion's EMA, n_averaged of torch's AveragedModel.
_COUNTER = re.compile(
    r"(?:[^\n]*_)?(?:num_batches_tracked|steps?|iterations?|iter|counter|count|num_updates"
    r"|n_averaged)"
)


def find_buffers(modules: Modules, names: Iterable[str]) -> set[str]:
    """Find the float buffers of a checkpoint that are not weights, by name and neighbours.

    These are pruning masks, the ranges and the scale of a quantizer, the counts and sums of a
    codebook, and counters that are floats. Some values of masks and counters are read: a mask
    holds zeros and ones, a counter a whole number.

    Args:
        modules: The checkpoint's tensors.
        names: Names of the tensors to consider.

    Returns:
        Names of the buffers.

    Raises:
        CheckpointError: The values of a mask or a counter cannot be read.
    """
    considered = set(names)
    observed = {module: _has_quantizer(tensors) for module, tensors in modules}
    buffers: set[str] = set()
    for module, tensors in modules:
        # Fake quantizers keep the scale, and the observer below them the range.
        parent = split_name(module[:-1])[0]
        is_observed = observed[module] or observed.get(parent, False)
        floats: dict[str, Tensor] = {}
        for leaf, tensor in tensors.items():
            if tensor.dtype.kind == "float" and module + leaf in considered:
                floats[leaf] = tensor
        leaves = chain(
            _find_quantizer_scales(tensors),
            _find_ranges(floats, observed=is_observed),
            _find_codebook_sums(floats),
            _find_masks(floats),
            _find_counters(floats),
        )
        buffers.update(module + leaf for leaf in leaves if leaf in floats)
    return buffers


def _find_quantizer_scales(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Find the scales with the same number of integer zero points beside the scales."""
    for leaf, points in tensors.items():
        if points.dtype.kind != "int":
            continue
        for ending in _ZERO_POINTS:
            if leaf.endswith(ending):
                stem = leaf.removesuffix(ending)
                yield from _list_scales(tensors, stem, points.numel)
                break


def _list_scales(tensors: Mapping[str, Tensor], stem: str, numel: int) -> Iterator[str]:
    """List the scales of a stem that have a number of elements."""
    for ending in _SCALES:
        scale = tensors.get(stem + ending)
        if scale is not None and scale.numel == numel:
            yield stem + ending


def _has_quantizer(leaves: Iterable[str]) -> bool:
    """Tell whether a module has tensors with names of a quantizer."""
    return any(word in leaf for leaf in leaves for word in _OBSERVERS)


def _find_ranges(floats: Mapping[str, Tensor], *, observed: bool) -> Iterator[str]:
    """Find the smallest and the largest value that a quantizer's observer records.

    Args:
        floats: Tensors of the observer's module.
        observed: True if a quantizer is in the same module or in the one around it.
    """
    for low in floats:
        high = low.replace("min", "max")
        if low == high or high not in floats or floats[low].shape != floats[high].shape:
            continue
        # The name of torch.ao's own observers needs no quantizer beside it.
        if observed or low == "min_val":
            yield from (low, high, *_BESIDE_RANGE)


def _find_codebook_sums(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Find the counts of a codebook's entries, and the sums over the counted vectors."""
    # Counts have one dimension less than their codebook, and end with the number of its entries.
    countable: set[tuple[int, int]] = set()
    for tensor in floats.values():
        countable.update(_list_count_shapes(tensor))
    counted: set[tuple[int, int]] = set()
    for leaf, counts in floats.items():
        if counts.numel > 1 and counts.shape and _COUNTS.fullmatch(leaf):
            shape = (len(counts.shape), counts.shape[-1])
            if shape in countable:
                counted.add(shape)
                yield leaf
    for leaf, tensor in floats.items():
        if not counted.isdisjoint(_list_count_shapes(tensor)) and _SUMS.fullmatch(leaf):
            yield leaf


def _list_count_shapes(codebook: Tensor) -> Iterator[tuple[int, int]]:
    """List the dimensions and the last extents that the counts of a codebook may have."""
    for extent in codebook.shape:
        yield len(codebook.shape) - 1, extent


def _find_masks(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Find the masks of zeros and ones, by name or by a pruned weight beside the mask."""
    for leaf, tensor in floats.items():
        # torch.nn.utils.prune keeps weight_orig and weight_mask.
        weight = floats.get(leaf.rpartition("_")[0] + "_orig")
        fits = weight is not None and weight is not tensor and weight.shape == tensor.shape
        if fits or _MASK.fullmatch(leaf):
            values = sample(tensor)
            if values.numel() and bool(((values == 0) | (values == 1)).all()):
                yield leaf


def _find_counters(floats: Mapping[str, Tensor]) -> Iterator[str]:
    """Find the counts of batches or steps."""
    for leaf, tensor in floats.items():
        if tensor.numel == 1 and _COUNTER.fullmatch(leaf):
            value = float(sample(tensor)[0])
            if value >= 0 and value.is_integer():
                yield leaf
