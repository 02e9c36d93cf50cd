"""The exact mean of LoRA adapters, computed by stacking ranks.

The product of the mean of A and the mean of B is not the mean of BA. Stacked factors give the exact
mean: with the Aᵢ one below the other and the n·cᵢ·Bᵢ side by side, B'A' = n·Σ cᵢ·BᵢAᵢ. PEFT scales
this product by alpha / (n·r). So the merged weights are Σ cᵢ·s·BᵢAᵢ, at n times the rank. A stacked
factor is planned as a sum over checkpoints, each of which is zero outside its own slot. With equal
coefficients no value changes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptavg.averaging.lora import adapter_files
from ckptavg.averaging.lora.factors import find_bare_pairs, is_part_of_product
from ckptavg.averaging.lora.stacking import assign_slots, place_factor
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan, make_plan
from ckptavg.errors import (
    CheckpointError,
    MismatchError,
    ModelError,
    UnsupportedTensorError,
    UsageError,
    first_few,
    short,
)
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.huggingface import peft
from ckptavg.formats.huggingface.format import PEFT

_FACTOR = re.compile(r"(.*\.lora_(?:embedding_)?)([AB])((?:\.weight)?)")
_FACTOR_BIAS = re.compile(r".*\.lora_B\.bias")
# DoRA's lora_magnitude_vector, for one.
_OTHER_PART = re.compile(r".*\.lora_\w+(\..*)?")
# Entries of a configuration in which adapters must agree: they decide ranks, scales or layout.
_ALIKE = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "target_parameters",
)  # fmt: skip
_INEXACT = (
    "LoRA layers inside the checkpoints: the means of factors are not the mean of their product "
    "(the mean of A and the mean of B is not the mean of BA); average adapters that were saved by "
    "save_pretrained, or merged models, for that"
)
_MERGE = "Merge the adapters into their base models first (PeftModel.merge_and_unload)."


def are_adapters(checkpoints: Sequence[Checkpoint]) -> bool:
    """Return True if checkpoints are adapters.

    Raises:
        MismatchError: Only a part of the checkpoints are adapters.
    """
    adapters: list[Checkpoint] = []
    models: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if checkpoint.format is PEFT:
            adapters.append(checkpoint)
        else:
            models.append(checkpoint)
    if adapters and models:
        raise MismatchError(
            f"{adapters[-1].path} holds an adapter and {models[-1].path} does not",
            "Select one kind with `glob`.",
        )
    return bool(adapters)


def require_models(checkpoints: Iterable[Checkpoint]) -> None:
    """Make sure that checkpoints hold models, and not adapters.

    Raises:
        ModelError: A checkpoint is an adapter, which cannot run without a base model.
    """
    for checkpoint in checkpoints:
        if checkpoint.format is PEFT:
            raise ModelError(f"{checkpoint.path} holds an adapter and no model", _MERGE)


def plan_merge(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan:
    """Plan the adapter whose merged weights are the mean of the adapters' merged weights.

    Tensors that are not factors of a product are averaged as in any checkpoint.

    Args:
        checkpoints: The adapters, in order.
        coefficients: One per adapter, with a positive sum.
        rules: The selection of the tensors to average, and the type of the output's floats.

    Raises:
        UnsupportedTensorError: The adapters are of a kind whose mean is not an adapter.
        MismatchError: The adapters differ in ranks or scales.
        UsageError: The patterns leave factors out.
        CheckpointError: A configuration has no valid ranks and alphas.
    """
    configs = [peft.read_configuration(checkpoint.path) for checkpoint in checkpoints]
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        _check_kind(checkpoint, config)
        _check_alike(checkpoint, config, configs[-1])
        _check_factors(checkpoint, rules)
    # An adapter of coefficient 0 gets no slot: it would only add zeros.
    stack = _Stack(tuple(filter(None, coefficients)), configs[-1])
    if stack.config.get("ensure_weight_tying") and len(set(stack.coefficients)) > 1:
        raise UnsupportedTensorError(
            f"{checkpoints[-1].path} ties its factors, which unequal coefficients would untie",
            _MERGE,
        )
    slots = assign_slots(coefficients)
    stacked = list(map(stack.place, checkpoints, slots))
    planned = make_plan(stacked, coefficients, rules)
    return replace(
        planned,
        checkpoints=tuple(checkpoints),
        tensors=tuple(map(stack.scale, planned.tensors)),
        companions={peft.CONFIG: json.dumps(stack.configuration(), indent=2).encode()},
        notes=(*planned.notes, *_notes(stack, configs)),
    )


def plan_mean(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan:
    """Plan an average of models or of adapters. Adapters get the exact mean where possible.

    Args:
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint, with a positive sum.
        rules: The selection of the tensors to average, and the type of the output's floats.

    Raises:
        CkptavgError: As for ``make_plan`` and ``plan_merge``.
    """
    involved = checkpoints if rules.base is None else (*checkpoints, rules.base)
    if are_adapters(involved):
        return plan_merge(checkpoints, coefficients, rules)
    stacked = adapter_files.plan_stack(checkpoints, coefficients, rules)
    return stacked or _add_note(make_plan(checkpoints, coefficients, rules))


def _add_note(plan: Plan) -> Plan:
    """Add a note to a plan if the plan averages factors of low-rank products separately."""
    averaged: dict[str, Tensor] = {}
    for tensor in plan.tensors:
        if tensor.averaged and len(tensor.sources) > 1:
            averaged[tensor.name] = plan.checkpoints[-1].tensors[tensor.name]
    if any(map(is_part_of_product, averaged)) or find_bare_pairs(averaged):
        return replace(plan, notes=(*plan.notes, _INEXACT))
    return plan


@dataclass(frozen=True)
class _Stack:
    """Arrangement of the factors of several adapters in a single adapter.

    Attributes:
        coefficients: One per adapter that contributes.
        config: Configuration of the last adapter. The others agree in ranks and scales.
    """

    coefficients: tuple[float, ...]
    config: Mapping[str, Any]

    def place(self, checkpoint: Checkpoint, slot: int) -> Checkpoint:
        """Give an adapter's factors the shape of the stack, with zeros outside the slot.

        Args:
            checkpoint: The adapter.
            slot: Position of the adapter among the adapters that contribute.
        """
        tensors, count = dict(checkpoint.tensors), len(self.coefficients)
        for name, match in _factors(checkpoint).items():
            if match[2] == "A":
                groups = self._groups(checkpoint, match)
                tensors[name] = place_factor(tensors[name], 0, groups, slot, count)
            else:
                tensors[name] = place_factor(tensors[name], 1, 1, slot, count)
        return replace(checkpoint, tensors=tensors)

    def scale(self, plan: TensorPlan) -> TensorPlan:
        """Change a tensor's plan: plain values for an A, n times the mean for a B."""
        # The coefficients belong to the B's alone, else each product would get their square.
        match = _FACTOR.fullmatch(plan.name)
        if match and match[2] == "A":
            return replace(plan, coefficients=(1.0,) * len(plan.sources), divisor=1.0)
        if match or _FACTOR_BIAS.fullmatch(plan.name):
            return replace(plan, divisor=math.fsum(self.coefficients) / len(self.coefficients))
        return plan

    def configuration(self) -> dict[str, Any]:
        """Return the configuration with n times the rank, which divides PEFT's scale by n.

        Under rank-stabilized LoRA, PEFT divides alpha by the rank's square root. So alpha is
        divided by the square root of n in addition.
        """
        count = len(self.coefficients)
        ranks: Mapping[str, int] = self.config.get("rank_pattern") or {}
        alphas: Mapping[str, float] = self.config.get("alpha_pattern") or {}
        lora_alpha: float = self.config["lora_alpha"]
        if self.config.get("use_rslora"):
            lora_alpha /= math.sqrt(count)
            alphas = {name: alpha / math.sqrt(count) for name, alpha in alphas.items()}
        return dict(self.config) | {
            "r": self.config["r"] * count,
            "lora_alpha": lora_alpha,
            "rank_pattern": {name: rank * count for name, rank in ranks.items()},
            "alpha_pattern": dict(alphas),
        }

    def _groups(self, checkpoint: Checkpoint, match: re.Match[str]) -> int:
        """Count the stacks in the rows of an A: one per group of a convolution, or per expert.

        In a grouped convolution, B has rank / groups columns. Experts in one parameter have as many
        rows of A and columns of B as there are pairs of an expert and a rank.
        """
        rows = checkpoint.tensors[match[0]].shape[0]
        columns = checkpoint.tensors[_partner(match)].shape[1]
        rank = columns
        if self.config.get("target_parameters"):
            rank = min(self.config["r"], columns)
        return rows // rank


def _factors(checkpoint: Checkpoint) -> dict[str, re.Match[str]]:
    """Find an adapter's factors.

    Returns:
        Name of a factor → match of the name's parts: stem, A or B, ending.
    """
    factors: dict[str, re.Match[str]] = {}
    for name in checkpoint.tensors:
        if match := _FACTOR.fullmatch(name):
            factors[name] = match
    return factors


def _partner(match: re.Match[str]) -> str:
    """Return the name of the second factor that belongs to a factor of a product."""
    return match[1] + {"A": "B", "B": "A"}[match[2]] + match[3]


def _check_kind(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    if why := peft.why_no_mean(config):
        raise UnsupportedTensorError(f"the adapter {checkpoint.path} {why}", _MERGE)
    _check_numbers(checkpoint, config)


def _check_numbers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if isinstance(ranks, dict) and isinstance(alphas, dict):
        all_ranks = (config.get("r"), *ranks.values())
        all_alphas = (config.get("lora_alpha"), *alphas.values())
        # By the exact type, since a bool is an int too.
        ranks_valid = all(type(rank) is int and rank > 0 for rank in all_ranks)
        if ranks_valid and {int, float}.issuperset(map(type, all_alphas)):
            return
    raise CheckpointError(f"{checkpoint.path / peft.CONFIG} has no whole ranks and numeric alphas")


def _check_alike(
    checkpoint: Checkpoint, config: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    for name in _ALIKE:
        # Older versions of PEFT lack entries that newer ones write as false or empty.
        if (config.get(name) or None) != (expected.get(name) or None):
            raise MismatchError(
                f"{checkpoint.path} has {name} {short(str(config.get(name)))} where the last "
                f"adapter has {short(str(expected.get(name)))}",
                _MERGE,
            )


def _check_factors(checkpoint: Checkpoint, rules: Rules) -> None:
    """Make sure that every product has two plain factors, both of which are averaged.

    Raises:
        UnsupportedTensorError: A product has other parts, or a factor is not a matrix of floats.
        UsageError: The patterns leave factors out.
    """
    factors = _factors(checkpoint)
    other_parts: list[str] = []
    for name in (*checkpoint.tensors, *checkpoint.refused):
        is_known = name in factors or _FACTOR_BIAS.fullmatch(name)
        if not is_known and _OTHER_PART.fullmatch(name):
            other_parts.append(name)
    if other_parts or not factors:
        why = "has no A and B"
        if other_parts:
            why = f"has parts other than A and B: {first_few(other_parts)}"
        raise UnsupportedTensorError(f"the adapter {checkpoint.path} {why}", _MERGE)
    for name, match in factors.items():
        tensor, partner = checkpoint.tensors[name], checkpoint.tensors.get(_partner(match))
        plain = tensor.dtype.kind == "float" and len(tensor.shape) > 1 and tensor.numel
        if not plain or partner is None:
            raise UnsupportedTensorError(
                f"{name} in {checkpoint.path} is expected to be one of two matrices of floats",
                "It may have been saved without gathering its shards; save it again, or leave the "
                "checkpoint out.",
            )
    excluded = [name for name in factors if not rules.averages(name)]
    if excluded:
        raise UsageError(
            f"the patterns leave out {first_few(excluded)}: the rank of all factors grows together",
            "Leave out only tensors that are averaged as they are (modules_to_save, biases).",
        )


def _notes(stack: _Stack, configs: Sequence[Mapping[str, Any]]) -> list[str]:
    count, rank = len(stack.coefficients), stack.config["r"]
    notes = [
        f"LoRA adapters: merged exactly by stacking their ranks, {count} × {rank} = {count * rank} "
        "(the mean of A and the mean of B is not the mean of BA)"
    ]
    bases = sorted({short(str(config.get("base_model_name_or_path"))) for config in configs})
    if len(bases) > 1:
        notes.append(f"the adapters name different base models: {first_few(bases)}")
    return notes
