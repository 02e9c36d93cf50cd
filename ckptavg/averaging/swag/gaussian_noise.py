"""Standard normal numbers for the elements of tensors, the same however the tensor is cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

# Elements that are drawn together. The numbers depend on it, so it must not change.
_DRAW = 1 << 14
# Bytes of the digest that seeds torch's generator on the CPU, which uses no more.
_SEED_BYTES = 4


@dataclass(frozen=True)
class GaussianNoise:
    """Noise on an average: the sources' standard deviation times a standard normal number.

    Attributes:
        key: Text that decides the numbers, with the element's position.
        factor: Factor of the noise.
        least_variance: Smaller variances are raised to this.
    """

    key: str
    factor: float
    least_variance: float

    def draw(self, start: int, count: int, numel: int) -> torch.Tensor:
        """Draw the numbers of some elements.

        Args:
            start: Position of the first element.
            count: Number of elements.
            numel: Number of elements of the whole tensor.

        Returns:
            float64, (count,).
        """
        drawn: list[torch.Tensor] = []
        for first in range(start // _DRAW * _DRAW, start + count, _DRAW):
            # The last draw of a tensor is shorter, so that a small tensor costs little.
            numbers = draw_normals(f"{self.key}/{first}", min(_DRAW, numel - first))
            drawn.append(numbers[max(0, start - first) : start + count - first])
        return torch.cat(drawn)

    def deviation(self, rows: torch.Tensor, positions: list[int]) -> torch.Tensor:
        """Compute the standard deviation of each element over the sources.

        The variance is the mean of squares less the square of the mean, computed as the mean
        square of the differences from the mean: the same number without the loss of digits. Each
        product and each sum is rounded on its own, so that bits do not depend on the block.

        Args:
            rows: float64, (rows, floats): values of the sources.
            positions: The rows to take, one per source.

        Returns:
            float64, (floats,).
        """
        mean = torch.zeros_like(rows[0])
        for position in positions:
            mean.add_(rows[position])
        mean.div_(len(positions))
        variance = torch.zeros_like(mean)
        for position in positions:
            difference = rows[position] - mean
            variance.add_(difference.mul_(difference))
        return variance.div_(len(positions)).clamp_(min=self.least_variance).sqrt_()


def draw_normals(key: str, count: int) -> torch.Tensor:
    """Draw standard normal numbers that a text decides.

    Args:
        key: The text.
        count: Number of numbers. Fewer numbers are not the beginning of more.

    Returns:
        float64, (count,), on the CPU.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator("cpu")
    generator.manual_seed(int.from_bytes(digest[:_SEED_BYTES], "little"))
    return torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
