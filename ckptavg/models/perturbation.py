"""Perturbations of a module's weights along random directions."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ckptavg.errors import ModelError
from ckptavg.formats.wrappers import bare_names

# Numbers that are drawn at a time, which bounds memory. The numbers depend on it.
_DRAW = 1 << 18
# torch's generator on the CPU uses no more bytes of a seed.
_SEED_BYTES = 4


@dataclass(frozen=True)
class Direction:
    """Random direction in weight space, uniform on the unit sphere.

    Independent standard normal numbers, divided by the norm of them all, are uniform on the sphere
    (Muller 1959). Seed, number and a weight's name decide the numbers, which are drawn on the CPU,
    weight by weight. So a direction takes no memory, is the same for every model of a kind, and
    does not depend on the device or the number of processes.

    All parameters of the module count together, those of BatchNorm layers included, tied ones once;
    a complex number counts as two numbers. Buffers, such as running statistics, have no part.

    Attributes:
        seed: Seed of a set of directions.
        number: Number of the direction in the set, from 0.
    """

    seed: int
    number: int

    def draw(self, name: str, count: int) -> Iterator[torch.Tensor]:
        """Draw the numbers of a weight before the division by the norm.

        Args:
            name: Bare name of the weight.
            count: Number of numbers.

        Yields:
            One part after another, standard normal, float64, on the CPU.
        """
        digest = hashlib.sha256(f"ray/{self.seed}/{self.number}/{name}".encode()).digest()
        generator = torch.Generator("cpu")
        generator.manual_seed(int.from_bytes(digest[:_SEED_BYTES], "little"))
        for start in range(0, count, _DRAW):
            part = min(_DRAW, count - start)
            yield torch.randn(part, generator=generator, dtype=torch.float64, device="cpu")

    def norm(self, weights: tuple[tuple[str, int], ...]) -> float:
        """Compute the norm of the numbers of all weights.

        Args:
            weights: Bare name and count of numbers of each weight.
        """
        return _compute_norm(self, weights)


# All points of a ray need the same norm.
@functools.lru_cache(maxsize=256)
def _compute_norm(direction: Direction, weights: tuple[tuple[str, int], ...]) -> float:
    squares: list[float] = []
    for name, count in weights:
        for numbers in direction.draw(name, count):
            squares.append(float(numbers.square().sum()))
    return math.sqrt(math.fsum(squares))


@dataclass(frozen=True)
class Perturbation:
    """Step from some weights along a random direction: w + t·d.

    Attributes:
        direction: d, of length 1.
        distance: t, in weight space.
    """

    direction: Direction
    distance: float

    def apply(self, model: nn.Module) -> None:
        """Move the parameters of a module; see ``apply_together``."""
        apply_together([(model, self)])


def apply_together(moves: Iterable[tuple[nn.Module, Perturbation]]) -> None:
    """Move the parameters of modules of one kind, and draw each direction only once.

    Drawing takes most of the time. Sums are computed in float64 on the CPU and rounded once to the
    parameter's type, so that they do not depend on the device or on the other modules.

    Args:
        moves: Modules, which change, each with its step.

    Raises:
        ModelError: A module has no floating-point parameters.
    """
    by_direction: dict[Direction, list[tuple[dict[str, torch.Tensor], float]]] = {}
    for model, step in moves:
        if step.distance:
            by_direction.setdefault(step.direction, []).append((_weights_of(model), step.distance))
    for direction, movers in by_direction.items():
        sizes: list[tuple[str, int]] = []
        # Modules of one kind have the same weights.
        for name, values in movers[0][0].items():
            sizes.append((name, values.numel()))
        norm = direction.norm(tuple(sizes))
        for name, count in sizes:
            targets: list[tuple[torch.Tensor, float]] = []
            for weights, distance in movers:
                targets.append((weights[name], distance / norm))
            _move(targets, direction.draw(name, count))


def _move(targets: Sequence[tuple[torch.Tensor, float]], drawn: Iterable[torch.Tensor]) -> None:
    """Move the same weight of several modules.

    Args:
        targets: Values of the weight, which change, each with a factor of the numbers.
        drawn: The numbers, one part after another.
    """
    # ``flatten`` copies a parameter whose memory is not contiguous.
    flat = [values.flatten() for values, _ in targets]
    start = 0
    for numbers in drawn:
        end = start + len(numbers)
        for values, (_, factor) in zip(flat, targets, strict=True):
            part = values[start:end]
            part.copy_((numbers * factor).add_(part.cpu().double()))
        start = end
    for moved, (values, _) in zip(flat, targets, strict=True):
        if not values.is_contiguous():
            values.copy_(moved.view(values.shape))


def _weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the values of a module's floating-point parameters, by bare name, as real numbers.

    Raises:
        ModelError: There are none.
    """
    stored = dict(model.named_parameters())
    bare = bare_names(list(stored))
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in stored.items():
        values = parameter.detach()
        if values.is_complex():
            values = torch.view_as_real(values)
        if values.is_floating_point() and values.numel():
            weights[bare.get(name, name)] = values
    if not weights:
        raise ModelError("the model has no floating-point parameters to move along a ray")
    return weights
