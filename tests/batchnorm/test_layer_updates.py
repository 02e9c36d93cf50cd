"""Layers with a forward of their own, against the values that they normalize by, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ckptavg import update_bn
from ckptavg.errors import BatchNormError

C, T = 5, 5  # as many positions as channels: nothing is told by an axis's size


def sequences(sizes=(8, 3, 6), length=T, seed=0):
    """(N, C, T) with channels and positions of their own means and scales."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1.0, C + 1)[:, None]
    offset = 3 * torch.arange(C)[:, None] + torch.arange(length)
    return [scale * torch.randn(n, C, length, generator=generator) + offset for n in sizes]


def lengths_of(batch, seed=1):
    generator = torch.Generator().manual_seed(seed + len(batch))
    return torch.randint(1, batch.shape[-1] + 1, (len(batch),), generator=generator)


def mask_of(batch):
    return torch.arange(batch.shape[-1]) < lengths_of(batch)[:, None]


def assert_statistics(layer, values, names=("running_mean", "running_var"), rtol=1e-5):
    """Values of shape (n, C)."""
    values = values.double()
    for name, expected in zip(names, (values.mean(0), values.var(0)), strict=True):
        actual = layer.get_buffer(name).double().flatten()
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)


def pooled(batches, masks=None):
    rows = [x.transpose(1, 2).reshape(-1, C) for x in batches]
    if masks is not None:
        rows = [row[mask.reshape(-1)] for row, mask in zip(rows, masks, strict=True)]
    return torch.cat(rows)


# Subclasses of torch's layers


class TimeLast(nn.BatchNorm1d):
    """Takes (N, T, C)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Flattened(nn.BatchNorm1d):
    """Takes (N, T, C), normalizes rows."""

    def forward(self, x):
        return super().forward(x.reshape(-1, x.shape[-1])).view_as(x)


class SynchronizedTimeLast(nn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class FunctionalTimeLast(nn.BatchNorm1d):
    """Leaves momentum out, and calls torch itself."""

    def forward(self, x):
        y = torch.batch_norm(
            x.movedim(-1, 1), self.weight, self.bias, self.running_mean, self.running_var,
            self.training, 0.05, self.eps, False,
        )  # fmt: skip
        return y.movedim(1, -1)


class NativeTimeLast(nn.BatchNorm1d):
    """Calls what torch's functions call."""

    def forward(self, x):
        y, *_ = torch.native_batch_norm(
            x.transpose(1, 2), None, None, self.running_mean, self.running_var,
            self.training, 0.1, self.eps,
        )  # fmt: skip
        return y.transpose(1, 2)


@pytest.mark.parametrize(
    "kind", [TimeLast, Flattened, SynchronizedTimeLast, FunctionalTimeLast, NativeTimeLast]
)
def test_update_bn_takes_subclass_with_transposed_input(kind):
    batches = sequences()
    layer = kind(C)
    result = update_bn(layer, [x.transpose(1, 2).contiguous() for x in batches])
    assert_statistics(layer, pooled(batches))
    assert result.layers == 1
    assert layer.num_batches_tracked == 3
    assert type(layer) is kind


def test_update_bn_takes_subclass_with_scaled_input():
    class Halved(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x / 2)

    layer, batches = Halved(C), sequences()
    update_bn(layer, batches)
    assert_statistics(layer, pooled(batches) / 2)


class Masked(nn.BatchNorm1d):
    """Takes its moments by itself."""

    biased = False

    def forward(self, x, mask):
        m = mask[:, None].to(x)
        if self.training:
            n = m.sum()
            mean = (x * m).sum((0, 2)) / n
            var = ((x - mean[:, None]).square() * m).sum((0, 2)) / n
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var if self.biased else var * n / (n - 1), self.momentum)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean[:, None]) / (var[:, None] + self.eps).sqrt() * m


class MaskedAndBiased(Masked):
    biased = True


class Selected(nn.BatchNorm1d):
    """Gives torch only what counts."""

    def forward(self, x, mask):
        rows = super().forward(x.transpose(1, 2)[mask])
        return x.transpose(1, 2).masked_scatter(mask[..., None], rows).transpose(1, 2)


class OfLengths(Masked):
    def forward(self, x, lengths):
        return super().forward(x, torch.arange(x.shape[-1]) < lengths[:, None])


class WithoutZeros(Masked):
    """Takes for padding what is 0."""

    def forward(self, x):
        return super().forward(x, (x != 0).any(1))


@pytest.mark.parametrize("size", [C, 9])
@pytest.mark.parametrize("kind", [Masked, MaskedAndBiased, Selected, OfLengths, WithoutZeros])
def test_update_bn_leaves_padding_out(kind, size):
    batches = sequences((8, 3, 6, 1), size)
    masks = [mask_of(x) for x in batches]
    masks[-1][0, :3] = True
    if kind is WithoutZeros:
        batches = [x * m[:, None] for x, m in zip(batches, masks, strict=True)]
    second = masks if kind is not OfLengths else [m.sum(1) for m in masks]

    def forward(layer, batch):
        return layer(batch[0]) if kind is WithoutZeros else layer(*batch)

    layer = kind(C)
    update_bn(layer, list(zip(batches, second, strict=True)), forward=forward)
    assert_statistics(layer, pooled(batches, masks))


def test_update_bn_leaves_late_padding_out():
    """The first batch is full, so that the argument's own moments are right by chance."""
    batches = sequences()
    masks = [mask_of(x) for x in batches]
    masks[0][:] = True
    layer = Masked(C)
    update_bn(layer, list(zip(batches, masks, strict=True)), forward=lambda m, b: m(*b))
    assert_statistics(layer, pooled(batches, masks))


class MaskedByModel(nn.Module):
    """Gives its layer the mask of a batch by an attribute."""

    class Layer(Masked):
        mask = None

        def forward(self, x):
            return super().forward(x, self.mask)

    def __init__(self):
        super().__init__()
        self.norm = self.Layer(C)

    def forward(self, x, mask):
        self.norm.mask = mask
        return self.norm(x)


def test_update_bn_takes_mask_from_attribute():
    batches = sequences((6, 6, 6))
    masks = [mask_of(x).roll(i, 1) for i, x in enumerate(batches)]
    model = MaskedByModel()
    update_bn(model, list(zip(batches, masks, strict=True)))
    assert_statistics(model.norm, pooled(batches, masks))


def test_update_bn_notes_estimate_for_weighted_values(caplog):
    class Weighted(nn.BatchNorm1d):
        def forward(self, x, weight):
            w = weight / weight.sum()
            mean = (x * w[:, None]).sum(0)
            var = ((x - mean).square() * w[:, None]).sum(0)
            if self.training:
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(var.detach(), self.momentum)
            return (x - mean) / (var + self.eps).sqrt()

    caplog.set_level("INFO", "ckptavg")
    x = torch.randn(40, C) + 5
    w = torch.rand(40)
    layer = Weighted(C)
    update_bn(layer, [(x, w)], forward=lambda m, b: m(*b))
    mean = (x * w[:, None]).sum(0) / w.sum()
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-5)
    assert "estimated" in caplog.text


# Layers that are no subclass


class OwnNorm(nn.Module):
    """Calls torch; has no momentum that anybody would find."""

    names = ("running_mean", "running_var")

    def __init__(self, channels=C, shape=(-1,)):
        super().__init__()
        start = torch.zeros(channels).reshape(shape)
        self.register_buffer(self.names[0], start)
        self.register_buffer(self.names[1], start + 1)

    def forward(self, x):
        mean, variance = (getattr(self, name) for name in self.names)
        return F.batch_norm(x, mean, variance, training=self.training, momentum=0.01)


class ByHand(OwnNorm):
    """Takes its moments by itself, and gets new tensors for the old ones; as Keras calls them."""

    names = ("moving_mean", "moving_variance")

    def forward(self, x):
        if not self.training:
            return (x - self.moving_mean) / (self.moving_variance + 1e-5).sqrt()
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), unbiased=False, keepdim=True)
        self.moving_mean = 0.99 * self.moving_mean + 0.01 * mean.detach()
        self.moving_variance = 0.99 * self.moving_variance + 0.01 * var.detach()
        return (x - mean) / (var + 1e-5).sqrt()


class InPlace(OwnNorm):
    """Overwrites its argument."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        return F.leaky_relu_(x.copy_(y))


class Welford(OwnNorm):
    """Counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.tensor(1000))

    def forward(self, x):
        if self.training:
            n = x.numel() // C
            total = self.count + n
            mean, var = x.mean((0, 2)), x.var((0, 2), unbiased=False)
            delta = mean - self.running_mean
            cross = delta.square() * self.count * n / total
            self.running_var = (self.running_var * self.count + var * n + cross) / total
            self.running_mean = self.running_mean + delta * n / total
            self.count += n
        std = (self.running_var + 1e-5).sqrt()
        return (x - self.running_mean[:, None]) / std[:, None]


class Normalizer(Welford):
    """As those of observations in reinforcement learning, whose count is a float."""

    def __init__(self):
        super().__init__()
        self.count = torch.tensor(1e-4)


def named(mean, variance):
    class Named(OwnNorm):
        names = (mean, variance)

        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(C))

    return Named()


@pytest.mark.parametrize(
    "layer",
    [
        OwnNorm(),
        ByHand(shape=(1, C, 1)),
        InPlace(),
        Welford(),
        Normalizer(),
        OwnNorm().double(),
        named("avg_mean", "avg_var"),
        named("ema_mean", "ema_var"),
        named("mean_ema", "var_ema"),
        named("mean", "var"),
        named("_mean", "_variance"),
        named("running_mu", "running_sigma2"),
        named("running_avg_mean", "running_avg_var"),
    ],
    ids=lambda layer: f"{type(layer).__name__} {layer.names[0]}",
)
def test_update_bn_takes_custom_layer(layer):
    batches = [x.to(layer.get_buffer(layer.names[0])) for x in sequences()]
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    given = [x.clone() for x in batches]
    result = update_bn(layer, given, forward=lambda model, x: model(x.clone()))
    assert result.written == frozenset(layer.names)
    assert_statistics(layer, pooled(batches), layer.names)
    assert all(torch.equal(a, b) for a, b in zip(given, batches, strict=True))
    others = before.keys() - result.written
    assert all(torch.equal(layer.state_dict()[k], before[k]) for k in others)


class Renormalized(nn.Module):
    """Batch renormalization (Ioffe 2017): corrects its batch by its running statistics."""

    def __init__(self, channels=C):
        super().__init__()
        self.register_buffer("running_mean", 7 * torch.ones(channels))
        self.register_buffer("running_std", 2 * torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(500))
        self.used = []

    def forward(self, x):
        mean, std = x.mean((0, 2)), x.std((0, 2), unbiased=False) + 1e-3
        if not self.training:
            mean, std = self.running_mean, self.running_std
            r, d = torch.ones(()), torch.zeros(())
        else:
            r = (std / self.running_std).clamp(1 / 3, 3)
            d = ((mean - self.running_mean) / self.running_std).clamp(-5, 5)
            self.running_mean += 0.01 * (mean.detach() - self.running_mean)
            self.running_std += 0.01 * (std.detach() - self.running_std)
            self.num_batches_tracked += 1
        out = (x - mean[:, None]) / std[:, None] * r.view(-1, 1) + d.view(-1, 1)
        self.used.append(out.detach())
        return out


def test_update_bn_takes_batch_renormalization():
    batches = sequences((6, 6, 6))
    layer, model = Renormalized(), nn.Sequential()
    model.append(layer)
    model.append(nn.BatchNorm1d(C))
    result = update_bn(model, batches)
    means = torch.stack([x.mean((0, 2)) for x in batches])
    stds = torch.stack([x.std((0, 2), unbiased=False) + 1e-3 for x in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_std, stds.mean(0), rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == 500
    assert result.layers == 2
    outputs = []
    for x, mean, std in zip(batches, means, stds, strict=True):
        r, d = (std / 2).clamp(1 / 3, 3), ((mean - 7) / 2).clamp(-5, 5)
        outputs.append((x - mean[:, None]) / std[:, None] * r[:, None] + d[:, None])
    assert_statistics(model[1], pooled(outputs))


class Switchable(OwnNorm):
    """Takes the moments of the batch from those of its instances (Luo et al. 2018)."""

    def __init__(self, momentum=0.9):
        super().__init__(shape=(1, C, 1))
        self.momentum = momentum

    def forward(self, x):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        square = var + mean**2
        if self.training:
            of_batch = mean.mean(0, keepdim=True), square.mean(0, keepdim=True)
            found = of_batch[0], of_batch[1] - of_batch[0] ** 2
            for name, value in zip(self.names, found, strict=True):
                getattr(self, name).mul_(self.momentum).add_((1 - self.momentum) * value)
        return (x - mean) / (var + 1e-5).sqrt()


def test_update_bn_takes_switchable_norm():
    batches = sequences((32, 32, 7))
    layer, whole = Switchable(), Switchable(momentum=0.0).double().train()
    update_bn(layer, batches)
    whole(torch.cat(batches).double())  # what it finds in all of the data at once
    torch.testing.assert_close(
        layer.running_mean.double(), whole.running_mean, rtol=1e-6, atol=1e-6
    )
    rtol = 1.01 / (71 * T - 1)  # it divides by n
    torch.testing.assert_close(layer.running_var.double(), whole.running_var, rtol=rtol, atol=1e-6)


class VarianceOnly(nn.Module):
    """As EvoNorm-B0: divides by a deviation, and takes no mean off."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x):
        var = self.running_var
        if self.training:
            var = x.var((0, 2))
            self.running_var.lerp_(var.detach(), 0.1)
        return x * (self.weight / (var + 1e-5).sqrt())[:, None]


def test_update_bn_averages_lone_variance_by_samples():
    layer, batches = VarianceOnly(), sequences((8, 4))
    result = update_bn(layer, batches)
    assert result.written == {"running_var"}
    expected = (8 * batches[0].double().var((0, 2)) + 4 * batches[1].double().var((0, 2))) / 12
    torch.testing.assert_close(layer.running_var.double(), expected, rtol=1e-5, atol=1e-6)


class ComplexNorm(nn.Module):
    """A complex mean, and a covariance of real and imaginary parts."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C, dtype=torch.complex64))
        self.register_buffer("running_covar", torch.ones(C, 3))

    def forward(self, x):
        mean = x.mean((0, 2))
        y = x - mean[:, None]
        parts = (y.real.square(), y.imag.square(), y.real * y.imag)
        covar = torch.stack([p.mean((0, 2)) for p in parts], 1)
        if self.training:
            self.running_mean.mul_(0.9).add_(0.1 * mean)
            self.running_covar.mul_(0.9).add_(0.1 * covar)
        return y


def test_update_bn_takes_complex_layer():
    batches = [torch.complex(a, b) for a, b in zip(sequences(), sequences(seed=3), strict=True)]
    layer = ComplexNorm()
    result = update_bn(layer, batches)
    mean = torch.cat(batches).mean((0, 2))
    assert result.written == {"running_mean", "running_covar"}
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-5, atol=1e-5)


class Ghost(nn.BatchNorm1d):
    """Normalizes parts of a batch by themselves; their statistics become one in evaluation mode."""

    def __init__(self, channels=C, parts=2):
        super().__init__(channels)
        self.parts = parts
        self.running_mean = torch.zeros(channels * parts)
        self.running_var = torch.ones(channels * parts)

    def train(self, mode=True):
        if self.training and not mode:
            for name in ("running_mean", "running_var"):
                parts = getattr(self, name).view(self.parts, -1)
                setattr(self, name, parts.mean(0).repeat(self.parts))
        return super().train(mode)

    def forward(self, x):
        n = len(self.running_mean) if self.training else C
        y = x.reshape(-1, n, x.shape[-1])
        mean, variance = self.running_mean[:n], self.running_var[:n]
        if self.training:
            mean, variance = self.running_mean, self.running_var
        return F.batch_norm(y, mean, variance, training=self.training).view_as(x)


@pytest.mark.parametrize("training", [True, False])
def test_update_bn_takes_ghost_batchnorm(training):
    layer, batches = Ghost().train(training), sequences((8, 4, 6))
    update_bn(layer, batches)
    assert layer.training == training
    layer.eval()
    parts = [pooled([x[i::2] for x in batches]).double() for i in range(2)]
    for name, of in (("running_mean", torch.mean), ("running_var", torch.var)):
        expected = torch.stack([of(part, 0) for part in parts]).mean(0)
        actual = layer.get_buffer(name)[:C].double()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# Fused layers


@pytest.mark.filterwarnings("ignore")
def test_update_bn_takes_fused_qat_layer():
    """It scales its weights by its layer's running statistics, and its outputs back."""
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    quantization.fuse_modules_qat(model, [["0", "1", "2"]], inplace=True)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=0)
    quantization.prepare_qat(model, inplace=True)
    data = [torch.randn(n, 3, 4, 4) for n in (6, 3)]
    for _ in range(5):
        model(data[0])
    model.apply(quantization.disable_observer)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = []
    hook = model[0].bn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for x in data:
            model.eval()(x)
    hook.remove()
    result = update_bn(model, data)
    assert result.written == {"0.bn.running_mean", "0.bn.running_var"}
    values = torch.cat(inputs).double()
    for name, of in (("running_mean", torch.mean), ("running_var", torch.var)):
        actual = model[0].bn.get_buffer(name).double()
        torch.testing.assert_close(actual, of(values, (0, 2, 3)), rtol=1e-5, atol=1e-6)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == result.written | {"0.bn.num_batches_tracked"}


# Layers that keep what they have


class Frozen(nn.Module):
    """As detectors have it: four buffers and no training."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(C) + 1)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None] + (self.bias - self.running_mean * scale)[:, None]


class FrozenSubclass(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=False)


class Largest(OwnNorm):
    """Keeps no average of its batches."""

    def forward(self, x):
        if self.training:
            self.running_mean = torch.maximum(self.running_mean, x.amax((0, 2)))
        return x - self.running_mean[:, None]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [(Frozen(), "frozen"), (FrozenSubclass(C), "frozen"), (Largest(), "unknown")],
    ids=lambda value: type(value).__name__,
)
def test_update_bn_leaves_layer_without_moving_average(layer, kind, caplog):
    caplog.set_level("INFO", "ckptavg")
    batches = sequences()
    model = nn.Sequential(layer, nn.BatchNorm1d(C))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    inputs = torch.cat([layer.eval()(x) for x in batches])
    result = update_bn(model, batches)
    assert (result.written, result.layers) == ({"1.running_mean", "1.running_var"}, 1)
    assert getattr(result, kind) == ("0",)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert_statistics(model[1], pooled([inputs]))  # given what the layer puts out when evaluated
    assert "0" in caplog.text


def test_update_bn_names_statistics_outside_buffers(caplog):
    layer = OwnNorm()
    for name in layer.names:
        start = layer._buffers.pop(name)
        layer.register_parameter(name, nn.Parameter(start, requires_grad=False))
    result = update_bn(nn.Sequential(layer, nn.BatchNorm1d(C)), sequences())
    assert (result.layers, result.unknown) == (1, ("0",))
    assert "the running statistics of 0 are no buffers" in caplog.text


def test_update_bn_refuses_nonfinite_values():
    layer, x = ByHand(shape=(1, C, 1)), sequences()[0]
    x[0, 0, 0] = torch.nan
    with pytest.raises(BatchNormError, match="not finite"):
        update_bn(nn.Sequential(layer), [x])
    assert torch.equal(layer.moving_mean, torch.zeros(1, C, 1))


class Float32(Masked):
    """As compiled kernels that know no other type."""

    def forward(self, x, mask):
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x, mask)


def test_update_bn_asks_float32_layer_in_float32():
    batches = sequences((8, 3, 6), 9)
    masks = [mask_of(x) for x in batches]
    layer = Float32(C)
    update_bn(layer, list(zip(batches, masks, strict=True)), forward=lambda m, b: m(*b))
    assert_statistics(layer, pooled(batches, masks), rtol=1e-4)


def test_update_bn_leaves_layer_that_fails_in_training(caplog):
    class Stubborn(OwnNorm):
        def forward(self, x):
            if self.training:
                raise TypeError("not like this")
            return super().forward(x)

    layer = Stubborn()
    result = update_bn(layer, sequences())
    assert result.unknown == ("",)
    assert torch.equal(layer.running_mean, torch.zeros(C))
    assert "left as they were" in caplog.text
