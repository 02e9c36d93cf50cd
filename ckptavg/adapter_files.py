"""The exact mean of LoRA adapters that are one file each, as kohya's tools and diffusers write.

As for PEFT's adapters, the ranks are stacked: the Aᵢ one below the other, the cᵢ·Bᵢ side by side,
so that B'A' = Σ cᵢ·BᵢAᵢ. Who loads such a file takes the rank from the shapes, and scales the
product by alpha / rank. Alpha stands in the file as a tensor, or in its header, and grows as the
rank does; where it stands nowhere, the scale is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ckptavg.factors import Pair, find_pairs
from ckptavg.formats import Checkpoint, bounded_json
from ckptavg.formats.layout import FILE_LAYOUTS
from ckptavg.modules import split_name
from ckptavg.plan import Plan, TensorPlan, make_plan
from ckptavg.rules import Rules
from ckptavg.samples import first_values
from ckptavg.stacking import placed

_STANDARD = re.compile(r"[^\n]*(?:lora_A|lora_down|lora\w{0,9}\.down)\.weight")
_PEFT = "base_model.model."  # whose rank and alpha stand in adapter_config.json
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm")  # which are added, not multiplied
_HEADER = "lora_adapter_metadata"  # diffusers' entry: rank and alpha by part of the pipeline
_KOHYA = ("ss_network_dim", "ss_network_alpha")
_KOHYA_ARGUMENTS = "ss_network_args"
_SCALES = (*_KOHYA, _KOHYA_ARGUMENTS, _HEADER)
_RANK = re.compile(r"(?:[^\n]*[._])?(?:r|rank|dim)")


def plan_stack(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan | None:
    """Plan the adapter whose products are the means of the adapters' products.

    Arguments as for ``make_plan``. What is no factor of a product is averaged as everywhere.

    Returns:
        None where the checkpoints are no such adapters, or their mean is none.

    Raises:
        CkptavgError: As ``make_plan`` does.
    """
    count = sum(c != 0 for c in coefficients)
    last = checkpoints[-1]
    pairs = find_pairs(last.tensors)
    alphas = [f"{pair.module}.alpha" for pair in pairs]
    alphas = [name for name in alphas if name in last.tensors]
    whole = rules.base is None and all(map(rules.averages, last.tensors))
    if count < 2 or not pairs or not whole or not _are_plain(last, pairs, alphas):
        return None
    if not all(_are_alike(checkpoint, last, alphas) for checkpoint in checkpoints[:-1]):
        return None
    header = _grown_header(last.metadata, count)
    if header is None:
        return None
    stack = _Stack(tuple(pairs), frozenset(alphas), count)
    places = [sum(c != 0 for c in coefficients[:i]) for i in range(len(coefficients))]
    stacked = [stack.of(c, place) for c, place in zip(checkpoints, places, strict=True)]
    planned = make_plan(stacked, coefficients, rules)
    note = (
        f"LoRA adapters: merged exactly by stacking their ranks, {count} times as many "
        "(the mean of A and the mean of B is not the mean of BA)"
    )
    return replace(
        planned,
        checkpoints=tuple(checkpoints),
        tensors=tuple(map(stack.scaled, planned.tensors)),
        notes=(*planned.notes, note),
        metadata=header,
    )


@dataclass(frozen=True)
class _Stack:
    """How the factors of several adapters lie in one.

    Attributes:
        pairs: The factors.
        alphas: Names of the tensors that hold a product's alpha.
        count: How many adapters contribute.
    """

    pairs: tuple[Pair, ...]
    alphas: frozenset[str]
    count: int

    @cached_property
    def dimensions(self) -> Mapping[str, int]:
        """The dimension of each factor that is the rank."""
        ranks = {pair.first: 0 for pair in self.pairs}
        return ranks | {pair.second: 1 for pair in self.pairs}

    def of(self, checkpoint: Checkpoint, place: int) -> Checkpoint:
        """An adapter whose factors have the shape of the stack and are zero but in their place."""
        tensors = dict(checkpoint.tensors)
        for name, dimension in self.dimensions.items():
            tensors[name] = placed(tensors[name], dimension, 1, place, self.count)
        return replace(checkpoint, tensors=tensors)

    def scaled(self, planned: TensorPlan) -> TensorPlan:
        """A tensor's plan: of the A's plain values, of an alpha the multiple."""
        if self.dimensions.get(planned.name) == 0:
            return replace(planned, coefficients=(1.0,) * len(planned.sources), divisor=1.0)
        if planned.name in self.alphas:
            return replace(
                planned,
                sources=planned.sources[-1:],
                owners=planned.owners[-1:],
                coefficients=(float(self.count),),
                divisor=1.0,
                averaged=True,
                compared=(),
            )
        return planned


def _are_plain(checkpoint: Checkpoint, pairs: Sequence[Pair], alphas: Collection[str]) -> bool:
    """Whether a checkpoint is a file of products of two, under names that tell the scale."""
    factors = {name for pair in pairs for name in (pair.first, pair.second)}
    others = {*checkpoint.tensors} - factors - {*alphas}
    if checkpoint.layout not in FILE_LAYOUTS or checkpoint.refused:
        return False
    if not all(name.endswith(_DIFFERENCES) for name in others):
        return False
    for pair in pairs:
        if pair.first.startswith(_PEFT) or not _STANDARD.fullmatch(pair.first):
            return False
        first, second = (checkpoint.tensors[name] for name in (pair.first, pair.second))
        if any(t.dtype.kind != "float" or len(t.shape) < 2 or not t.numel for t in (first, second)):
            return False
        if first.shape[0] != second.shape[1]:
            return False
    return all(checkpoint.tensors[name].numel == 1 for name in alphas)


def _are_alike(checkpoint: Checkpoint, last: Checkpoint, alphas: Sequence[str]) -> bool:
    """Whether an adapter has the last one's shapes and scales."""
    shapes = {name: (t.shape, t.dtype.kind) for name, t in checkpoint.tensors.items()}
    if shapes != {name: (t.shape, t.dtype.kind) for name, t in last.tensors.items()}:
        return False
    if any(checkpoint.metadata.get(name) != last.metadata.get(name) for name in _SCALES):
        return False
    own, expected = (first_values([c.tensors[n] for n in alphas]) for c in (checkpoint, last))
    return own == expected


def _grown_header(metadata: Mapping[str, str], count: int) -> dict[str, str] | None:
    """The entries of a header that tell ranks and alphas, for so many times the rank.

    Returns:
        None where some are not understood.
    """
    if any(_RANK.fullmatch(name) for name in metadata if name not in _SCALES):
        return None
    grown = {name: _multiple(metadata[name], count) for name in _KOHYA if name in metadata}
    for name, grow in ((_HEADER, _grown_parts), (_KOHYA_ARGUMENTS, _grown_arguments)):
        if name in metadata:
            entries = _parsed(metadata[name])
            changed = None if entries is None else grow(entries, count)
            if changed is None:
                return None
            grown[name] = json.dumps(changed)
    return grown


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        entries = bounded_json.loads(text.encode())
    except (ValueError, UnicodeEncodeError):
        return None
    return entries if isinstance(entries, dict) else None


def _grown_arguments(entries: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments of kohya's networks, of which those for convolutions have ranks too."""
    return {
        name: _multiple(value, count)
        if name in ("conv_dim", "conv_alpha") and isinstance(value, str)
        else value
        for name, value in entries.items()
    }


def _grown_parts(entries: Mapping[str, Any], count: int) -> dict[str, Any] | None:
    """Diffusers' entries: PEFT's configuration of each part of a pipeline, by dotted names.

    Alpha grows with the rank, or with its root under rank-stabilized LoRA: the scale stays.
    """
    grown = dict(entries)
    for name, value in entries.items():
        part, setting = split_name(name)
        if value and setting in ("use_dora", "lora_bias"):
            return None
        if setting == "r" and f"{part}lora_alpha" not in entries:
            return None
        factor = float(count)
        if entries.get(f"{part}use_rslora") and setting in ("lora_alpha", "alpha_pattern"):
            factor = math.sqrt(count)
        if setting in ("r", "lora_alpha") and type(value) in (int, float):
            grown[name] = _times(value, factor)
        elif setting in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
            if not all(type(v) in (int, float) for v in value.values()):
                return None
            grown[name] = {key: _times(v, factor) for key, v in value.items()}
    return grown


def _times(value: float, factor: float) -> float:
    """A product, whole where it is one of whole numbers."""
    product = value * factor
    return int(product) if isinstance(value, int) and product.is_integer() else product


def _multiple(text: str, count: int) -> str:
    """The multiple of a number in a text; the text where it is none."""
    try:
        return str(int(text) * count)
    except ValueError:
        pass
    try:
        return str(float(text) * count)
    except ValueError:
        return text
