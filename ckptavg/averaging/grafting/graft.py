"""Plan of a grafted network.

Each layer is an average of two networks with coefficients of its own, by the information in the
layer's weight (Meng et al. 2020). So the weights are read twice: once to measure them, when the
average is planned, and once to average them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ckptavg.averaging.grafting.information import measure_information
from ckptavg.averaging.grafting.layers import (
    assign_by_name,
    assign_in_order,
    is_alphabetical,
    is_averaged,
    measured_tensors,
)
from ckptavg.averaging.planning.tensor_plan import LayerCoefficients, Plan, TensorPlan
from ckptavg.averaging.schemes.grafting import Grafting
from ckptavg.errors import UnsupportedTensorError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.runs.discovery.numbered import short_names

_BY_NAME = (
    "grafting: the tensors stand in alphabetical order, as in safetensors files, so that biases "
    "and BatchNorm are assigned to layers by their names"
)


def graft(plan: Plan, grafting: Grafting) -> Plan:
    """Give each layer of a plan its own coefficients.

    The networks stand in a cycle, and each network gets its predecessor grafted, as in the paper.
    The plan is that of the last network: only the last network and its predecessor count. The
    other networks would count for results that are not written.

    As in the published code, a layer is a measured weight and all tensors up to the next measured
    weight: the bias, and BatchNorm's weight, bias and running statistics. Tensors before the first
    measured weight belong to that weight. The published code differs in two ways. It measures
    convolutions alone, and gives linear layers the coefficient of the convolution before them; here
    each weight of two dimensions or more is measured. It also rounds coefficients to two decimals.

    Args:
        plan: The plan of the mean of the last two checkpoints, in the order of the cycle.
        grafting: The options.

    Raises:
        UnsupportedTensorError: The plan is not of plain tensors, but stacks factors of adapters.
        NonFiniteError: A measured value is not finite.
        CheckpointError: A file cannot be read.
    """
    if any(tensor.divisor is not None for tensor in plan.tensors):
        raise UnsupportedTensorError(
            "adapters cannot be grafted: their exact average stacks their factors",
            "Merge the adapters into their base models first.",
        )
    other, own = plan.checkpoints[-2:]
    layers: dict[str, LayerCoefficients] = {}
    for tensor in measured_tensors(plan.tensors):
        layers[tensor.name] = _measure(tensor, grafting, plan.checkpoints, own, other)
    if not layers:
        return plan
    assigned, notes = _assign(plan, list(layers))
    notes = (_describe(plan.checkpoints), *notes)
    tensors: list[TensorPlan] = []
    for tensor in plan.tensors:
        if tensor.name in assigned:
            tensors.append(_with_coefficients(tensor, layers[assigned[tensor.name]], plan))
        else:
            tensors.append(tensor)
    return replace(
        plan,
        coefficients=_mean_coefficients(tensors, plan.checkpoints),
        tensors=tuple(tensors),
        layers=tuple(layers.values()),
        notes=(*notes, *plan.notes),
    )


def _describe(checkpoints: Sequence[Checkpoint]) -> str:
    """Word which network is grafted into which."""
    *others, other, own = short_names([checkpoint.path for checkpoint in checkpoints])
    text = f"grafting: {other} is grafted into {own}, the last of the networks"
    if others:
        text += f"; {first_few(others)} would be grafted into other networks, and do not count"
    return text


def _assign(plan: Plan, measured: Sequence[str]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Assign averaged tensors to layers, and note where their order is not known.

    Returns:
        Name → name of the measured tensor, and notes.
    """
    averaged = [tensor for tensor in plan.tensors if is_averaged(tensor)]
    names = [tensor.name for tensor in averaged]
    # Where each tensor is measured, each is its own layer and the order does not matter.
    if is_alphabetical(averaged) and len(names) > len(measured):
        return assign_by_name(names, measured), (_BY_NAME,)
    return assign_in_order(names, measured), ()


def _measure(
    tensor: TensorPlan,
    grafting: Grafting,
    checkpoints: Sequence[Checkpoint],
    own: Checkpoint,
    other: Checkpoint,
) -> LayerCoefficients:
    """Measure a tensor in both networks, and compute the coefficients of its layer."""
    measured: dict[int, float] = {}
    for source, owner in zip(tensor.sources, tensor.owners, strict=True):
        measured[id(owner)] = measure_information(
            source, owner, tensor.name, grafting.measure, grafting.bins
        )
    alpha = grafting.coefficient(measured[id(own)], measured[id(other)])
    shares = {id(other): 1 - alpha, id(own): alpha}
    information: list[float | None] = []
    coefficients: list[float] = []
    for checkpoint in checkpoints:
        information.append(measured.get(id(checkpoint)))
        coefficients.append(shares.get(id(checkpoint), 0.0))
    return LayerCoefficients(tensor.name, tuple(information), tuple(coefficients))


def _with_coefficients(tensor: TensorPlan, layer: LayerCoefficients, plan: Plan) -> TensorPlan:
    """Give a tensor the coefficients of its layer."""
    by_owner: dict[int, float] = {}
    for checkpoint, coefficient in zip(plan.checkpoints, layer.coefficients, strict=True):
        by_owner[id(checkpoint)] = coefficient
    return replace(tensor, coefficients=tuple(by_owner[id(owner)] for owner in tensor.owners))


def _mean_coefficients(
    tensors: Sequence[TensorPlan], checkpoints: Sequence[Checkpoint]
) -> tuple[float, ...]:
    """Compute each checkpoint's mean coefficient over all averaged elements."""
    addends: dict[int, list[float]] = {id(checkpoint): [] for checkpoint in checkpoints}
    elements = 0
    for tensor in tensors:
        # Tied names share their elements, which count once.
        if is_averaged(tensor) and tensor.tied_to is None:
            elements += tensor.output.numel
            for owner, coefficient in zip(tensor.owners, tensor.coefficients, strict=True):
                addends[id(owner)].append(coefficient * tensor.output.numel)
    return tuple(math.fsum(addends[id(checkpoint)]) / elements for checkpoint in checkpoints)
