"""Samples of SWAG as planned averages.

A sample is mean + √scale · (√diag ∘ z₁ + Dᵀz₂ / √(K − 1)), with standard normal z₁ and z₂ (Maddox
et al. 2019, equation 1). Every row of D is a weighted sum of checkpoints. So a sample is an average
with random coefficients, and the term of z₁ is noise on this average. All samples come from one
read of the checkpoints, block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptavg.averaging.plan import Average
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan
from ckptavg.averaging.swag.gaussian_noise import GaussianNoise, draw_normals
from ckptavg.averaging.swag.specification import Swag
from ckptavg.errors import RunError, UnsupportedTensorError
from ckptavg.formats.statistics_names import running_statistics

# Smaller variances are raised to this, as in the authors' code.
_LEAST_VARIANCE = 1e-30


def plan_samples(average: Average, swag: Swag) -> tuple[Average, ...]:
    """Plan the samples of SWAG.

    Weights are sampled. BatchNorm's running statistics are averaged: they belong to no sample until
    they are recomputed. All else is as in the average.

    Args:
        average: The uniform average of the checkpoints.
        swag: The options.

    Returns:
        One planned average per sample.

    Raises:
        RunError: There are fewer than two checkpoints.
        UnsupportedTensorError: The average is not of plain tensors, but stacks factors of adapters.
    """
    plan = average.plan
    count = len(plan.checkpoints)
    if count < 2:
        raise RunError(
            f"swag needs at least two checkpoints and the selection has {count}",
            "Select more of the run.",
        )
    if any(tensor.divisor is not None for tensor in plan.tensors):
        raise UnsupportedTensorError(
            "swag cannot sample adapters, whose exact average stacks their factors",
            "Merge the adapters into their base models first.",
        )
    kept = running_statistics(tensor.name for tensor in plan.tensors)
    samples: list[Average] = []
    for number in range(swag.samples):
        samples.append(replace(average, plan=_sample(plan, swag, number, kept)))
    return tuple(samples)


def sample_coefficients(checkpoints: int, swag: Swag, normals: Sequence[float]) -> list[float]:
    """Compute the coefficients of a sample: those of mean + √scale · Dᵀz₂ / √(K − 1).

    The row of D for θᵢ is θᵢ less the mean of θ₁ ... θᵢ, so that its coefficients are −1/i up to i,
    and 1 more at i. Each row has the sum 0, and the sample's coefficients have the sum 1.

    Args:
        checkpoints: n, the number of checkpoints.
        swag: The options.
        normals: z₂, one number per row of D.

    Returns:
        One coefficient per checkpoint, oldest first.
    """
    columns = swag.columns(checkpoints)
    terms: list[list[float]] = [[1 / checkpoints] for _ in range(checkpoints)]
    for row, normal in zip(range(checkpoints - columns, checkpoints), normals, strict=True):
        weight = math.sqrt(swag.covariance_scale / (columns - 1)) * normal
        for position in range(row + 1):
            terms[position].append(-weight / (row + 1))
        terms[row].append(weight)
    return [math.fsum(addends) for addends in terms]


def _sample(plan: Plan, swag: Swag, number: int, kept: Iterable[str]) -> Plan:
    """Plan a sample.

    Args:
        plan: The plan of the uniform average.
        swag: The options.
        number: Number of the sample, from 0.
        kept: Names of the tensors that are averaged and not sampled.
    """
    # The number of samples is no part of the key: the first samples of many are those of a few.
    key = f"swag/{swag.seed}/{number}"
    count = len(plan.checkpoints)
    normals = draw_normals(key, swag.columns(count)).tolist()
    coefficients = tuple(sample_coefficients(count, swag, normals))
    names = set(kept)
    tensors: list[TensorPlan] = []
    for tensor in plan.tensors:
        is_weight = tensor.averaged and len(tensor.sources) > 1 and tensor.name not in names
        if is_weight:
            noise = GaussianNoise(
                f"{key}/{tensor.name}", math.sqrt(swag.covariance_scale), _LEAST_VARIANCE
            )
            tensors.append(replace(tensor, coefficients=coefficients, noise=noise))
        else:
            tensors.append(tensor)
    return replace(plan, coefficients=coefficients, tensors=tuple(tensors))
