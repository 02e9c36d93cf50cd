"""Packed and quantized weights, told by what stands beside them: their integers have no mean."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptavg.errors import UnsupportedTensorError, first_few, short
from ckptavg.formats import Checkpoint, Tensor, adapter, bounded_json
from ckptavg.formats.storage import Location
from ckptavg.modules import Modules, split_name
from ckptavg.samples import sample

_BEFORE = "Average the checkpoints before quantization"
# Endings of a packed tensor's name, and of scales that stand in their place.
_PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weight", ("weight_scale", "weight_scale_inv", "weight_scales", "weight.scales")),
    ("", (".absmax", ".quant_map")),
    (".weight", (".SCB", ".weight_format")),
    (".qweight", (".scales", ".qzeros")),
    (".weight_packed", (".weight_scale",)),
    ("_blocks", ("_scales",)),
)
_MEANING = re.compile(
    r"scale|absmax|scb|zero|quant_map|biases|codebook|centroid|lookup|lut"  # of packed integers
)
_CODEBOOK = re.compile(r"codebook|centroid|lookup|lut")
_MOST_SCALES = 100  # of a layer
_WEIGHT = re.compile(r"[_q]?(?:weight|kernel|data)(?:_packed|_q|_int)?|w_q")
_QUANTIZED = re.compile(r"quantization|quantized|quant_(?:method|type|config)")
_FEWEST = 16  # elements that weights are packed into
_WORD, _INDEX = 32, 64  # bits of integers that weights are packed into, and of indices
_CONFIGS: dict[str, tuple[str, ...]] = {  # file → entries one of which tells of quantization
    "config.json": ("quantization_config", "quantization", "compression_config"),
    "hf_quant_config.json": ("quantization",),
    "quantize_config.json": ("bits",),
    "quant_config.json": ("bits", "w_bit"),
}
_NOTHING = ("", "null", "none", "false", "{}", "0")


@dataclass(frozen=True)
class Packed:
    """A tensor that may hold quantized weights.

    Attributes:
        name: Its name.
        scales: The floats that give it a meaning.
        certain: Whether its name tells; else it does where it differs between checkpoints, which
            an index table does not.
    """

    name: str
    scales: tuple[str, ...]
    certain: bool


def check_not_quantized(checkpoints: Sequence[Checkpoint], averages: Callable[[str], bool]) -> None:
    """Make sure that no weights are quantized, as far as they or their scales are averaged.

    Args:
        checkpoints: What was selected, in order.
        averages: Whether a tensor is to be averaged, by its name.

    Raises:
        UnsupportedTensorError: Some are.
        CheckpointError: Values that tell cannot be read.
    """
    last = checkpoints[-1]
    if why := declared(last):
        raise UnsupportedTensorError(
            f"{last.path} holds quantized weights: {why} says so", f"{_BEFORE}."
        )
    quantized: list[Packed] = []
    for packed in find_packed(last):
        involved = averages(packed.name) or any(map(averages, packed.scales))
        sure = packed.certain and averages(packed.name)
        if involved and (sure or _differs(packed.name, checkpoints)):
            quantized.append(packed)
    if quantized:
        names = first_few([packed.name for packed in quantized])
        scales = " with scales" if quantized[0].scales else ""
        module, leaf = split_name(quantized[0].name)
        pattern = glob.escape(module or leaf) + "*"
        raise UnsupportedTensorError(
            f"{last.path} holds quantized weights{scales}: {names}",
            f"{_BEFORE}, or leave such layers out as a whole, scales too: --exclude '{pattern}'.",
        )


def declared(checkpoint: Checkpoint) -> str:
    """The statement that a checkpoint's weights are quantized; empty where there is none.

    It is an entry of a safetensors header, or of a configuration beside the weights. An adapter's
    weights are floats whatever its base model is.
    """
    for key, value in checkpoint.metadata.items():
        own = not key.startswith("ss_")  # which tells of training, not of the weights
        if own and _QUANTIZED.search(key.lower()) and value.strip().lower() not in _NOTHING:
            return f"{short(key)} in its header"
    if checkpoint.layout == adapter.LAYOUT:
        return ""
    for name, entries in _CONFIGS.items():
        path = _beside(checkpoint, name)
        if path is not None and (entry := _entry(path, entries)):
            return f"{entry} in {name}"
    return ""


def find_packed(checkpoint: Checkpoint) -> Iterator[Packed]:
    """Tensors of a checkpoint that hold quantized weights, or may."""
    modules = Modules(checkpoint.tensors)
    scales_of = {module: _scale_leaves(tensors) for module, tensors in modules}
    for name, tensor in checkpoint.tensors.items():
        if not tensor.shape or tensor.dtype.name == "bool":
            continue
        scales = tuple(_companions(name, scales_of))
        if tensor.dtype.kind == "float":
            if _has_quant_state(name, modules):
                yield Packed(name, scales, certain=True)
        elif tensor.dtype.kind == "packed" or _is_paired(name, checkpoint.tensors):
            yield Packed(name, scales, certain=True)
        elif tensor.dtype.kind == "int" and _may_be_packed(tensor):
            scales = tuple(s for s in scales if _fits(s, checkpoint.tensors[s], tensor))
            if scales or _is_weight(name, tensor):
                yield Packed(name, scales, certain=False)


def _scale_leaves(tensors: Mapping[str, Tensor]) -> list[str]:
    """Last parts of the names of a module's floats that are called scales or codebooks.

    No layer has very many: those are parts of a table without modules, and tell nothing.
    """
    leaves = [
        leaf
        for leaf, tensor in tensors.items()
        if tensor.dtype.kind == "float" and _MEANING.search(leaf.lower())
    ]
    return leaves if len(leaves) <= _MOST_SCALES else []


def _companions(name: str, scales_of: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Names of the scales beside a tensor, and below it as ``weight.absmax`` is."""
    for module in (split_name(name)[0], f"{name}.", f"{name}:"):
        for leaf in scales_of.get(module, ()):
            if module + leaf != name:
                yield module + leaf


def _has_quant_state(name: str, modules: Modules) -> bool:
    """Whether a float tensor holds the bytes of packed integers: their state is beside it."""
    inner = modules.tensors.get(f"{name}.", {})
    return bool({"absmax", "quant_map", "quant_state"} & {*inner}) or (
        f"{name}.quant_state." in modules.tensors
    )


def _is_paired(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names of an integer tensor and of one beside it are those of packed weights."""
    return tensors[name].dtype.kind == "int" and any(
        name.removesuffix(ending) + scale in tensors
        for ending, scales in _PAIRS
        if name.endswith(ending)
        for scale in scales
    )


def _may_be_packed(tensor: Tensor) -> bool:
    """Whether integers are as many and as narrow as weights are packed into.

    Lists of counts and of labels have one dimension.
    """
    if tensor.numel < _FEWEST:
        return False
    return len(tensor.shape) > 1 or tensor.dtype.bits < _WORD or tensor.dtype.name == "uint32"


def _fits(name: str, scale: Tensor, packed: Tensor) -> bool:
    """Whether there are as many scales as a tensor's rows, columns or groups; or one for bytes.

    The extent of a codebook tells nothing about what points into it.
    """
    if _CODEBOOK.search(split_name(name)[1].lower()):
        return packed.dtype.bits < _INDEX
    if scale.numel == 1:
        return packed.dtype.size == 1
    if scale.numel >= packed.numel:  # a quantizer's beside as many zero points
        return False
    shared = any(extent > 1 and extent in packed.shape for extent in scale.shape)
    grouped = packed.dtype.bits < _INDEX and 8 * packed.numel % max(1, scale.numel) == 0
    return shared or grouped


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of narrow integers is called a weight: its scales may lie within it."""
    leaf = split_name(name)[1].lower()
    narrow = tensor.dtype.bits <= _WORD and len(tensor.shape) > 1
    return narrow and _WEIGHT.fullmatch(leaf) is not None


def _differs(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Whether some elements of a tensor are others in the first checkpoint than in the last."""
    first, last = (checkpoint.tensors.get(name) for checkpoint in (checkpoints[0], checkpoints[-1]))
    if first is None or last is None or first is last:
        return False
    if (first.dtype, first.shape) != (last.dtype, last.shape) or not last.dtype.size:
        return True
    values = (sample(tensor).contiguous().view(torch.uint8) for tensor in (first, last))
    return not torch.equal(*values)


def _beside(checkpoint: Checkpoint, name: str) -> Location | None:
    """The path of a file beside the weights; None where looking for it costs requests."""
    if checkpoint.path.is_dir():
        return checkpoint.path / name
    return checkpoint.path.parent / name if isinstance(checkpoint.path, Path) else None


def _entry(path: Location, entries: Sequence[str]) -> str:
    """The entry of a configuration that tells of quantization; empty where none does."""
    try:
        config = bounded_json.read(path)
    except (OSError, ValueError):
        return ""  # without one that can be read, the tensors tell
    if not isinstance(config, dict):
        return ""
    telling = (entry for entry in entries if type(config.get(entry)) in (dict, int))
    return next((entry for entry in telling if config[entry]), "")
