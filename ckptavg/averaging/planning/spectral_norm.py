"""Layers under spectral norm, and the power iteration for the layers' singular vectors.

Spectral norm divides a weight by its largest singular value. It keeps the two singular vectors, u
and v, and computes the value as uᵀWv (Miyato et al. 2018, Algorithm 1). The mean of singular
vectors is not a singular vector, and the sign of a pair is arbitrary. So u and v are computed by
power iteration on the averaged weight.

Each product is rounded separately, and sums are taken by halves. So the bits do not depend on the
processor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptavg.averaging.planning.modules import Modules
from ckptavg.formats.checkpoint import Tensor

_U = re.compile(r"(?P<stem>(?:[^\n]*_)?)u(?P<number>\d{0,3})")
# Endings of the stored weight's name, where the layer computes the weight itself from it.
_RAW = ("_orig", "_bar")
# The module of a weight's first parametrization, as torch.nn.utils.parametrize names it.
_PARAMETRIZATION = re.compile(r"(?P<weight>[^\n]*\.)0\.")
# Tensors per layer. A module with more is a table without modules.
_MOST_TENSORS = 100
# Change of a vector's largest element at which the iteration has converged.
_CLOSE = 2.0**-30
# Each step costs a pass over the weight. Singular values that are close need very many steps, which
# the budget bounds for large models; a few steps are always affordable.
_MOST_STEPS, _FEWEST_STEPS = 1000, 20
# Elements that the iteration goes over in all layers together, about.
_BUDGET = 2**34
# Elements that take as long as the overhead of one step.
_STEP_COST = 300_000


@dataclass(frozen=True)
class SpectralNorm:
    """Names of the tensors of a layer under spectral norm.

    Attributes:
        weight: The weight that is divided by its largest singular value.
        u: The left singular vector.
        v: The right singular vector, where it is kept.
    """

    weight: str
    u: str
    v: str | None


def find_layers(modules: Modules) -> list[SpectralNorm]:
    """Find the layers under spectral norm in a checkpoint.

    A float vector ``u`` belongs to a matrix beside it under two conditions. It is as long as one of
    the dimensions, and there is a vector ``v`` as long as all the others, or a scalar ``sv`` or
    ``sigma``.
    """
    layers: list[SpectralNorm] = []
    for module, tensors in modules:
        for leaf, u in tensors.items():
            match = _U.fullmatch(leaf)
            if match and _is_vector(u):
                layer = _match_layer(modules, module, leaf, match)
                layers += [layer] if layer else []
    return layers


def _match_layer(
    modules: Modules, module: str, leaf: str, match: re.Match[str]
) -> SpectralNorm | None:
    """Find the layer that has a vector as its u; None where there is no layer.

    Args:
        modules: The checkpoint's tensors.
        module: The vector's module.
        leaf: The vector's name in it.
        match: The name's parts.
    """
    tensors = modules.tensors[module]
    stem, number = match["stem"], match["number"]
    v = tensors.get(f"{stem}v{number}")
    sigma = any(f"{stem}{name}{number}" in tensors for name in ("sv", "sigma"))
    weights = _list_matrices(modules, module, stem)
    if v is not None and _is_vector(v):
        fitting = [n for n, t in weights.items() if t.numel == tensors[leaf].numel * v.numel]
    elif sigma or stem + "orig" in tensors:
        v, fitting = None, list(weights)
    else:
        return None
    for name in fitting:
        if tensors[leaf].numel in weights[name].shape:
            partner = None if v is None else f"{module}{stem}v{number}"
            return SpectralNorm(name, module + leaf, partner)
    return None


def _list_matrices(modules: Modules, module: str, stem: str) -> dict[str, Tensor]:
    """List the matrices that vectors may belong to, matrices of the same name first."""
    parametrization = _PARAMETRIZATION.fullmatch(module)
    if parametrization and ".parametrizations." in f".{module}":
        home, likely = parametrization["weight"], ["original"]
    else:
        home, likely = module, [stem.removesuffix("_") + ending for ending in (*_RAW, "")]
    tensors = modules.tensors.get(home, {})
    leaves = dict.fromkeys([*likely, "weight"])
    if len(tensors) <= _MOST_TENSORS:
        leaves |= dict.fromkeys(tensors)
    matrices = {home + leaf: tensors[leaf] for leaf in leaves if leaf in tensors}
    return {name: tensor for name, tensor in matrices.items() if _is_matrix(tensor)}


def _is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor of floats has two dimensions or more, and is no vector."""
    return tensor.dtype.kind == "float" and len(tensor.shape) > 1 and not _is_vector(tensor)


def _is_vector(tensor: Tensor) -> bool:
    """Tell whether floats are a vector: 1-d, or 2-d with an extent of 1."""
    if tensor.dtype.kind != "float" or not tensor.shape or len(tensor.shape) > 2:
        return False
    return tensor.numel == max(tensor.shape)


def most_steps(shapes: Sequence[Sequence[int]]) -> int:
    """Return the number of steps of the power iteration that each weight may take.

    Args:
        shapes: The shapes of all weights under spectral norm.
    """
    total = sum(math.prod(shape) + _STEP_COST for shape in shapes)
    return max(_FEWEST_STEPS, min(_MOST_STEPS, _BUDGET // max(1, total)))


def iterate_vectors(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor | None, last: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run the power iteration until convergence, or for the largest number of steps.

    Args:
        weight: The averaged weight, of any float type.
        u: The last checkpoint's left vector, from which the iteration starts.
        v: The last checkpoint's right vector, if it is kept.
        last: The last checkpoint's weight. With u and v it determines the dimension that u goes
            along.
        steps: Largest number of steps.

    Returns:
        u and v, float64, 1-d. None where u and v are right as they are: the weight is the last
        checkpoint's own, or has no singular vectors.
    """
    if torch.equal(weight, last):
        return None
    matrix = _matrix(weight, _dimension(last, u, v))
    start = u.flatten().to(torch.float64)
    left = _unit(start)
    # A vector of zeros or NaN has no direction to start from.
    if left is None:
        left = _unit(torch.ones_like(start))
    right: torch.Tensor | None = None
    for _ in range(steps):
        before = left
        right = None if before is None else _unit(_times(matrix.T, before))
        left = None if right is None else _unit(_times(matrix, right))
        if before is None or left is None or float((left - before).abs().max()) <= _CLOSE:
            break
    return None if left is None or right is None else (left, right)


def _dimension(weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor | None) -> int:
    """Tell the dimension of a weight that u goes along.

    Where several are as long as u, it is the one for which |uᵀWv| is largest: u and v are singular
    vectors of that matrix alone.
    """
    dimensions = [i for i, extent in enumerate(weight.shape) if extent == u.numel()]
    if v is None or len(dimensions) == 1:
        return dimensions[0]
    left, right = (vector.flatten().to(torch.float64) for vector in (u, v))

    def singular_value(dimension: int) -> float:
        """Return |uᵀWv| for the matrix along a dimension."""
        projected = _times(_matrix(weight, dimension), right)
        return float(_sum((projected * left)[None]).abs())

    return max(dimensions, key=singular_value)


def _matrix(weight: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return a weight as the normed matrix: float64, (extent of the dimension, all the rest)."""
    rows_first = weight.movedim(dimension, 0)
    return rows_first.reshape(rows_first.shape[0], -1).to(torch.float64)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix by a vector. A matrix product's bits would change with the processor."""
    return _sum(matrix * vector)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """Sum rows by halves. The rows are overwritten.

    Args:
        rows: float64, (count, length).

    Returns:
        float64, (count,).
    """
    length = rows.shape[1]
    while length > 1:
        half = (length + 1) // 2
        rows[:, : length - half] += rows[:, half:length]
        length = half
    return rows[:, 0]


def _unit(vector: torch.Tensor) -> torch.Tensor | None:
    """Scale a vector to length 1; None where the vector has no direction."""
    largest = float(vector.abs().max())
    if not math.isfinite(largest) or largest == 0:
        return None
    # First by the largest element: squares of very large or small ones leave float64's range.
    scaled = vector / largest
    return scaled / _sum((scaled * scaled)[None]).sqrt()
