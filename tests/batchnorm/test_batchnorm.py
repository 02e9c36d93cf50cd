"""Recomputed statistics against numpy in float64, worked values, and torch's own layers."""

import copy
from collections import OrderedDict
from datetime import timedelta
from itertools import count, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import multiprocessing, nn
from torch.optim.swa_utils import AveragedModel
from torch.optim.swa_utils import update_bn as update_bn_of_torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ckptavg import update_bn
from ckptavg.batchnorm.update import recompute
from ckptavg.data.loaders import Subset
from ckptavg.errors import BatchNormError, EvaluationError, UsageError
from ckptavg.models.runtime import Runtime

WORKED = torch.tensor([0.0, 2, 4, 6, 20, 22])[:, None]
SPLITS = ([6], [4, 2], [1, 5], [5, 1], [3, 2, 1], [1, 1, 1, 1, 1, 1])
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def normal(*shape, seed=0, offset=3.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return offset + 2 * torch.randn(*shape, generator=generator, dtype=dtype)


def moments(values):
    """Mean and unbiased variance a channel of (N, C, ...), by numpy in float64."""
    by_channel = np.moveaxis(np.asarray(values, np.float64), 1, 0).reshape(values.shape[1], -1)
    return by_channel.mean(1), by_channel.var(1, ddof=1)


def assert_statistics(layer, values, **tolerance):
    tolerance = {"rtol": 1e-11, "atol": 1e-12} | tolerance
    mean, variance = moments(values)
    np.testing.assert_allclose(layer.running_mean.double().cpu(), mean, **tolerance)
    np.testing.assert_allclose(layer.running_var.double().cpu(), variance, **tolerance)


def test_update_bn_takes_stratified_subset():
    """90 samples of 0 and 10 of 1: a fifth of each has their mean exactly."""
    data = TensorDataset(torch.tensor([[0.0]] * 90 + [[1.0]] * 10))
    data.targets = [0] * 90 + [1] * 10
    layer = nn.BatchNorm1d(1)
    for seed in range(5):
        result = update_bn(layer, data, bn_samples=Subset(20, stratified=True), seed=seed)
        assert result.samples == 20
        assert_statistics(layer, np.array([[0.0]] * 18 + [[1.0]] * 2), rtol=1e-6)


class Net(nn.Module):
    """A convolution network with every kind of layer that a pass could disturb."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(3, momentum=0.3)
        self.conv = nn.Conv2d(3, 4, 1)
        self.inner = nn.Sequential(nn.BatchNorm2d(4, momentum=None), nn.ReLU(), nn.Dropout(0.5))
        self.instance = nn.InstanceNorm2d(4, track_running_stats=True)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 2)
        self.register_buffer("table", torch.arange(3))
        self.double()

    def forward(self, x):
        x = self.instance(self.inner(self.conv(self.first(x))))
        return self.head(self.plain(x).mean((2, 3)))


def net(seed=0):
    torch.manual_seed(seed)
    model = Net()
    update_bn_of_torch([normal(5, 3, 4, 4, seed=9)], model)  # statistics that are not the default
    return model


def images(count=3, size=4):
    return [normal(size, 3, 4, 4, seed=i) for i in range(count)]


def state_of(model):
    """All that must be as it was if a pass fails."""
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), len(m._forward_pre_hooks_with_kwargs))
        for m in model.modules()
    ]
    modes = [m.training for m in model.modules()]
    momenta = [getattr(m, "momentum", None) for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, (hooks, modes, momenta)


def assert_same_state(model, before):
    tensors, rest = state_of(model)
    assert tensors.keys() == before[0].keys()
    assert [k for k, v in tensors.items() if not torch.equal(v, before[0][k])] == []
    assert rest == before[1]


# The statistics


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_update_bn_matches_worked_values_for_any_split(sizes):
    layer = nn.BatchNorm1d(1).double()
    update_bn(layer, WORKED.double().split(sizes))
    assert layer.running_mean.tolist() == pytest.approx([9])
    assert layer.running_var.tolist() == pytest.approx([90.8])


def test_torch_update_bn_averages_batch_variances():
    layer = nn.BatchNorm1d(1)
    update_bn_of_torch(WORKED.split([4, 2]), layer)
    assert layer.running_mean.tolist() == pytest.approx([12])
    assert layer.running_var.tolist() == pytest.approx([13 / 3])


def test_update_bn_agrees_with_torch_on_equal_means():
    data = torch.tensor([-1.0, 1, -3, 3, -5, 5])[:, None].double().split(2)
    ours, theirs = nn.BatchNorm1d(1).double(), nn.BatchNorm1d(1).double()
    update_bn(ours, data)
    update_bn_of_torch(data, theirs)
    assert ours.running_mean.item() == theirs.running_mean.item() == 0
    population = ours.running_var.item() * 5 / 6
    assert theirs.running_var.item() * 1 / 2 == pytest.approx(population)


@pytest.mark.parametrize("sizes", [[8], [3, 5], [1] * 8], ids=str)
def test_update_bn_keeps_precision_under_large_offset(sizes):
    values = (1000 + 0.01 * torch.arange(8.0))[:, None]
    layer = nn.BatchNorm1d(1)
    update_bn(layer, values.split(sizes))
    assert layer.running_mean.item() == pytest.approx(1000.035, rel=1e-6)
    assert layer.running_var.item() * 7 / 8 == pytest.approx(5.248e-4, rel=1e-4)
    assert_statistics(layer, values, rtol=1e-6)


@st.composite
def splits(draw):
    shape = draw(st.tuples(st.integers(2, 12), st.integers(1, 3), st.integers(1, 4)))
    values = draw(arrays.arrays(np.float64, shape, elements=st.floats(-100, 100)))
    cuts = draw(st.lists(st.integers(1, shape[0]), max_size=6, unique=True).map(sorted))
    offset = draw(st.sampled_from([0, 1e4]))
    ends = [0, *cuts, shape[0]]
    sizes = [b - a for a, b in pairwise(ends) if b > a]
    return torch.from_numpy(values) + offset, sizes


@settings(max_examples=40, deadline=None)
@given(splits())
def test_update_bn_matches_all_values_for_any_split(drawn):
    values, sizes = drawn
    layer = nn.BatchNorm1d(values.shape[1]).double()
    update_bn(layer, values.split(sizes))
    assert_statistics(layer, values, rtol=1e-9, atol=1e-9)


def test_update_bn_is_exact_for_deeper_layer():
    """Its inputs are normalized by each batch's own mean and biased variance, as in training."""
    model, data = net(), images()
    update_bn(model, data)
    inputs = []
    for x in data:
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), False, keepdim=True)
        normalized = (x - mean) / (variance + 1e-5).sqrt()
        weight, bias = model.conv.weight.detach().flatten(1), model.conv.bias.detach()
        inputs.append(torch.einsum("oc,nchw->nohw", weight, normalized) + bias[:, None, None])
    assert_statistics(model.inner[0], torch.cat(inputs), rtol=1e-9)


def test_update_bn_is_exact_in_low_precision_layers():
    values = normal(64, 3, dtype=torch.float32).to(torch.bfloat16)
    layer = nn.BatchNorm1d(3).to(torch.bfloat16)
    update_bn(layer, values.split(5))
    mean, variance = (torch.from_numpy(m).to(torch.bfloat16) for m in moments(values.double()))
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, variance)


def test_update_bn_amp_leaves_statistics_exact():
    values = normal(8, 3, dtype=torch.float32)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    seen = []
    model[1].register_forward_hook(lambda *args: seen.append(args[2].dtype))
    update_bn(model, [values], amp="bf16")
    assert_statistics(model[0], values, rtol=1e-6)
    assert seen == [torch.bfloat16]


# The layers


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(3), (5, 3, 4)),
        (nn.BatchNorm2d(3), (5, 3, 4, 2)),
        (nn.BatchNorm3d(3), (5, 3, 2, 2, 2)),
        (nn.SyncBatchNorm(3), (5, 3, 4)),
        (nn.BatchNorm1d(3, affine=False, momentum=None), (5, 3)),
        (nn.LazyBatchNorm1d(), (5, 3)),
        (nn.LazyBatchNorm2d(), (5, 3, 4, 2)),
        (nn.LazyBatchNorm3d(), (5, 3, 2, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_update_bn_takes_every_kind_of_batchnorm(layer, shape):
    data = [normal(*shape, seed=i, dtype=torch.float32) for i in range(3)]
    result = update_bn(layer, data)
    assert_statistics(layer, torch.cat(data), rtol=1e-6)
    assert (result.layers, result.batches, result.samples) == (1, 3, 15)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (nn.InstanceNorm1d, (5, 3, 6)),
        (nn.InstanceNorm2d, (5, 3, 4, 2)),
        (nn.InstanceNorm3d, (5, 3, 2, 2, 2)),
    ],
)
@pytest.mark.parametrize("sizes", [[5], [4, 1]], ids=str)
def test_instancenorm_statistics_are_means_over_instances(kind, shape, sizes):
    values = normal(*shape)
    layer = kind(3, track_running_stats=True).double()
    update_bn(layer, values.split(sizes))
    each = values.flatten(2).numpy()
    np.testing.assert_allclose(layer.running_mean, each.mean(2).mean(0))
    np.testing.assert_allclose(layer.running_var, each.var(2, ddof=1).mean(0))


def test_instancenorm_matches_torch_on_one_batch():
    values = normal(5, 3, 6)
    ours = nn.InstanceNorm1d(3, track_running_stats=True).double()
    theirs = nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0).double()
    update_bn(ours, [values])
    theirs(values)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_instancenorm_takes_unbatched_input():
    values = normal(4, 3, 6)
    one, other = (nn.InstanceNorm1d(3, track_running_stats=True).double() for _ in range(2))
    update_bn(one, list(values))
    update_bn(other, [values])
    torch.testing.assert_close(one.running_mean, other.running_mean)
    torch.testing.assert_close(one.running_var, other.running_var)


def test_update_bn_names_layers_without_statistics(caplog):
    caplog.set_level("INFO", "ckptavg")
    plain = nn.BatchNorm1d(1, track_running_stats=False)
    model = nn.Sequential(OrderedDict(alpha=nn.BatchNorm1d(1), omega=plain))
    assert update_bn(model, [WORKED]).layers == 1
    assert plain.running_mean is None
    assert "omega" in caplog.text
    assert "alpha" not in caplog.text


@pytest.mark.parametrize(
    "model",
    [nn.Linear(1, 1), nn.LayerNorm(1), nn.BatchNorm1d(1, track_running_stats=False)],
    ids=lambda m: type(m).__name__,
)
def test_update_bn_notes_model_without_layers(model, caplog):
    caplog.set_level("INFO", "ckptavg")
    before = state_of(model)
    result = update_bn(model, [WORKED])
    assert (result.layers, result.written) == (0, frozenset())
    assert "no BatchNorm layers with running statistics" in caplog.text
    assert_same_state(model, before)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: a BatchNorm with an activation and dropout of its own inside its forward."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training
        )
        return F.relu(self.drop(x))


def test_update_bn_takes_batchnorm_with_activation():
    values = normal(6, 3, 2, 2, offset=-2.0)
    layer = BatchNormAct(3).double()
    update_bn(layer, values.split([4, 2]))
    assert_statistics(layer, values)


def test_update_bn_leaves_inner_dropout_off():
    layer = BatchNormAct(3)
    seen = []
    layer.drop.register_forward_hook(lambda module, *_: seen.append(module.training))
    update_bn(layer, [torch.randn(4, 3, 2, 2)])
    assert seen == [False]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()

    def forward(self, x):
        return self.norm(x) + self.norm(input=2 * x + 1)


def test_update_bn_counts_both_calls_of_layer():
    model, values = Twice(), normal(7, 3)
    assert update_bn(model, values.split([5, 2])).layers == 1
    assert_statistics(model.norm, torch.cat([values, 2 * values + 1]))


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, batch: model["used"](batch),
        lambda model, batch: (model["used"](batch), model["spare"](batch[:0])),
    ],
    ids=["not called", "called on nothing"],
)
def test_update_bn_keeps_statistics_of_unreached_layer(caplog, forward):
    model = nn.ModuleDict({"used": nn.BatchNorm1d(1), "spare": nn.BatchNorm1d(1)})
    model["spare"].running_mean.fill_(5)
    before = state_of(model["spare"])
    result = update_bn(model, [WORKED], forward=forward)
    assert (result.layers, result.unreached) == (1, ("spare",))
    assert repr(result).endswith("; unreached: spare>")
    assert_same_state(model["spare"], before)
    assert "spare" in caplog.text


def test_batchnorm_result_repr_is_one_line():
    layers = [nn.BatchNorm1d(3) for _ in range(60)]
    result = update_bn(nn.Sequential(*layers), [torch.randn(8, 3), torch.randn(4, 3)])
    assert repr(result) == "<BatchNormResult layers=60, batches=2, samples=12>"


@pytest.mark.parametrize("wrap", [nn.Identity, nn.DataParallel])
def test_batchnorm_result_written_has_state_dict_names(wrap):
    """A shared layer has two; the layers that were left are not named."""
    shared = nn.BatchNorm1d(1)
    layers = {"a": shared, "b": shared, "spare": nn.BatchNorm1d(1), "frozen": nn.BatchNorm1d(1)}
    model = wrap(nn.ModuleDict(layers)) if wrap is not nn.Identity else nn.ModuleDict(layers)
    before = state_of(model)[0]

    def forward(model, batch):
        parts = getattr(model, "module", model)
        parts["frozen"](parts["b"](batch))

    result = update_bn(model, [WORKED], forward=forward, exclude=["frozen"])
    written = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert result.written == {name for name in written if "running" in name}
    assert len(result.written) == 4


def test_update_bn_refuses_single_value_per_channel():
    model = nn.Sequential(nn.BatchNorm1d(1))
    before = state_of(model)
    with pytest.raises(BatchNormError, match="layer 0 saw a single value"):
        update_bn(model, [WORKED[:1]])
    assert_same_state(model, before)


def test_update_bn_takes_one_sample_with_several_values():
    values = normal(1, 3, 2, 2)
    layer = nn.BatchNorm2d(3).double()
    update_bn(layer, [values])
    assert_statistics(layer, values)


def test_update_bn_takes_batches_of_one():
    """A single value is its own mean, so the layer puts out its bias."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([3.0, -1.0]))
    update_bn(model, normal(5, 2).split(1))
    assert model[1].running_mean.tolist() == pytest.approx([3, -1])
    assert model[1].running_var.tolist() == pytest.approx([0, 0])


def test_update_bn_ignores_empty_batch():
    values = normal(6, 3)
    layer = nn.BatchNorm1d(3).double()
    update_bn(layer, [values[:0], values[:4], values[:0], values[4:]])
    assert_statistics(layer, values)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, AveragedModel, lambda m: torch.compile(m, backend="eager")]
)
def test_update_bn_takes_wrapped_model(wrap):
    model = wrap(nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)))
    update_bn(model, WORKED.split(2))
    (layer,) = (m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
    assert_statistics(layer, WORKED, rtol=1e-6)


# What the pass leaves alone


def test_update_bn_trains_batchnorm_only(monkeypatch):
    """And that only in its own forward pass: others that look at it find it as in evaluation."""
    model = net()
    used, seen = [], {}
    original = F.batch_norm

    def batch_norm(*args, **kwargs):
        used.append(kwargs.get("training", args[5] if len(args) > 5 else False))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "batch_norm", batch_norm)
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, *_, name=name: seen.update({name: m.training}), always_call=True
        )
    update_bn(model.train(), images(1))
    assert used == [True, True, True]  # the third of them tracks nothing
    assert not any(seen.values())
    assert {"first", "inner.0", "inner.2", "instance"} <= seen.keys()


@pytest.mark.parametrize("training", [True, False])
def test_update_bn_restores_modes_momentum_and_hooks(training):
    model = net().train(training)
    model.inner.train(not training)
    model.first.register_forward_pre_hook(lambda *_: None)
    _, before = state_of(model)
    update_bn(model, images())
    assert state_of(model)[1] == before


def test_update_bn_leaves_weights_and_other_buffers():
    model = net().train()
    before, _ = state_of(model)
    update_bn(model, images())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{n}.{s}" for n in ("first", "inner.0", "instance") for s in statistics}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_update_bn_ignores_old_statistics_and_momentum():
    one, other = net(), net()
    other.first.running_mean.fill_(1e6)
    other.first.momentum = 0.9
    update_bn(one, images())
    update_bn(other, images())
    assert_same_state(one.inner, state_of(other.inner))
    assert torch.equal(one.first.running_mean, other.first.running_mean)


def interrupted():
    yield from images(2)
    raise KeyboardInterrupt("Ctrl-C")


def broken():
    yield from images(2)
    raise OSError("the disk is gone")


def fails_at_the_second_batch():
    calls = []

    def forward(model, batch):
        calls.append(batch)
        output = model(batch)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return output

    return forward


def stop(done, total):
    raise ValueError("no more")


NAN = [*images(2), torch.full((4, 3, 4, 4), torch.nan, dtype=torch.float64)]
INF = [*images(2), torch.full((4, 3, 4, 4), torch.inf, dtype=torch.float64)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (broken, {}, OSError, "the disk is gone"),
        (interrupted, {}, KeyboardInterrupt, "Ctrl-C"),
        (images, {"forward": fails_at_the_second_batch}, RuntimeError, "out of memory"),
        (images, {"progress": lambda: stop}, ValueError, "no more"),
        (
            lambda: [*images(), normal(4, 3)],
            {},
            EvaluationError,
            r"fails on a batch of float64 of 4 × 3: ValueError: expected 4D input",
        ),
        (lambda: [*images(), "cat"], {}, EvaluationError, "is a str"),
        (list, {}, BatchNormError, "training data is empty"),
        (lambda: NAN, {}, BatchNormError, "inputs of the layer first are not finite"),
        (lambda: INF, {}, BatchNormError, "inputs of the layer first are not finite"),
    ],
    ids=["loader", "Ctrl-C", "forward", "progress", "shape", "batch", "empty", "nan", "inf"],
)
def test_update_bn_restores_model_on_failure(data, options, error, message, training):
    model = net().train(training)
    model.inner.eval()
    before = state_of(model)
    with pytest.raises(error, match=message):
        update_bn(model, data(), **{name: make() for name, make in options.items()})
    assert_same_state(model, before)


def test_recompute_restores_all_models_on_failure():
    models = [net(0), net(1)]
    with torch.no_grad():
        models[1].conv.weight.fill_(torch.nan)
    before = [state_of(model.first) for model in models]
    with pytest.raises(BatchNormError, match=r"layer inner\.0 are not finite"):
        recompute(models, images(), Runtime(torch.device("cpu")))
    for model, was in zip(models, before, strict=True):
        assert_same_state(model.first, was)


def test_recompute_shares_pass_between_models():
    together, alone = [net(0), net(1)], [net(0), net(1)]
    passes = iter([images()])
    results = recompute(together, next(passes), Runtime(torch.device("cpu")))
    assert [r.layers for r in results] == [3, 3]
    for one, other in zip(together, alone, strict=True):
        update_bn(other, images())
        assert_same_state(one, state_of(other))


# Frozen layers


@pytest.mark.parametrize(("pattern", "left"), [("first", "first"), ("inner.*", "inner.0")])
def test_update_bn_exclude_keeps_layer_in_evaluation(pattern, left):
    model = net().train()
    layer = model.get_submodule(left)
    before, seen = state_of(layer), []
    layer.register_forward_hook(lambda m, *_: seen.append(m.training))
    hooked = state_of(layer)
    result = update_bn(model, images(1), exclude=[pattern])
    assert result.layers == 2
    assert seen == [False]
    assert_same_state(layer, hooked)
    assert before[0].keys() == hooked[0].keys()


def test_update_bn_exclude_refuses_unmatched_pattern():
    model, untouched = net(), iter(images(1))
    before = state_of(model)
    with pytest.raises(
        UsageError, match=r"'inner\.9' matches no BatchNorm layer\. Did you mean inner\.0\?"
    ):
        update_bn(model, untouched, exclude=["first", "inner.9"])
    assert_same_state(model, before)
    assert next(untouched) is not None


def test_recompute_excludes_layers_per_model():
    models = [net(), net()]
    before = [state_of(m.first) for m in models]
    results = recompute(models, images(), Runtime(torch.device("cpu")), None, [{"first"}, set()])
    assert [result.layers for result in results] == [2, 3]
    assert_same_state(models[0].first, before[0])
    assert not torch.equal(models[1].first.running_mean, before[1][0]["running_mean"])


# Batches


@pytest.mark.parametrize(
    "batch_of",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, "labels"],
        lambda x: {"input": x},
        lambda x: ({"input": x}, torch.zeros(len(x))),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict in a tuple"],
)
def test_update_bn_takes_tensors_sequences_and_dicts(batch_of):
    layer = nn.BatchNorm1d(1)
    result = update_bn(layer, [batch_of(x) for x in WORKED.split(2)])
    assert_statistics(layer, WORKED, rtol=1e-6)
    assert (result.batches, result.samples) == (3, 6)


def test_update_bn_takes_any_batch_with_forward():
    layer = nn.BatchNorm1d(1)
    data = [SimpleNamespace(image=x) for x in WORKED.split(2)]
    with pytest.raises(EvaluationError, match="forward="):
        update_bn(layer, data)
    update_bn(layer, data, forward=lambda model, batch: model(batch.image))
    assert_statistics(layer, WORKED, rtol=1e-6)


def test_update_bn_progress_counts_samples():
    told = []
    data = TensorDataset(WORKED)
    update_bn(nn.BatchNorm1d(1), data, batch_size=4, progress=lambda *at: told.append(at))
    update_bn(nn.BatchNorm1d(1), iter([WORKED]), progress=lambda *at: told.append(at))
    assert told == [("BatchNorm", *at) for at in [(4, 6), (6, 6), (6, 0)]]


# Order


class Recorded(Dataset):
    """Sorted by class, as an image folder is; remembers in which order it was read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 13

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([float(index // 4)]), index // 4


def order_of(loader_of, **options):
    data = Recorded()
    update_bn(nn.BatchNorm1d(1), loader_of(data), batch_size=4, **options)
    return data.read


def test_update_bn_shuffles_dataset_by_seed():
    orders = [order_of(lambda data: data, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list(range(13)) != orders[0]


def test_update_bn_keeps_loader_order_with_note(caplog):
    caplog.set_level("INFO", "ckptavg")
    assert order_of(lambda data: DataLoader(data, 5), seed=3) == list(range(13))
    assert "does not shuffle" in caplog.text


def test_update_bn_is_independent_of_dataset_order():
    values = normal(13, 2)
    for seed in range(3):
        layer = nn.BatchNorm1d(2).double()
        update_bn(layer, TensorDataset(values, torch.zeros(13)), batch_size=4, seed=seed)
        assert_statistics(layer, values)


# Several processes

SHARDS = {2: [[4, 1], [6]], 3: [[4, 1], [], [3, 2, 1]]}  # sizes of the batches of each process


def shards_of(world):
    seeds = count()
    return [[normal(n, 3, 4, 4, seed=next(seeds)) for n in sizes] for sizes in SHARDS[world]]


def error_of(batches):
    layer = nn.BatchNorm1d(1)
    with pytest.raises(BatchNormError) as caught:
        update_bn(layer, batches)
    assert (layer.running_mean.item(), layer.running_var.item()) == (0, 1)
    return str(caught.value)


def synchronized(batches):
    """A network with SyncBatchNorm, and its statistics of these batches."""
    torch.manual_seed(0)
    norms = nn.SyncBatchNorm(3), nn.SyncBatchNorm(4)
    model = nn.Sequential(norms[0], nn.Conv2d(3, 4, 1), norms[1])
    update_bn(model, [batch.float() for batch in batches])
    return model


def run_process(rank, directory):
    """One process of two, then of three; what it found goes into a file."""
    torch.set_num_threads(1)
    found = {}
    for world in SHARDS:
        if rank < world:
            meeting, limit = f"file://{directory}/meeting{world}", timedelta(seconds=60)
            dist.init_process_group("gloo", meeting, limit, world, rank)
            model = net()
            result = update_bn(model, shards_of(world)[rank])
            found[world] = {
                "state": model.state_dict(),
                "result": (result.layers, result.batches),
                "synchronized": synchronized(shards_of(world)[rank]).state_dict(),
                "empty": error_of([]),
                "single": error_of([WORKED[:1]] if rank == 0 else []),
            }
            dist.barrier()
            dist.destroy_process_group()
    torch.save(found, f"{directory}/{rank}.pt")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each process found, by rank."""
    directory = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(run_process, (str(directory),), 3)
    return [torch.load(directory / f"{rank}.pt") for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARDS)
def test_update_bn_processes_agree_with_one(processes, world):
    alone = net()
    update_bn(alone, [batch for shard in shards_of(world) for batch in shard])
    for rank in range(world):
        found = processes[rank][world]
        assert found["result"] == (3, len(SHARDS[world][rank]))
        for name, expected in alone.state_dict().items():
            torch.testing.assert_close(found["state"][name], expected, rtol=1e-9, atol=1e-10)
            assert torch.equal(found["state"][name], processes[0][world]["state"][name])


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARDS)
def test_update_bn_sync_batchnorm_waits_for_no_process(processes, world):
    """Some have more batches than others; what is normalized is each batch by itself, as alone."""
    alone = synchronized([batch for shard in shards_of(world) for batch in shard])
    for rank in range(world):
        for name, expected in alone.state_dict().items():
            found = processes[rank][world]["synchronized"][name]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", SHARDS)
def test_update_bn_processes_fail_together(processes, world):
    for rank in range(world):
        assert "training data is empty" in processes[rank][world]["empty"]
        assert "single value" in processes[rank][world]["single"]


# Devices


@pytest.mark.gpu
@gpu
def test_update_bn_on_gpu_matches_cpu():
    ours, theirs = net(), net()
    update_bn(ours, TensorDataset(torch.cat(images())), device="cuda", batch_size=5)
    update_bn(theirs, TensorDataset(torch.cat(images())), batch_size=5)
    assert all(t.is_cuda for t in ours.state_dict().values())
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name].cpu(), expected)


@pytest.mark.gpu
@gpu
def test_update_bn_takes_sync_batchnorm_on_gpu():
    layer = nn.SyncBatchNorm(3).cuda()
    values = normal(7, 3, dtype=torch.float32)
    update_bn(layer, copy.deepcopy(values).split([6, 1]))
    assert_statistics(layer, values, rtol=1e-6)


def test_recompute_writes_nan_where_asked_for_statistics_that_are_not_finite():
    """One model's inputs overflow; the other's statistics are as ever."""
    whole, broken = net(), net()
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.inf)
    before = copy.deepcopy(whole)
    batches = images()
    with pytest.raises(BatchNormError, match="not finite"):
        recompute([whole, broken], batches, Runtime(torch.device("cpu")))
    recompute([whole, broken], batches, Runtime(torch.device("cpu")), keep_nonfinite=True)
    update_bn(before, batches)
    assert_same_state(whole, state_of(before))
    variances = [value for name, value in broken.named_buffers() if "running_var" in name]
    assert any(bool(variance.isnan().any()) for variance in variances)
    assert not any(bool(variance.isinf().any()) for variance in variances)


def test_recompute_writes_nan_for_statistics_beyond_the_dtype():
    """An infinite variance would give finite outputs: the biases alone."""
    layer = nn.BatchNorm1d(1)
    batches = [1e25 * normal(8, 1, seed=i, dtype=torch.float32) for i in range(2)]
    with pytest.raises(BatchNormError, match="too large for float32"):
        recompute([layer], batches, Runtime(torch.device("cpu")))
    recompute([layer], batches, Runtime(torch.device("cpu")), keep_nonfinite=True)
    assert layer.running_var.isnan().all()
    assert layer.running_mean.isfinite().all()
