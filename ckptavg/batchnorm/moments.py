"""Mean and variance a channel: of a batch, as BatchNorm's kernels leave them, and merged.

A batch's moments come from float64 reductions of a layer's input, which is exact and reads the
input once more; or from the kernel that normalizes the input anyway, where its arithmetic is
accurate enough. Batches are merged in float64 (Chan et al. 1979) either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

TOLERANCE = 1e-5
"""How far off a batch's statistics may be before they are reduced in float64 instead.

The mean by this part of a standard deviation, the variance by this part of itself, eps included
both times: what a layer puts out is then off by no more than that.
"""

_STEEPEST = {"cpu": 100.0}
"""Largest mean, in standard deviations, up to which a kernel keeps within the tolerance.

Measured with torch 2.15 on CPU, contiguous float32: the variance is off by 1e-7 whatever the mean,
the mean by 4e-8 of itself. On other devices the kernel is the vendor's; the limit there is one that
even a difference of sums of squares in float32 keeps, whose error of 1e-7 grows with the square.
"""
_STEEPEST_ELSEWHERE = 10.0
_BLOCK = 1 << 16  # values that are reduced at once on a CPU


@dataclass
class Moments:
    """Count, mean and sum of squared deviations a channel, in float64.

    For InstanceNorm, whose running statistics are means over instances, ``spread`` is the sum of
    the instances' variances instead, and one instance counts one.
    """

    count: int
    mean: torch.Tensor
    spread: torch.Tensor
    instances: bool = False

    def merge(self, other: Moments) -> None:
        """Take in another set of values (Chan et al.)."""
        total = self.count + other.count
        delta = other.mean - self.mean
        if not self.instances:
            self.spread += delta.square() * (self.count * other.count / total)
        self.spread += other.spread
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """What goes into ``running_var``: unbiased, as torch stores it."""
        return self.spread / (self.count if self.instances else self.count - 1)

    def on_cpu(self) -> Moments:
        """The same on the CPU."""
        return Moments(self.count, self.mean.cpu(), self.spread.cpu(), self.instances)

    def plain(self) -> list[Any]:
        """As plain values, which JSON carries without loss."""
        return [self.count, self.mean.tolist(), self.spread.tolist(), self.instances]

    @classmethod
    def of_plain(cls, values: Sequence[Any]) -> Moments:
        """What ``plain`` made."""
        count, mean, spread, instances = values
        parts = torch.tensor([mean, spread], dtype=torch.float64)
        return cls(count, parts[0], parts[1], instances)


def home_of(device: torch.device) -> torch.device:
    """Where what a device computes is merged in float64, which Apple's mps does not have."""
    return torch.device("cpu") if device.type == "mps" else device


def batch_moments(values: torch.Tensor) -> Moments:
    """Of a batch of shape (N, C, ...) that is not empty, over all but the channels."""
    values = values.detach().to(home_of(values.device))
    if not values.is_cpu:
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values.double(), axes, correction=0)
        count = values.numel() // values.shape[1]
        return Moments(count, mean, variance * count)
    first, *others = map(_block_moments, _blocks(values))
    for other in others:
        first.merge(other)
    return first


def _blocks(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Parts of shape (n, C, length) that a processor's cache holds in float64.

    torch's own reductions on a CPU take ten times as long, most of it for memory.
    """
    channels = values.shape[1]
    if values.is_contiguous():
        rows = values.reshape(values.shape[0], channels, -1)
    else:
        rows = values.movedim(1, -1).reshape(-1, channels, 1)
    for samples in torch.split(rows, max(1, _BLOCK // rows[0].numel())):
        yield from torch.split(samples, max(1, _BLOCK // channels), 2)


def _block_moments(block: torch.Tensor) -> Moments:
    wide = block.double()
    count = wide.shape[0] * wide.shape[2]
    mean = wide.sum((0, 2)) / count
    return Moments(count, mean, (wide - mean[:, None]).square_().sum((0, 2)))


def instance_moments(values: torch.Tensor) -> Moments:
    """Of a batch of shape (N, C, ...), over each instance by itself."""
    wide = values.detach().to(home_of(values.device)).double().flatten(2)
    variance, mean = torch.var_mean(wide, 2, correction=1)
    return Moments(values.shape[0], mean.mean(0), variance.sum(0), instances=True)


def suits_kernel(values: torch.Tensor) -> bool:
    """Whether a kernel's statistics of such an input can be within the tolerance.

    On a CPU only those of contiguous float32 of more than one value a channel and sample are.
    Channels that lie beside each other (channels_last, or no other axes) are summed up in plain
    float32, half precision in float32 too: measured with torch 2.15, the variance of 128 x 56 x 56
    values is off by 1e-4, after a ReLU by 3e-3.
    """
    if values.is_cpu:
        return values.dtype == torch.float32 and values.is_contiguous() and values.stride(1) > 1
    return values.dtype in {torch.float32, torch.float16, torch.bfloat16}


class Landing:
    """Where the kernels of all layers of a model leave the statistics of one batch.

    Args:
        sizes: Channels of each layer.
        device: Where the model is.

    Attributes:
        both: (2, channels of all layers) float32: means, and unbiased variances.
        mean: Views of each layer's part of it, for ``running_mean``.
        variance: The same for ``running_var``.
        counts: Values a channel that each layer has seen; 0 for one that was not called.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.both = torch.zeros(2, sum(sizes), device=device)
        self.mean, self.variance = (row.split([*sizes]) for row in self.both)
        self.counts = [0] * len(sizes)

    def clear(self) -> None:
        """Make it as new: a kernel adds to nothing, but times what is not finite would stay."""
        self.both.zero_()
        self.counts = [0] * len(self.counts)


class Doubt:
    """Which channels' statistics may be off, as is known once the device has come that far.

    Args:
        doubtful: (channels of all layers) bool.
        layer: (channels of all layers): the layer of each.
    """

    def __init__(self, doubtful: torch.Tensor, layer: torch.Tensor) -> None:
        self._layer = layer
        self._found = doubtful.to("cpu", non_blocking=doubtful.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if doubtful.is_cuda:
            self._copied = torch.cuda.current_stream(doubtful.device).record_event()

    def layers(self) -> list[int]:
        """The layers of these channels."""
        if self._copied is not None:
            self._copied.synchronize()
        return sorted(set(self._layer[self._found].tolist())) if self._found.any() else []


class KernelMoments:
    """Moments of all layers of a model from what their kernels leave, a few operations a batch.

    Args:
        sizes: Channels of each layer.
        eps: Of each layer.
        device: Where the model is.
    """

    def __init__(self, sizes: Sequence[int], eps: Sequence[float], device: torch.device) -> None:
        self._sizes = torch.tensor([*sizes], dtype=torch.long)
        self._device = device
        self._home = home_of(device)
        self._layer = torch.arange(len(sizes)).repeat_interleave(self._sizes)
        self._eps = torch.tensor([*eps]).repeat_interleave(self._sizes).to(device)
        shape = (3, int(self._sizes.sum()))
        self._count, self._mean, self._spread = torch.zeros(
            shape, dtype=torch.float64, device=self._home
        )
        self._known: tuple[list[int], torch.Tensor] | None = None
        self._spare: list[Landing] = []

    def landing(self) -> Landing:
        """An empty one."""
        return self._spare.pop() if self._spare else Landing(self._sizes.tolist(), self._device)

    def doubt(self, landings: Sequence[Landing]) -> Doubt:
        """Which statistics may exceed the tolerance, by what the kernels themselves found.

        A CPU's kernel takes the mean off before it squares, so 0 is right there: the channel is
        dead. What is not finite is doubtful too.
        """
        steepest = _STEEPEST.get(self._device.type, _STEEPEST_ELSEWHERE)
        doubtful = torch.zeros_like(self._eps, dtype=torch.bool)
        for landing in landings:
            mean, variance = landing.both
            fine = mean.square() <= steepest**2 * (variance + self._eps)
            fine &= variance < torch.inf
            if self._device.type == "cpu":
                fine |= (variance == 0) & mean.isfinite()
            doubtful |= ~fine
        return Doubt(doubtful, self._layer)

    def merge(self, landing: Landing) -> None:
        """Take in a batch (Chan et al., all layers at once); the landing may be used again."""
        mean, variance = landing.both.to(self._home).to(torch.float64)
        count = self._counts(landing.counts)
        total = self._count + count
        share = count / total.clamp(min=1)
        delta = mean - self._mean
        self._spread += variance * (count - 1).clamp(min=0) + delta.square() * share * self._count
        self._mean += delta * share
        self._count = total
        landing.clear()
        self._spare.append(landing)

    def moments(self) -> list[Moments | None]:
        """Of each layer, on the CPU; None where nothing came."""
        parts = torch.stack((self._count, self._mean, self._spread)).cpu()
        each = torch.split(parts, self._sizes.tolist(), dim=1)
        return [Moments(int(n[0]), m.clone(), s.clone()) if n[0] else None for n, m, s in each]

    def _counts(self, counts: list[int]) -> torch.Tensor:
        """A batch's counts a channel; most batches have those of the one before."""
        if self._known is None or self._known[0] != counts:
            each = torch.tensor(counts, dtype=torch.float64).repeat_interleave(self._sizes)
            self._known = counts, each.to(self._home)
        return self._known[1]
