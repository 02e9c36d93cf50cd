"""The exact mean of LoRA adapters in single files, as written by kohya's tools and diffusers.

As for PEFT's adapters, the ranks are stacked: the Aᵢ one below the other, the cᵢ·Bᵢ side by side,
so that B'A' = Σ cᵢ·BᵢAᵢ. A tool that loads such a file takes the rank from the shapes, and scales
the product by alpha / rank. The file stores alpha as a tensor or in the header. Alpha is multiplied
like the rank, so that the scale stays. Where a file has no alpha, the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ckptavg.averaging.lora.factors import Pair, find_pairs
from ckptavg.averaging.lora.stacking import assign_slots, place_factor
from ckptavg.averaging.planning.modules import split_name
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.samples import read_first_values
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan, make_plan
from ckptavg.formats import Checkpoint
from ckptavg.formats.checkpoint import DTYPES, DType
from ckptavg.io import bounded_json

_STANDARD = re.compile(r"[^\n]*(?:lora_A|lora_down|lora\w{0,9}\.down)\.weight")
# The beginning of PEFT's names. PEFT stores rank and alpha in adapter_config.json, not in the file.
_PEFT = "base_model.model."
# Differences of whole tensors, which are added and not multiplied: their plain mean is exact.
# LyCORIS writes them beside factors, for layers that are trained without a product.
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")
# The header's entry of diffusers: rank and alpha by component of the pipeline.
_HEADER = "lora_adapter_metadata"
_KOHYA = ("ss_network_dim", "ss_network_alpha")
_KOHYA_ARGUMENTS = "ss_network_args"
_SCALES = (*_KOHYA, _KOHYA_ARGUMENTS, _HEADER)
# An entry of some other tool that may state a rank, which would be untrue of the stack.
_RANK = re.compile(r"(?:[^\n]*[._])?(?:r|rank|dim)")


def plan_stack(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan | None:
    """Plan the adapter whose products are the means of the adapters' products.

    Tensors that are no factors of a product are averaged as everywhere.

    Args:
        checkpoints: The adapters, in order.
        coefficients: One per adapter, in the same order.
        rules: The tensors to average, and the type of the output's floats.

    Returns:
        The plan. None where the checkpoints are not adapters of this kind, or where a stack would
        not be the mean.

    Raises:
        CkptavgError: As ``make_plan`` does.
    """
    # A product with one factor left out is no mean of products.
    if rules.base is not None or not all(map(rules.averages, checkpoints[-1].tensors)):
        return None
    stack = _make_stack(checkpoints, len(list(filter(None, coefficients))))
    if stack is None:
        return None
    header = _grow_header(checkpoints[-1].metadata, stack.count)
    if header is None:
        return None
    slots = assign_slots(coefficients)
    planned = make_plan(list(map(stack.place, checkpoints, slots)), coefficients, rules)
    note = (
        f"LoRA adapters: merged exactly by stacking their ranks, {stack.count} times as many "
        "(the mean of A and the mean of B is not the mean of BA)"
    )
    return replace(
        planned,
        checkpoints=tuple(checkpoints),
        tensors=tuple(map(stack.scale, planned.tensors)),
        notes=(*planned.notes, note),
        metadata=header,
    )


def _make_stack(checkpoints: Sequence[Checkpoint], count: int) -> _Stack | None:
    """Arrange the factors of adapters in a stack; None where a stack would not be the mean.

    Args:
        checkpoints: The adapters, in order.
        count: Number of adapters that contribute.
    """
    last = checkpoints[-1]
    pairs = find_pairs(last.tensors)
    if count < 2 or not pairs:
        return None
    names = (f"{pair.module}.alpha" for pair in pairs)
    alphas = [name for name in names if name in last.tensors]
    if not _are_plain(last, pairs, alphas):
        return None
    for checkpoint in checkpoints[:-1]:
        if not _are_alike(checkpoint, last, alphas):
            return None
    values = read_first_values([last.tensors[name] for name in alphas])
    return _Stack(tuple(pairs), dict(zip(alphas, values, strict=True)), count)


@dataclass(frozen=True)
class _Stack:
    """Arrangement of the factors of several adapters in a single adapter.

    Attributes:
        pairs: The factors.
        alphas: Names of the tensors that hold a product's alpha, and their values.
        count: Number of adapters that contribute.
    """

    pairs: tuple[Pair, ...]
    alphas: Mapping[str, float]
    count: int

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """Name of each factor → the factor's dimension that is the rank."""
        dimensions: dict[str, int] = {}
        for pair in self.pairs:
            dimensions |= {pair.first: 0, pair.second: 1}
        return dimensions

    def place(self, checkpoint: Checkpoint, slot: int) -> Checkpoint:
        """Give an adapter's factors the shape of the stack, with zeros outside the slot.

        Args:
            checkpoint: The adapter.
            slot: Index of the adapter among those that contribute.
        """
        tensors = dict(checkpoint.tensors)
        for name, dimension in self.dimensions.items():
            tensors[name] = place_factor(tensors[name], dimension, 1, slot, self.count)
        return replace(checkpoint, tensors=tensors)

    def scale(self, planned: TensorPlan) -> TensorPlan:
        """Change a tensor's plan: plain values for an A, the multiple for an alpha."""
        # The coefficients belong to the B's alone, else each product would get its square.
        if self.dimensions.get(planned.name) == 0:
            return replace(planned, coefficients=(1.0,) * len(planned.sources), divisor=1.0)
        if planned.name in self.alphas:
            return replace(
                planned,
                dtype=_choose_type(self.count * self.alphas[planned.name], planned.dtype),
                sources=planned.sources[-1:],
                owners=planned.owners[-1:],
                coefficients=(float(self.count),),
                divisor=1.0,
                averaged=True,
                compared=(),
            )
        return planned


def _choose_type(value: float, dtype: DType) -> DType:
    """Choose the type of a value: float32 where a narrower type would round the value."""
    if dtype.bits >= DTYPES["float32"].bits:
        return dtype
    exact = torch.tensor(value, dtype=torch.float64, device="cpu")
    if exact.to(getattr(torch, dtype.name)) == exact:
        return dtype
    return DTYPES["float32"]


def _are_plain(checkpoint: Checkpoint, pairs: Sequence[Pair], alphas: Collection[str]) -> bool:
    """Tell whether a file holds plain products of two factors, under names of known scale.

    Args:
        checkpoint: The adapter.
        pairs: The factors in it.
        alphas: Names of its tensors that hold a product's alpha.
    """
    if checkpoint.format.is_directory or checkpoint.refused:
        return False
    factors: set[str] = set()
    for pair in pairs:
        factors |= {pair.first, pair.second}
        if not _is_plain_pair(checkpoint, pair):
            return False
    for name in checkpoint.tensors.keys() - factors - {*alphas}:
        if not name.endswith(_DIFFERENCES):
            return False
    return all(checkpoint.tensors[name].numel == 1 for name in alphas)


def _is_plain_pair(checkpoint: Checkpoint, pair: Pair) -> bool:
    """Tell whether two factors are matrices of floats under names of known scale."""
    if pair.first.startswith(_PEFT) or not _STANDARD.fullmatch(pair.first):
        return False
    first, second = checkpoint.tensors[pair.first], checkpoint.tensors[pair.second]
    for factor in (first, second):
        if factor.dtype.kind != "float" or len(factor.shape) < 2 or not factor.numel:
            return False
    return first.shape[0] == second.shape[1]


def _are_alike(checkpoint: Checkpoint, last: Checkpoint, alphas: Sequence[str]) -> bool:
    """Tell whether an adapter has the last one's shapes and scales.

    Args:
        checkpoint: The adapter.
        last: The last adapter.
        alphas: Names of the tensors that hold a product's alpha.
    """
    if _list_shapes(checkpoint) != _list_shapes(last):
        return False
    for entry in _SCALES:
        if checkpoint.metadata.get(entry) != last.metadata.get(entry):
            return False
    values = read_first_values([checkpoint.tensors[name] for name in alphas])
    return values == read_first_values([last.tensors[name] for name in alphas])


def _list_shapes(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the kind of each tensor, by name."""
    return {name: (t.shape, t.dtype.kind) for name, t in checkpoint.tensors.items()}


def _grow_header(metadata: Mapping[str, str], count: int) -> dict[str, str] | None:
    """Multiply the ranks and alphas that a header states.

    Args:
        metadata: The header's entries.
        count: Number of stacked ranks in one.

    Returns:
        The entries that change; None where one of them is not understood.
    """
    if any(map(_RANK.fullmatch, metadata.keys() - {*_SCALES})):
        return None
    grown: dict[str, str] = {}
    for name in _KOHYA:
        if name in metadata:
            grown[name] = _multiply(metadata[name], count)
    for name, grow in ((_HEADER, _grow_components), (_KOHYA_ARGUMENTS, _grow_arguments)):
        if name in metadata:
            entries = _parse(metadata[name])
            if entries is None:
                return None
            changed = grow(entries, count)
            if changed is None:
                return None
            grown[name] = json.dumps(changed)
    return grown


def _parse(text: str) -> dict[str, Any] | None:
    """Read a JSON object; None where the text is none."""
    try:
        entries = bounded_json.loads(text.encode())
    except (ValueError, UnicodeEncodeError):
        return None
    if isinstance(entries, dict):
        return entries
    return None


def _grow_arguments(entries: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Multiply the rank and alpha of convolutions among the arguments of kohya's networks."""
    grown = dict(entries)
    for name in ("conv_dim", "conv_alpha"):
        if isinstance(entries.get(name), str):
            grown[name] = _multiply(entries[name], count)
    return grown


def _grow_components(entries: Mapping[str, Any], count: int) -> dict[str, Any] | None:
    """Multiply the ranks and alphas in diffusers' entries.

    The entries are PEFT's configurations of a pipeline's components, by dotted names. Alpha grows
    with the rank, so that the scale stays. Under rank-stabilized LoRA, alpha grows with the rank's
    square root (Kalajdzievski 2023).

    Returns:
        All entries; None where the products would not be those of two factors, or a value is not
        understood.
    """
    grown = dict(entries)
    for name, value in entries.items():
        component, setting = split_name(name)
        if value and setting in ("use_dora", "lora_bias"):
            return None
        # Without it alpha has a default, which would not grow.
        if setting == "r" and f"{component}lora_alpha" not in entries:
            return None
        factor = float(count)
        if entries.get(f"{component}use_rslora") and setting in ("lora_alpha", "alpha_pattern"):
            factor = math.sqrt(count)
        if setting in ("r", "lora_alpha") and type(value) in (int, float):
            grown[name] = _times(value, factor)
        elif setting in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            if not {int, float}.issuperset(map(type, value.values())):
                return None
            grown[name] = {key: _times(number, factor) for key, number in value.items()}
    return grown


def _times(value: float, factor: float) -> float:
    """Multiply a number. An integer gives an integer where the product is whole."""
    product = value * factor
    if isinstance(value, int) and product.is_integer():
        return int(product)
    return product


def _multiply(text: str, count: int) -> str:
    """Multiply a number in a text. A text that is not a number is returned unchanged."""
    try:
        return str(int(text) * count)
    except ValueError:
        pass
    try:
        return str(float(text) * count)
    except ValueError:
        return text
