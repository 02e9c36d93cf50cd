"""Layers under spectral norm: which they are, and their vectors by power iteration.

Spectral norm divides a weight by its largest singular value, which is kept as uᵀWv in two vectors
(Miyato et al. 2018, Algorithm 1). The mean of such vectors is none, and the sign of a pair is
arbitrary: they have to be iterated anew on a weight that is averaged.

Sums are taken by halves, of products that are rounded on their own. So the bits do not depend on
the processor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ckptavg.formats.table import Tensor
from ckptavg.modules import Modules

_U = re.compile(r"(?P<stem>(?:[^\n]*_)?)u(?P<number>\d{0,3})")
_RAW = ("_orig", "_bar")  # what follows a weight's name where the weight itself is computed
_MATRICES = re.compile(r"(?P<weight>[^\n]*\.)0\.")  # the first parametrization of a weight
_MOST_TENSORS = 100  # of a layer; a module with more is a table without modules
_CLOSE = 2.0**-30  # change of a vector at which it has converged
_MOST_STEPS, _FEWEST_STEPS = 1000, 20
_BUDGET = 2**34  # elements that all layers of an average go over, about
_STEP_COST = 300_000  # elements that take as long as a step does by itself


@dataclass(frozen=True)
class SpectralNorm:
    """A layer under spectral norm, by the names of its tensors.

    Attributes:
        weight: The weight that is divided.
        u: Its left singular vector.
        v: The right one, where it is kept.
    """

    weight: str
    u: str
    v: str | None


def find_layers(modules: Modules) -> list[SpectralNorm]:
    """Layers under spectral norm in a checkpoint.

    A float vector ``u`` belongs to a matrix beside it if it is as long as one of the dimensions,
    and a vector ``v`` as long as all the others, or a scalar ``sv`` or ``sigma``, is there too.
    """
    layers: list[SpectralNorm] = []
    for module, tensors in modules:
        for leaf, u in tensors.items():
            match = _U.fullmatch(leaf)
            if match and _is_vector(u):
                layer = _layer(modules, module, leaf, match)
                layers += [layer] if layer else []
    return layers


def _layer(modules: Modules, module: str, leaf: str, match: re.Match[str]) -> SpectralNorm | None:
    tensors = modules.tensors[module]
    stem, number = match["stem"], match["number"]
    v = tensors.get(f"{stem}v{number}")
    sigma = any(f"{stem}{name}{number}" in tensors for name in ("sv", "sigma"))
    weights = _weights(modules, module, stem)
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


def _weights(modules: Modules, module: str, stem: str) -> dict[str, Tensor]:
    """Matrices that vectors may belong to, those of the vectors' own name first."""
    parametrized = _MATRICES.fullmatch(module)
    if parametrized and ".parametrizations." in f".{module}":
        home, own = parametrized["weight"], ["original"]
    else:
        home, own = module, [stem.removesuffix("_") + ending for ending in (*_RAW, "")]
    tensors = modules.tensors.get(home, {})
    leaves = dict.fromkeys([*own, "weight"])
    if len(tensors) <= _MOST_TENSORS:
        leaves |= dict.fromkeys(tensors)
    matrices = {home + leaf: tensors[leaf] for leaf in leaves if leaf in tensors}
    return {name: tensor for name, tensor in matrices.items() if _is_matrix(tensor)}


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of floats, or has more dimensions, two of which extend."""
    return tensor.dtype.kind == "float" and len(tensor.shape) > 1 and not _is_vector(tensor)


def _is_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a vector of floats, of one dimension or with others of extent 1."""
    if tensor.dtype.kind != "float" or not tensor.shape or len(tensor.shape) > 2:
        return False
    return tensor.numel == max(tensor.shape)


def most_steps(shapes: Sequence[Sequence[int]]) -> int:
    """How many steps of the power iteration each of some weights may take."""
    total = sum(math.prod(shape) + _STEP_COST for shape in shapes)
    return max(_FEWEST_STEPS, min(_MOST_STEPS, _BUDGET // max(1, total)))


def iterate_vectors(
    weight: torch.Tensor, u: torch.Tensor, v: torch.Tensor | None, last: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run the power iteration to its end.

    Args:
        weight: The averaged weight, of any float type.
        u: The last checkpoint's left vector, from which the iteration starts.
        v: Its right vector, if it is kept.
        last: Its weight, to tell the dimension that u goes along.
        steps: How many at most.

    Returns:
        The vectors, float64, 1-d. None where u and v are right as they are: the weight is the last
        checkpoint's own, or has no singular vectors.
    """
    if torch.equal(weight, last):
        return None
    matrix = _matrix(weight, _dimension(last, u, v))
    start = u.flatten().to(torch.float64)
    left = _unit(start)
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
    """The dimension of a weight that u goes along.

    Where several are as long as u, the last checkpoint's vectors fit one better than the others.
    """
    dimensions = [i for i, extent in enumerate(weight.shape) if extent == u.numel()]
    if v is None or len(dimensions) == 1:
        return dimensions[0]
    left, right = (vector.flatten().to(torch.float64) for vector in (u, v))
    values = [
        float(_sum((_times(_matrix(weight, dimension), right) * left)[None]).abs())
        for dimension in dimensions
    ]
    return dimensions[max(range(len(values)), key=values.__getitem__)]


def _matrix(weight: torch.Tensor, dimension: int) -> torch.Tensor:
    """A weight as the matrix that is normed: float64, (extent of the dimension, all others)."""
    moved = weight.movedim(dimension, 0)
    return moved.reshape(moved.shape[0], -1).to(torch.float64)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return _sum(matrix * vector)


def _sum(rows: torch.Tensor) -> torch.Tensor:
    """Sums of rows, by halves; the rows are used up.

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
    """A vector of length 1; None where it has no direction."""
    largest = float(vector.abs().max())
    if not math.isfinite(largest) or largest == 0:
        return None
    scaled = vector / largest
    return scaled / _sum((scaled * scaled)[None]).sqrt()
