"""What a pass takes from the layers' kernels against float64 reductions of the same inputs."""

import copy
import gc
import json
import threading
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptavg import update_bn
from ckptavg.batchnorm import collect, hooks
from ckptavg.batchnorm.moments import TOLERANCE, batch_moments
from ckptavg.batchnorm.update import recompute
from ckptavg.errors import BatchNormError, EvaluationError
from ckptavg.models.runtime import Runtime

CPU = Runtime(torch.device("cpu"))
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def normal(*shape, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return offset + torch.randn(*shape, generator=generator)


def images(sizes, channels=3, offset=0.0):
    return [normal(n, channels, 6, 6, seed=i, offset=offset) for i, n in enumerate(sizes)]


class Net(nn.Module):
    """Convolutions and BatchNorm layers in a random arrangement, one of them used twice."""

    def __init__(self, widths, seed=0, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(seed)
        ends = [3, *widths]
        self.first = norm(3)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(ends, widths, strict=False)
        )
        self.norms = nn.ModuleList(norm(width) for width in widths)
        self.head = nn.Linear(widths[-1], 2)

    def forward(self, x):
        x = self.first(x)
        for conv, layer in zip(self.convs, self.norms, strict=True):
            x = F.relu(layer(conv(x)))
        x = self.norms[-1](x + 1)
        return self.head(x.mean((2, 3)))


def in_float64(model, data, **options):
    """Statistics of a copy of the model with all of its layers' inputs reduced in float64."""
    model = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "suits_kernel", lambda values: False)
        update_bn(model, data, **options)
    return model


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}


def assert_within_tolerance(model, expected):
    for name, layer in layers_of(model).items():
        other = layers_of(expected)[name]
        mean, variance = other.running_mean.double(), other.running_var.double()
        room = variance + layer.eps
        assert ((layer.running_mean.cpu() - mean).abs() <= TOLERANCE * room.sqrt()).all(), name
        assert ((layer.running_var.cpu() - variance).abs() <= TOLERANCE * room).all(), name
        assert layer.num_batches_tracked == other.num_batches_tracked, name


@pytest.fixture
def reduced(monkeypatch):
    """Counts the inputs that are reduced in float64, by their shape."""
    found = Counter()

    def counted(values):
        found.update([tuple(values.shape)])
        return batch_moments(values)

    monkeypatch.setattr(hooks, "batch_moments", counted)
    return found


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    offset=st.sampled_from([0.0, 2.0, 50.0, 5e4]),
    channels_last=st.booleans(),
)
def test_update_bn_matches_float64_within_tolerance(widths, sizes, offset, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    model = Net(widths).to(memory_format=form)
    data = [x.to(memory_format=form) for x in images(sizes, offset=offset)]
    expected = in_float64(model, data)
    update_bn(model, data)
    assert_within_tolerance(model, expected)


def test_update_bn_reads_inputs_once_for_kernel(reduced):
    update_bn(Net([4, 5]), images([4, 3]))
    assert not reduced


@pytest.mark.parametrize("offset", [0.0, 5e4])
def test_update_bn_reduces_doubtful_layer_in_float64(reduced, offset, caplog):
    caplog.set_level("INFO", "ckptavg")
    data = [*images([4]), normal(5, 3, 6, 6, seed=7, offset=offset), *images([6, 2])]
    model, calls = Net([4]), []
    model.register_forward_hook(lambda *_: calls.append(1))
    update_bn(model, data)
    mean, variance = (f(torch.cat(data).double(), (0, 2, 3)) for f in (torch.mean, torch.var))
    torch.testing.assert_close(model.first.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.first.running_var.double(), variance, rtol=1e-6, atol=0)
    assert model.first.num_batches_tracked == 4
    if offset:
        assert reduced == {(5, 3, 6, 6): 1, (6, 3, 6, 6): 1, (2, 3, 6, 6): 1}
        assert len(calls) == 5
        assert "the kernels' statistics of first may be off by more than 1e-05" in caplog.text
    else:
        assert not reduced


def test_update_bn_counts_repeated_batch_once():
    data = [*images([4]), normal(5, 3, 6, 6, seed=7, offset=5e4), *images([6])]
    model = Net([4, 2])
    expected = in_float64(model, data)
    update_bn(model, data)
    assert_within_tolerance(model, expected)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_update_bn_gives_same_result_settling_late(monkeypatch, at):
    """As on a GPU, which is not waited for."""
    data = images([4, 3, 5, 2])
    data[at] = data[at] + 5e4
    at_once, late = Net([4, 2]), Net([4, 2])
    update_bn(at_once, data)
    original = collect.ModelPass.__init__

    def made_late(self, *args):
        original(self, *args)
        self._late = 1

    monkeypatch.setattr(collect.ModelPass, "__init__", made_late)
    update_bn(late, data)
    for name, value in at_once.state_dict().items():
        torch.testing.assert_close(late.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def test_update_bn_needs_no_float64_for_dead_channel(reduced):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 7.0
    update_bn(model, images([4, 3]))
    assert (model[1].running_mean[0], model[1].running_var[0]) == (7, 0)
    assert not reduced


def test_update_bn_takes_layers_in_any_order():
    model = nn.ModuleDict({name: nn.BatchNorm2d(3) for name in "abc"})
    orders = iter(["ab", "ba", "bba", "c"] * 2)

    def forward(model, batch):
        for name in next(orders):
            batch = model[name](batch) * 2 + 1

    data = images([4, 3, 5, 2])
    expected = in_float64(model, data, forward=forward)
    assert update_bn(model, data, forward=forward).layers == 3
    assert_within_tolerance(model, expected)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_recompute_matches_each_model_alone(amp):
    together = [Net([4, 2], seed=i) for i in range(3)]
    with torch.no_grad():
        together[1].convs[0].bias += 1e5  # in doubt in this one only
    alone, data = copy.deepcopy(together), images([4, 3])
    recompute(together, data, Runtime(torch.device("cpu"), amp=amp))
    for one, other in zip(together, alone, strict=True):
        update_bn(other, data, amp=amp)
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


# What is left as it was


def own_tensors(model):
    return {n: (t, t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def assert_untouched(model, before):
    after = own_tensors(model)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name][0] is tensor, name
        assert torch.equal(tensor, value), name


def broken():
    yield from images([4, 3])
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (broken, OSError, "the disk is gone"),
        (list, BatchNormError, "training data is empty"),
        (lambda: [*images([4, 3]), torch.full((4, 3, 6, 6), torch.nan)], BatchNormError, "first"),
        (lambda: [*images([4, 3]), torch.full((4, 3, 6, 6), torch.inf)], BatchNormError, "first"),
        (
            lambda: [*images([4]), normal(4, 2, 6, 6)],
            EvaluationError,
            "running_mean should contain 2",
        ),
    ],
    ids=["loader", "empty", "nan", "inf", "channels"],
)
def test_recompute_restores_tensors_on_failure(data, error, message):
    models = [Net([4]), Net([4], norm=nn.SyncBatchNorm)]
    update_bn(models[0], images([5]))
    before = [own_tensors(model) for model in models]
    kinds = [type(layer) for model in models for layer in model.modules()]
    with pytest.raises(error, match=message):
        recompute(models, data(), CPU)
    for model, was in zip(models, before, strict=True):
        assert_untouched(model, was)
    assert [type(layer) for model in models for layer in model.modules()] == kinds
    assert [layer.momentum for layer in layers_of(models[0]).values()] == [0.1, 0.1]


def test_update_bn_writes_into_same_buffers():
    """Whoever holds them sees the change."""
    model = Net([4])
    before = own_tensors(model)
    update_bn(model, images([4]))
    for name, (tensor, _) in own_tensors(model).items():
        assert tensor is before[name][0]


@pytest.mark.parametrize("offset", [0.0, 5e4])
def test_update_bn_leaves_no_reference_to_model(offset):
    """Not when Python looks for cycles: many candidates share a device's memory."""
    gc.disable()
    try:
        model = Net([4])
        update_bn(model, images([4, 3], offset=offset))
        alive = weakref.ref(model.norms[0])
        del model
        assert alive() is None
    finally:
        gc.enable()


# Layers with a forward pass of their own


class WithoutMomentum(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


@pytest.mark.parametrize(("kind", "reductions"), [(Activated, 0), (WithoutMomentum, 3)])
def test_update_bn_trusts_custom_forward_like_torchs(reduced, kind, reductions):
    layer, data = kind(3), images([4, 3, 5], offset=2.0)
    update_bn(layer, data)
    values = torch.cat(data).double()
    torch.testing.assert_close(
        layer.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(layer.running_var.double(), values.var((0, 2, 3)), rtol=1e-6, atol=0)
    assert sum(reduced.values()) == reductions


@pytest.mark.parametrize("name", ["BatchNormAct2d", "SyncBatchNormAct"])
def test_update_bn_takes_timm_activation_layers(reduced, name):
    kind = getattr(pytest.importorskip("timm.layers.norm_act"), name)
    layer, data = kind(3), images([4, 3, 5], offset=2.0)
    if name == "SyncBatchNormAct":
        layer.act = nn.ReLU()
    outputs = []
    layer.register_forward_hook(lambda *args: outputs.append(args[2].min().item()))
    update_bn(layer, data)
    assert type(layer) is kind
    assert outputs == [0, 0, 0]
    expected = torch.cat(data).double().var((0, 2, 3))
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-6, atol=0)
    assert not reduced


# Several processes


class Thread:
    """One of several peers, each of them a thread; all they hand in goes through JSON."""

    def __init__(self, rank, count, shared):
        self.rank, self.world_size = rank, count
        self.shared, self.gathered, self.checks = shared, 0, 0

    def gather(self, value):
        self.gathered += 1
        self.shared["parts"][self.rank] = json.dumps(value)
        self.shared["barrier"].wait(60)
        return [json.loads(part) for part in self.shared["parts"]]

    def check(self):
        pass


def in_threads(count, data):
    """Two models a thread, each of which takes every n-th batch."""
    shared = {"barrier": threading.Barrier(count), "parts": [""] * count}
    peers = [Thread(rank, count, shared) for rank in range(count)]
    models = [[Net([4, 2], seed=i) for i in range(2)] for _ in range(count)]
    results = [None] * count

    def work(rank):
        part = data[rank::count]
        results[rank] = recompute(models[rank], part, CPU, peers=peers[rank])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return models, results, peers


@pytest.mark.parametrize("count", [2, 3, 6])
def test_recompute_in_processes_matches_one(count):
    data = images([4, 3, 5, 1, 2], offset=1.0)
    data[3] = data[3] + 5e4  # in doubt in one process only
    alone = [Net([4, 2], seed=i) for i in range(2)]
    recompute(alone, data, CPU)
    models, results, peers = in_threads(count, data)
    for rank in range(count):
        assert [r.batches for r in results[rank]] == [len(data[rank::count])] * 2
        assert peers[rank].gathered == 1
        for one, other, first in zip(models[rank], alone, models[0], strict=True):
            for name, value in other.state_dict().items():
                torch.testing.assert_close(one.state_dict()[name], value, rtol=1e-6, atol=1e-7)
                assert torch.equal(one.state_dict()[name], first.state_dict()[name])


# On a GPU


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("offset", [0.0, 5.0, 50.0, 5e4])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_update_bn_on_gpu_stays_within_tolerance(offset, form):
    model = Net([16, 32]).cuda().to(memory_format=form)
    data = [normal(32, 3, 28, 28, seed=i, offset=offset).to(memory_format=form) for i in range(3)]
    expected = in_float64(model, data)
    update_bn(model, data)
    assert_within_tolerance(model.cpu(), expected.cpu())
