"""Mean and variance per channel: of a batch, from BatchNorm kernels, and merged.

A batch's moments come from one of two sources. Float64 reductions of a layer's input are exact, and
read the input once more. The kernel that normalizes the input computes moments anyway, and serves
where its arithmetic is accurate enough. Batches are merged in float64 (Chan et al. 1979).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptavg.errors import BatchNormError

TOLERANCE = 1e-5
"""Largest error of a batch's statistics before the batch is reduced in float64 instead.

The error of the mean is a fraction of a standard deviation, that of the variance a fraction of the
variance, with eps included in both. A layer's output is then off by no more than this.
"""

_LARGEST_MEAN = {"cpu": 100.0}
"""Largest mean, in standard deviations, up to which a kernel keeps within the tolerance.

Measured with torch 2.15 on CPU, contiguous float32: the variance is off by 1e-7 at any mean, the
mean by 4e-8 of the mean.
"""
# On other devices the kernel is the vendor's. Even a difference of sums of squares in float32 stays
# within the tolerance up to this limit: its error of 1e-7 grows with the square of the mean.
_LARGEST_MEAN_ELSEWHERE = 10.0
# Values that are reduced at once on a CPU; in float64 they fit into its cache.
_BLOCK = 1 << 16


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel, in float64.

    The running statistics of InstanceNorm are means over instances. For InstanceNorm, ``m2`` is
    the sum of the instances' variances instead.

    Attributes:
        count: Values per channel; instances where ``instances`` is set.
        mean: (channels) float64.
        m2: (channels) float64: sum of squared deviations, or of the instances' variances.
        instances: True if the moments are means over instances.
    """

    count: int
    mean: torch.Tensor
    m2: torch.Tensor
    instances: bool = False

    def merge(self, other: Moments) -> None:
        """Merge in the moments of another set of values (Chan et al. 1979)."""
        total = self.count + other.count
        delta = other.mean - self.mean
        if not self.instances:
            self.m2 += delta.square() * (self.count * other.count / total)
        self.m2 += other.m2
        self.mean += delta * (other.count / total)
        self.count = total

    @property
    def variance(self) -> torch.Tensor:
        """Variance for ``running_var``: unbiased, as torch stores it."""
        if self.instances:
            return self.m2 / self.count
        return self.m2 / (self.count - 1)

    def on_cpu(self) -> Moments:
        """Copy the moments to the CPU."""
        return Moments(self.count, self.mean.cpu(), self.m2.cpu(), self.instances)

    def to_plain(self) -> list[Any]:
        """Convert the moments to plain values, which JSON carries without loss."""
        return [self.count, self.mean.tolist(), self.m2.tolist(), self.instances]

    @classmethod
    def from_plain(cls, values: Sequence[Any]) -> Moments:
        """Build moments from the values that ``to_plain`` returned."""
        count, mean, m2, instances = values
        parts = torch.tensor([mean, m2], dtype=torch.float64)
        return cls(count, parts[0], parts[1], instances)


def require_several(name: str, moments: Moments) -> None:
    """Raise an error if moments have too few values for a variance."""
    if moments.count < 2 and not moments.instances:
        raise BatchNormError(
            f"the layer {name} saw a single value per channel, which has no variance",
            "Pass more training data.",
        )


def require_finite(name: str, moments: Moments) -> None:
    """Raise an error if moments are not finite."""
    if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.m2).all()):
        raise BatchNormError(
            f"the inputs of the layer {name} are not finite",
            "Look at the data and the weights; `amp='off'` may help.",
        )


def merging_device(device: torch.device) -> torch.device:
    """Return the device that merges a device's results in float64.

    It is the device itself, except for Apple's mps: mps has no float64, so the CPU merges.
    """
    if device.type == "mps":
        return torch.device("cpu")
    return device


def batch_moments(values: torch.Tensor) -> Moments:
    """Compute the moments of a batch per channel, over all other axes.

    Args:
        values: Shape (N, C, ...), not empty.
    """
    values = values.detach().to(merging_device(values.device))
    if not values.is_cpu:
        axes = [axis for axis in range(values.dim()) if axis != 1]
        variance, mean = torch.var_mean(values.double(), axes, correction=0)
        count = values.numel() // values.shape[1]
        return Moments(count, mean, variance * count)
    first, *later_blocks = map(_block_moments, _blocks(values))
    for block in later_blocks:
        first.merge(block)
    return first


def _blocks(values: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split a batch into parts of shape (n, C, length) that fit a CPU cache in float64.

    torch's own reductions on a CPU take ten times as long, most of the time for memory.
    """
    channels = values.shape[1]
    if values.is_contiguous():
        rows = values.reshape(values.shape[0], channels, -1)
    else:
        # In channels_last this is a view, without a copy.
        rows = values.movedim(1, -1).reshape(-1, channels, 1)
    for samples in torch.split(rows, max(1, _BLOCK // rows[0].numel())):
        yield from torch.split(samples, max(1, _BLOCK // channels), 2)


def _block_moments(block: torch.Tensor) -> Moments:
    """Compute the moments of a block of shape (n, C, length) per channel."""
    wide = block.double()
    count = wide.shape[0] * wide.shape[2]
    mean = wide.sum((0, 2)) / count
    return Moments(count, mean, (wide - mean[:, None]).square_().sum((0, 2)))


def instance_moments(values: torch.Tensor) -> Moments:
    """Compute the moments of a batch over each instance separately, as InstanceNorm does.

    Args:
        values: Shape (N, C, ...).
    """
    wide = values.detach().to(merging_device(values.device)).double().flatten(2)
    variance, mean = torch.var_mean(wide, 2, correction=1)
    return Moments(values.shape[0], mean.mean(0), variance.sum(0), instances=True)


def suits_kernel(values: torch.Tensor) -> bool:
    """Return True if a kernel's statistics of an input can be within the tolerance.

    On a CPU the input must be contiguous float32 with more than one value per channel and sample.
    Where channels are adjacent in memory (channels_last, or no other axes), the CPU kernel sums in
    plain float32. Half precision is summed in float32 too. The variance of 128 x 56 x 56 values is
    then off by 1e-4, after a ReLU by 3e-3 (measured with torch 2.15).
    """
    if values.is_cpu:
        return values.dtype == torch.float32 and values.is_contiguous() and values.stride(1) > 1
    return values.dtype in {torch.float32, torch.float16, torch.bfloat16}


class KernelBuffers:
    """Per-batch buffers that the BatchNorm kernels of a model write into.

    Args:
        sizes: Channels of each layer.
        device: Device of the model.

    Attributes:
        both: (2, channels of all layers) float32: means, and unbiased variances.
        mean: Views of ``both``, one per layer, for ``running_mean``.
        variance: Views of ``both``, one per layer, for ``running_var``.
        counts: Values per channel that each layer has seen; 0 for a layer that was not called.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.both = torch.zeros(2, sum(sizes), device=device)
        self.mean, self.variance = (row.split([*sizes]) for row in self.both)
        self.counts = [0] * len(sizes)

    def clear(self) -> None:
        """Reset the buffers and counts for another batch."""
        # A kernel multiplies the old values by 0. Values that are not finite would survive that.
        self.both.zero_()
        self.counts = [0] * len(self.counts)


class AccuracyCheck:
    """Deferred list of channels whose statistics may be off by more than the tolerance.

    The list is known once the device has worked through the batch.

    Args:
        doubtful: (channels of all layers) bool.
        layer: (channels of all layers): the number of each channel's layer.
    """

    def __init__(self, doubtful: torch.Tensor, layer: torch.Tensor) -> None:
        self._layer = layer
        # The copy from CUDA does not block; the event says when the values may be read.
        self._on_cpu = doubtful.to("cpu", non_blocking=doubtful.is_cuda)
        self._copied: torch.cuda.Event | None = None
        if doubtful.is_cuda:
            self._copied = torch.cuda.current_stream(doubtful.device).record_event()

    def inaccurate_layers(self) -> list[int]:
        """List the layers of the doubtful channels, after waiting for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        if not self._on_cpu.any():
            return []
        return sorted(set(self._layer[self._on_cpu].tolist()))


class KernelStatistics:
    """Moments of all layers of a model, merged from kernel statistics in few operations per batch.

    Args:
        sizes: Channels of each layer.
        eps: ``eps`` of each layer.
        device: Device of the model.
    """

    def __init__(self, sizes: Sequence[int], eps: Sequence[float], device: torch.device) -> None:
        self._sizes = torch.tensor([*sizes], dtype=torch.long)
        self._device = device
        self._merging_device = merging_device(device)
        self._layer = torch.arange(len(sizes)).repeat_interleave(self._sizes)
        self._eps = torch.tensor([*eps]).repeat_interleave(self._sizes).to(device)
        shape = (3, int(self._sizes.sum()))
        self._count, self._mean, self._m2 = torch.zeros(
            shape, dtype=torch.float64, device=self._merging_device
        )
        self._last_counts: tuple[list[int], torch.Tensor] | None = None
        self._unused: list[KernelBuffers] = []

    def take_buffers(self) -> KernelBuffers:
        """Take empty buffers, reused where possible."""
        return (
            self._unused.pop()
            if self._unused
            else KernelBuffers(self._sizes.tolist(), self._device)
        )

    def check_accuracy(self, buffers: Sequence[KernelBuffers]) -> AccuracyCheck:
        """Find the statistics that may exceed the tolerance, from the kernels' own values.

        Statistics that are not finite are doubtful too.
        """
        largest_mean = _LARGEST_MEAN.get(self._device.type, _LARGEST_MEAN_ELSEWHERE)
        doubtful = torch.zeros_like(self._eps, dtype=torch.bool)
        for written in buffers:
            mean, variance = written.both
            fine = mean.square() <= largest_mean**2 * (variance + self._eps)
            fine &= variance < torch.inf
            # A CPU kernel subtracts the mean before it squares, so a variance of 0 is exact there:
            # the channel is dead.
            if self._device.type == "cpu":
                fine |= (variance == 0) & mean.isfinite()
            doubtful |= ~fine
        return AccuracyCheck(doubtful, self._layer)

    def merge(self, buffers: KernelBuffers) -> None:
        """Merge a batch into the moments of all layers at once (Chan et al. 1979).

        The buffers are cleared and may be used again.
        """
        mean, variance = buffers.both.to(self._merging_device).to(torch.float64)
        count = self._counts(buffers.counts)
        total = self._count + count
        # Without the clamp, layers without data would divide 0 by 0.
        share = count / total.clamp(min=1)
        delta = mean - self._mean
        # The kernels' variances are unbiased: count - 1 gives back the sum of squared deviations.
        self._m2 += variance * (count - 1).clamp(min=0) + delta.square() * share * self._count
        self._mean += delta * share
        self._count = total
        buffers.clear()
        self._unused.append(buffers)

    def moments(self) -> list[Moments | None]:
        """Return the moments of each layer on the CPU; None for a layer without data."""
        parts = torch.stack((self._count, self._mean, self._m2)).cpu()
        by_layer = torch.split(parts, self._sizes.tolist(), dim=1)
        moments: list[Moments | None] = []
        for counts, mean, m2 in by_layer:
            count = int(counts[0])
            if count:
                moments.append(Moments(count, mean.clone(), m2.clone()))
            else:
                moments.append(None)
        return moments

    def _counts(self, counts: list[int]) -> torch.Tensor:
        """Return a batch's counts per channel as a tensor."""
        # Most batches have the counts of the batch before, so the tensor is kept.
        if self._last_counts is None or self._last_counts[0] != counts:
            per_channel = torch.tensor(counts, dtype=torch.float64).repeat_interleave(self._sizes)
            self._last_counts = counts, per_channel.to(self._merging_device)
        return self._last_counts[1]
