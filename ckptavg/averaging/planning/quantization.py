"""Detection of packed and quantized weights, which have no mean."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ckptavg.averaging.planning.modules import Modules, split_name
from ckptavg.averaging.planning.samples import sample
from ckptavg.errors import UnsupportedTensorError, first_few, short
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.huggingface.format import PEFT
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location

_BEFORE = "Average the checkpoints before quantization"
# Endings of a packed tensor's name, and the endings that the names of its scales have instead.
_PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    # DeepSeek's float8 (weight_scale_inv), compressed-tensors and others.
    ("weight", ("weight_scale", "weight_scale_inv", "weight_scales", "weight.scales")),
    # bitsandbytes in 4 bits.
    ("", (".absmax", ".quant_map")),
    # bitsandbytes in 8 bits.
    (".weight", (".SCB", ".weight_format")),
    # GPTQ and AWQ.
    (".qweight", (".scales", ".qzeros")),
    # compressed-tensors.
    (".weight_packed", (".weight_scale",)),
    # The MXFP4 of gpt-oss.
    ("_blocks", ("_scales",)),
)
# Parts of names of the floats that turn packed integers into weights. Scales and the signs of
# rotated weights are called s, su and svh, too.
_MEANING = re.compile(
    r"scale|a(?:bs)?max|scb|zero|quant_map|biases|codebook|centroid|lookup|lut|delta"
    r"|step_?size|(?:^|_)s[uv]?h?$"
)
_CODEBOOK = re.compile(r"codebook|centroid|lookup|lut")
# Per layer. Formats have a handful; the bound keeps a table without modules from quadratic time.
_MOST_SCALES = 100
_WEIGHT = re.compile(r"[_q]?(?:weight|kernel|data)(?:_packed|_q|_int)?|w_q")
_QUANTIZED = re.compile(r"quantization|quantized|quant_(?:method|type|config)")
# Elements. Fewer integers are counters and settings.
_FEWEST = 16
# Bits. Weights are packed into words of at most 32; torch's own indices have 64.
_WORD, _INDEX = 32, 64
# File → entries. Each entry alone states that the weights are quantized.
_CONFIGS: dict[str, tuple[str, ...]] = {
    # transformers, MLX, compressed-tensors.
    "config.json": ("quantization_config", "quantization", "compression_config"),
    # NVIDIA's ModelOpt.
    "hf_quant_config.json": ("quantization",),
    # AutoGPTQ.
    "quantize_config.json": ("bits",),
    # AutoAWQ.
    "quant_config.json": ("bits", "w_bit"),
}
_NOTHING = ("", "null", "none", "false", "{}", "0")


@dataclass(frozen=True)
class Packed:
    """A tensor that may hold quantized weights.

    Attributes:
        name: The tensor's name.
        scales: Names of the floats that turn its integers into weights.
        certain: True where names or types leave no doubt. Other integers are weights only if they
            differ between checkpoints, which those of an index table never do.
    """

    name: str
    scales: tuple[str, ...]
    certain: bool


def check_not_quantized(checkpoints: Sequence[Checkpoint], averages: Callable[[str], bool]) -> None:
    """Make sure that neither quantized weights nor scales of quantized weights are averaged.

    Args:
        checkpoints: The selected checkpoints, in order.
        averages: Tells of a tensor's name whether the tensor is to be averaged.

    Raises:
        UnsupportedTensorError: Quantized weights are averaged.
        CheckpointError: The values of a doubtful tensor cannot be read.
    """
    last = checkpoints[-1]
    if why := find_declaration(last):
        raise UnsupportedTensorError(
            f"{last.path} holds quantized weights: {why} says so", f"{_BEFORE}."
        )
    quantized: list[Packed] = []
    for packed in find_packed(last):
        involved = averages(packed.name) or any(map(averages, packed.scales))
        # Where only the scales are averaged, packed weights that never change do no harm.
        is_averaged = packed.certain and averages(packed.name)
        if involved and (is_averaged or _differs(packed.name, checkpoints)):
            quantized.append(packed)
    if quantized:
        names = first_few([packed.name for packed in quantized])
        scales = " with scales" if quantized[0].scales else ""
        module, leaf = split_name(quantized[0].name)
        pattern = glob.escape(module or leaf) + "*"
        raise UnsupportedTensorError(
            f"{last.path} holds quantized weights{scales}: {names}",
            f"{_BEFORE}, or leave such layers out as a whole, scales too: `exclude={pattern!r}`.",
        )


def find_declaration(checkpoint: Checkpoint) -> str:
    """Return the place where a checkpoint declares quantized weights; empty if there is none.

    The declaration is an entry of a safetensors header, or of a configuration beside the weights.
    """
    for key, value in checkpoint.metadata.items():
        # kohya's entries, which begin with ss_, describe the training and not the weights.
        if key.startswith("ss_") or not _QUANTIZED.search(key.lower()):
            continue
        if value.strip().lower() not in _NOTHING:
            return f"{short(key)} in its header"
    # An adapter's weights are floats, whatever its base model is.
    if checkpoint.format is PEFT:
        return ""
    for name, entries in _CONFIGS.items():
        path = _find_beside(checkpoint, name)
        if path is not None and (entry := _find_entry(path, entries)):
            return f"{entry} in {name}"
    return ""


def find_packed(checkpoint: Checkpoint) -> Iterator[Packed]:
    """Find the tensors of a checkpoint that hold quantized weights, or may hold some."""
    modules = Modules(checkpoint.tensors)
    scales_of = {module: _scale_leaves(tensors) for module, tensors in modules}
    # Wide integers beside a weight of floats are indices and counts.
    with_matrix = {module for module, tensors in modules if _has_matrix(tensors)}
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
            fitting: tuple[str, ...] = ()
            if tensor.dtype.bits < _INDEX or split_name(name)[0] not in with_matrix:
                fitting = tuple(s for s in scales if _fits(s, name, checkpoint.tensors))
            if fitting or _is_weight(name, tensor):
                yield Packed(name, fitting, certain=False)


def _scale_leaves(tensors: Mapping[str, Tensor]) -> list[str]:
    """List the last parts of the names of a module's floats that are scales or codebooks.

    A module with very many scales is a table without modules, not a layer: none is listed then.
    """
    leaves: list[str] = []
    for leaf, tensor in tensors.items():
        if tensor.dtype.kind == "float" and _MEANING.search(leaf.lower()):
            leaves.append(leaf)
    if len(leaves) > _MOST_SCALES:
        return []
    return leaves


def _companions(name: str, scales_of: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """List the scales beside a tensor, and the scales below the tensor as ``weight.absmax`` is."""
    for module in (split_name(name)[0], f"{name}.", f"{name}:"):
        for leaf in scales_of.get(module, ()):
            if module + leaf != name:
                yield module + leaf


def _has_quant_state(name: str, modules: Modules) -> bool:
    """Tell whether a float tensor holds the bytes of packed integers, as with bitsandbytes.

    The quantization state of packed integers has names below the tensor's name.
    """
    inner = modules.tensors.get(f"{name}.", {})
    return bool({"absmax", "quant_map", "quant_state"} & {*inner}) or (
        f"{name}.quant_state." in modules.tensors
    )


def _is_paired(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether an integer tensor and a neighbour have the names of packed weights."""
    if tensors[name].dtype.kind != "int":
        return False
    for ending, scales in _PAIRS:
        stem = name.removesuffix(ending)
        if name.endswith(ending) and any(stem + scale in tensors for scale in scales):
            return True
    return False


def _may_be_packed(tensor: Tensor) -> bool:
    """Tell whether integers are as many and as narrow as weights are packed into.

    Lists of counts and of labels have one dimension.
    """
    if tensor.numel < _FEWEST:
        return False
    return len(tensor.shape) > 1 or tensor.dtype.bits < _WORD or tensor.dtype.name == "uint32"


def _has_matrix(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether a module has a matrix of floats, scales not counted."""
    for leaf, tensor in tensors.items():
        is_matrix = len(tensor.shape) > 1 and min(tensor.shape) > 1
        if is_matrix and tensor.dtype.kind == "float" and not _MEANING.search(leaf.lower()):
            return True
    return False


def _fits(scale_name: str, name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether scales are as many as the rows, columns or groups of a tensor.

    Args:
        scale_name: The scales' name.
        name: The integers' name.
        tensors: The checkpoint's tensors.
    """
    scale, packed = tensors[scale_name], tensors[name]
    # The extent of a codebook does not depend on the number of integers that point into it.
    leaf = split_name(scale_name)[1].lower()
    if _CODEBOOK.search(leaf):
        return packed.dtype.bits < _INDEX
    # One scale for a whole tensor is common for int8 only.
    if scale.numel == 1:
        # A 1-d tensor of bytes is mostly a bit field or a generator's state. It is a weight only
        # if the scale's name begins like its own.
        names_match = leaf.partition("_")[0] == split_name(name)[1].lower().partition("_")[0]
        return packed.dtype.size == 1 and (len(packed.shape) > 1 or names_match)
    # As many scales as integers: the integers are the zero points of a quantizer.
    if scale.numel >= packed.numel:
        return False
    if any(extent > 1 and extent in packed.shape for extent in scale.shape):
        return True
    # A byte packs up to eight weights, so eight times the elements is what groups divide.
    return packed.dtype.bits < _INDEX and 8 * packed.numel % max(1, scale.numel) == 0


def _is_weight(name: str, tensor: Tensor) -> bool:
    """Tell whether a tensor of narrow integers has the name of a weight.

    The scales of a packed weight may be stored within the weight.
    """
    leaf = split_name(name)[1].lower()
    narrow = tensor.dtype.bits <= _WORD and len(tensor.shape) > 1
    return narrow and _WEIGHT.fullmatch(leaf) is not None


def _differs(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    """Tell whether a sample of a tensor differs between the first checkpoint and the last."""
    first, last = checkpoints[0].tensors.get(name), checkpoints[-1].tensors.get(name)
    if first is None or last is None or first is last:
        return False
    if (first.dtype, first.shape) != (last.dtype, last.shape) or not last.dtype.size:
        return True
    return not torch.equal(_sample_bytes(first), _sample_bytes(last))


def _sample_bytes(tensor: Tensor) -> torch.Tensor:
    """Read a sample of a tensor as bytes: uint8, 1-d."""
    return sample(tensor).contiguous().view(torch.uint8)


def _find_beside(checkpoint: Checkpoint, name: str) -> Location | None:
    """Return the path of a file beside the weights; None where a look would cost requests."""
    if checkpoint.path.is_dir():
        return checkpoint.path / name
    if isinstance(checkpoint.path, Path):
        return checkpoint.path.parent / name
    return None


def _find_entry(path: Location, entries: Sequence[str]) -> str:
    """Find the entry of a configuration that states quantization; empty where none does."""
    try:
        config = bounded_json.read(path)
    except (OSError, ValueError):
        # Without a readable configuration, the tensors decide.
        return ""
    if not isinstance(config, dict):
        return ""
    for entry in entries:
        # By the exact type: false is an int too, and states the opposite.
        if type(config.get(entry)) in (dict, int) and config[entry]:
            return entry
    return ""
