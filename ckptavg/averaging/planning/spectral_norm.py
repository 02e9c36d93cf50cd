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
# torch.nn.utils.spectral_norm writes weight_orig, an older layer that GANs copy, weight_bar.
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

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the singular vectors that are kept."""
        if self.v is None:
            return (self.u,)
        return (self.u, self.v)


def find_layers(modules: Modules) -> list[SpectralNorm]:
    """Find the layers under spectral norm in a checkpoint.

    A float vector ``u`` belongs to a matrix beside it under two conditions. It is as long as one of
    the dimensions, and there is a vector ``v`` as long as all the others, or a scalar ``sv`` or
    ``sigma``.
    """
    layers: list[SpectralNorm] = []
    for module, tensors in modules:
        for leaf, tensor in tensors.items():
            match = _U.fullmatch(leaf)
            if match and _is_vector(tensor):
                layer = _match_layer(modules, module, match)
                if layer is not None:
                    layers.append(layer)
    return layers


def _match_layer(modules: Modules, module: str, match: re.Match[str]) -> SpectralNorm | None:
    """Find the layer under spectral norm that a vector is the u of, if there is such a layer.

    Args:
        modules: The checkpoint's tensors.
        module: The vector's module.
        match: The parts of the vector's name in the module.
    """
    tensors = modules.tensors[module]
    stem, number = match["stem"], match["number"]
    u, v_leaf = tensors[match[0]], f"{stem}v{number}"
    matrices = _list_matrices(modules, module, stem)
    v = tensors.get(v_leaf)
    v_name: str | None = None
    if v is not None and _is_vector(v):
        numel = u.numel * v.numel
        matrices = {name: matrix for name, matrix in matrices.items() if matrix.numel == numel}
        v_name = module + v_leaf
    # BigGAN keeps u0 and the singular value sv0, and no v.
    elif not any(f"{stem}{name}" in tensors for name in (f"sv{number}", f"sigma{number}", "orig")):
        return None
    for name, matrix in matrices.items():
        if u.numel in matrix.shape:
            return SpectralNorm(name, module + match[0], v_name)
    return None


def _list_matrices(modules: Modules, module: str, stem: str) -> dict[str, Tensor]:
    """List the matrices that vectors may belong to, matrices of the same name first."""
    parametrization = _PARAMETRIZATION.fullmatch(module)
    if parametrization and ".parametrizations." in f".{module}":
        home, likely = parametrization["weight"], ["original"]
    else:
        home, likely = module, [stem.removesuffix("_") + ending for ending in (*_RAW, "")]
    tensors = modules.tensors.get(home, {})
    # A dict is an ordered set here.
    leaves = dict.fromkeys([*likely, "weight"])
    if len(tensors) <= _MOST_TENSORS:
        leaves |= dict.fromkeys(tensors)
    matrices: dict[str, Tensor] = {}
    for leaf in leaves:
        tensor = tensors.get(leaf)
        if tensor is not None and _is_matrix(tensor):
            matrices[home + leaf] = tensor
    return matrices


def _is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor of floats has two dimensions or more, and is no vector."""
    return tensor.dtype.kind == "float" and len(tensor.shape) > 1 and not _is_vector(tensor)


def _is_vector(tensor: Tensor) -> bool:
    """Tell whether floats are a vector: 1-d, or 2-d with an extent of 1."""
    if tensor.dtype.kind != "float" or not tensor.shape or len(tensor.shape) > 2:
        return False
    return tensor.numel == max(tensor.shape)


def limit_steps(shapes: Sequence[Sequence[int]]) -> int:
    """Return the largest number of steps of the power iteration per weight.

    Args:
        shapes: The shapes of all weights under spectral norm.
    """
    total = sum(math.prod(shape) + _STEP_COST for shape in shapes)
    return max(_FEWEST_STEPS, min(_MOST_STEPS, _BUDGET // max(1, total)))


def iterate_vectors(
    weight: torch.Tensor, vectors: Sequence[torch.Tensor], last: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run the power iteration until convergence, or for the largest number of steps.

    Args:
        weight: The averaged weight, of any float type.
        vectors: The last checkpoint's u, from which the iteration starts, and v if it is kept.
        last: The last checkpoint's weight. With the vectors it determines the dimension that u goes
            along.
        steps: Largest number of steps.

    Returns:
        u and v, float64, 1-d. None where the vectors are right as they are: the weight is the last
        checkpoint's own, or has no singular vectors.
    """
    if torch.equal(weight, last):
        return None
    matrix = _matrix(weight, _dimension(last, vectors))
    start = vectors[0].flatten().to(torch.float64)
    u_unit = _unit(start)
    # A vector of zeros or NaN has no direction to start from.
    if u_unit is None:
        u_unit = _unit(torch.ones_like(start))
    v_unit: torch.Tensor | None = None
    for _ in range(steps):
        if u_unit is None:
            return None
        previous = u_unit
        v_unit = _unit(_times(matrix.T, previous))
        if v_unit is None:
            return None
        u_unit = _unit(_times(matrix, v_unit))
        if u_unit is None or float((u_unit - previous).abs().max()) <= _CLOSE:
            break
    if u_unit is None or v_unit is None:
        return None
    return u_unit, v_unit


def _dimension(weight: torch.Tensor, vectors: Sequence[torch.Tensor]) -> int:
    """Tell the dimension of a weight that u goes along.

    Where several dimensions are as long as u, it is the one for which |uᵀWv| is largest: u and v
    are singular vectors of that matrix alone.
    """
    numel = vectors[0].numel()
    dimensions = [i for i, extent in enumerate(weight.shape) if extent == numel]
    if len(vectors) == 1 or len(dimensions) == 1:
        return dimensions[0]
    u, v = (vector.flatten().to(torch.float64) for vector in vectors)

    def singular_value(dimension: int) -> float:
        """Return |uᵀWv| for the matrix along a dimension."""
        projected = _times(_matrix(weight, dimension), v)
        return float(_sum((projected * u)[None]).abs())

    return max(dimensions, key=singular_value)


def _matrix(weight: torch.Tensor, dimension: int) -> torch.Tensor:
    """Return a weight as the normed matrix: float64, the dimension first, all others second."""
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
