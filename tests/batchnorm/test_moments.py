"""Moments of batches against numpy in float64; the limits within which kernels are relied on."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.batchnorm import moments
from ckptavg.batchnorm.moments import (
    TOLERANCE,
    KernelStatistics,
    Moments,
    batch_moments,
    instance_moments,
    merging_device,
    suits_kernel,
)

CPU = torch.device("cpu")
EPS = 1e-5


def normal(*shape, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return offset + torch.randn(*shape, generator=generator)


def by_numpy(values):
    """Mean and sum of squared deviations a channel, in float64."""
    rows = np.moveaxis(values.double().numpy(), 1, 0).reshape(values.shape[1], -1)
    return rows.mean(1), ((rows - rows.mean(1, keepdims=True)) ** 2).sum(1)


def kernel_of(values):
    """What torch's kernel leaves for a batch: mean and unbiased variance."""
    mean, variance = torch.zeros(2, values.shape[1])
    F.batch_norm(values, mean, variance, None, None, training=True, momentum=1.0, eps=EPS)
    return mean, variance


# In float64


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    axes=st.integers(2, 4),
    layout=st.sampled_from([*LAYOUTS]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    offset=st.sampled_from([0.0, 3.0, 5e4]),
    block=st.sampled_from([1, 7, 64, 1 << 16]),
)
def test_batch_moments_match_numpy_in_any_layout(shape, axes, layout, dtype, offset, block):
    values = LAYOUTS[layout](normal(*shape[:axes], offset=offset).to(dtype))
    before = values.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_BLOCK", block)
        found = batch_moments(values)
    mean, m2 = by_numpy(values)
    assert found.count == values.numel() // shape[1]
    np.testing.assert_allclose(found.mean, mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.m2, m2, rtol=1e-9, atol=1e-9)
    assert torch.equal(values, before)


def test_batch_moments_copy_no_whole_batch(monkeypatch):
    """In float64 it would be twice its size."""
    sizes = []
    original = moments._block_moments
    monkeypatch.setattr(
        moments, "_block_moments", lambda block: sizes.append(block.numel()) or original(block)
    )
    values = normal(8, 3, 200, 200)
    for layout in ("contiguous", "channels last"):
        batch_moments(LAYOUTS[layout](values))
    assert max(sizes) <= moments._BLOCK
    assert sum(sizes) == 2 * values.numel()


def test_moments_survive_json_exactly():
    for found in (batch_moments(normal(7, 3, offset=0.1)), instance_moments(normal(2, 3, 5))):
        again = Moments.from_plain(json.loads(json.dumps(found.to_plain())))
        assert (again.count, again.instances) == (found.count, found.instances)
        assert torch.equal(again.mean, found.mean)
        assert torch.equal(again.m2, found.m2)


def test_merging_device_of_mps_is_cpu():
    assert merging_device(torch.device("mps")) == CPU
    assert merging_device(torch.device("cuda:1")) == torch.device("cuda:1")


# From kernels


def written(kernels, batches):
    """Buffers with the kernel's statistics of a batch for each layer, None for no call."""
    buffers = kernels.take_buffers()
    for slot, values in enumerate(batches):
        if values is not None:
            mean, variance = kernel_of(values)
            buffers.mean[slot].copy_(mean)
            buffers.variance[slot].copy_(variance)
            buffers.counts[slot] = values.numel() // values.shape[1]
    return buffers


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    calls=st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 3.0, 50.0]),
)
def test_kernel_statistics_merge_layers_like_each_alone(sizes, calls, offset):
    """Whether or not a layer was called on a batch, and on how many samples."""
    kernels, seen = KernelStatistics(sizes, [EPS] * len(sizes), CPU), [[] for _ in sizes]
    for i, samples in enumerate(calls):
        batches = [
            normal(n, size, 3, seed=i * 7 + n, offset=offset) if n else None
            for n, size in zip(samples, sizes, strict=False)
        ]
        kernels.merge(written(kernels, batches))
        for of_layer, values in zip(seen, batches, strict=True):
            of_layer.extend([] if values is None else [values])
    for found, values in zip(kernels.moments(), seen, strict=True):
        if not values:
            assert found is None
            continue
        mean, m2 = by_numpy(torch.cat(values))
        assert found.count == sum(v.shape[0] * 3 for v in values)
        np.testing.assert_allclose(found.mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.m2, m2, rtol=TOLERANCE, atol=1e-6)


def test_kernel_statistics_reuse_emptied_buffers():
    kernels = KernelStatistics([2, 1], [EPS, EPS], CPU)
    buffers = written(kernels, [normal(4, 2, 3), None])
    buffers.both[1, 0] = torch.nan
    kernels.merge(buffers)
    assert kernels.take_buffers() is buffers
    assert buffers.counts == [0, 0]
    assert not buffers.both.any()


def doubted(means, variances, eps=EPS, device=CPU):
    """Which of layers of one channel each are in doubt."""
    kernels = KernelStatistics([1] * len(means), [eps] * len(means), CPU)
    empty, buffers = kernels.take_buffers(), kernels.take_buffers()
    buffers.both.copy_(torch.tensor([means, variances]))
    kernels._device = device
    return kernels.check_accuracy([empty, buffers]).inaccurate_layers()


def test_check_accuracy_doubts_large_mean():
    assert doubted([0.0, 90.0, -110.0, 5e4], [1.0] * 4) == [2, 3]


def test_check_accuracy_counts_eps():
    assert doubted([90.0], [1e-8], eps=1.0) == []
    assert doubted([90.0], [1e-8], eps=1e-5) == [0]


def test_check_accuracy_trusts_dead_channel_on_cpu():
    assert doubted([7.0, 0.0], [0.0, 0.0]) == []


def test_check_accuracy_trusts_other_devices_less():
    """Their kernels may subtract sums of squares, which can end at 0 for what is not."""
    mps = torch.device("mps")
    assert doubted([9.0, 11.0, 7.0, 0.0], [1.0, 1.0, 0.0, 0.0], device=mps) == [1, 2]


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_check_accuracy_doubts_nonfinite_values(device, value):
    means, variances = [value, 0.0, 0.0, value], [1.0, value, 1.0, 0.0]
    assert doubted(means, variances, device=torch.device(device)) == [0, 1, 3]


def test_check_accuracy_names_each_layer_once():
    kernels = KernelStatistics([3, 2], [EPS, EPS], CPU)
    buffers = kernels.take_buffers()
    buffers.mean[0][:2], buffers.variance[0][:2] = 1e6, 1.0
    assert kernels.check_accuracy([buffers]).inaccurate_layers() == [0]


@settings(max_examples=30, deadline=None)
@given(
    samples=st.integers(2, 40),
    edge=st.integers(2, 24),
    offset=st.sampled_from([0.0, 1.0, 30.0, 95.0, 1e3, 5e4]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    after_relu=st.booleans(),
)
def test_check_accuracy_passes_only_within_tolerance(samples, edge, offset, scale, after_relu):
    values = normal(samples, 4, edge, edge)
    values = scale * ((values.relu() if after_relu else values) + offset)
    assert suits_kernel(values)
    mean, variance = kernel_of(values)
    kernels = KernelStatistics([4], [EPS], CPU)
    if not kernels.check_accuracy([written(kernels, [values])]).inaccurate_layers():
        exact = batch_moments(values)
        room = exact.variance + EPS
        assert ((mean - exact.mean).abs() <= TOLERANCE * room.sqrt()).all()
        assert ((variance - exact.variance).abs() <= TOLERANCE * room).all()


@pytest.mark.parametrize(
    ("values", "suits"),
    [
        (normal(4, 3, 5, 5), True),
        (normal(4, 3, 5), True),
        (normal(4, 1, 5, 5), True),
        (normal(4, 3, 2, 2, 2), True),
        (normal(4, 3), False),
        (normal(4, 3, 1, 1), False),
        (normal(4, 3, 5, 5).to(memory_format=torch.channels_last), False),
        (normal(4, 5, 3).transpose(1, 2), False),
        (normal(4, 3, 5, 5).bfloat16(), False),
        (normal(4, 3, 5, 5).half(), False),
        (normal(4, 3, 5, 5).double(), False),
    ],
    ids=lambda v: f"{v.dtype} {v.stride()}" if isinstance(v, torch.Tensor) else str(v),
)
def test_suits_kernel_depends_on_layout_and_dtype(values, suits):
    assert suits_kernel(values) == suits


def test_cpu_kernel_is_inexact_for_channels_last():
    """Were it not any more, such inputs could be left to it."""
    values = normal(64, 8, 56, 56).relu().to(memory_format=torch.channels_last)
    exact = batch_moments(values).variance
    assert ((kernel_of(values)[1] - exact).abs() / exact).max() > TOLERANCE
