"""What a pass leaves of a model that does more than normalize: all of it as it was found."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ckptavg import evaluate, update_bn
from ckptavg.batchnorm.update import recompute
from ckptavg.errors import BatchNormError
from ckptavg.models.runtime import Runtime

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def images(sizes=(5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [1 + 2 * torch.randn(n, 3, 4, 4, generator=generator) for n in sizes]


def own_state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}


def assert_statistics(layer, values):
    torch.testing.assert_close(layer.running_mean, values.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var, values.var((0, 2, 3)), rtol=1e-5, atol=1e-6)


# Ways to reach a layer


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


class Direct(Block):
    """Calls a layer's forward pass, by which hooks are not called."""

    def forward(self, x):
        return self.bn.forward(self.conv(x))


class Both(Block):
    def forward(self, x):
        return self.bn(self.conv(x)), self.bn.forward(x)


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Compiled(Block):
    def __init__(self):
        super().__init__()
        self.bn = torch.compile(self.bn, backend="eager")


def compiled_in_place():
    model = Block()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("make", [Direct, Both, Checkpointed, Compiled, compiled_in_place])
def test_update_bn_covers_every_way_to_call_layer(make):
    model, data = make().eval(), images()
    with torch.no_grad():
        model(data[0])  # compiled before
        update_bn(model, data)
        inputs = [model.conv(x) for x in data] + (data if make is Both else [])
    layer = getattr(model.bn, "_orig_mod", model.bn)
    assert_statistics(layer, torch.cat(inputs))
    assert layer.num_batches_tracked == 2


class Functional(nn.Module):
    """Normalizes by a layer's buffers without the layer."""

    def __init__(self, training):
        super().__init__()
        self.bn, self.after, self.mode = nn.BatchNorm2d(3), nn.BatchNorm2d(3), training
        self.bn.running_mean.fill_(2.0)

    def forward(self, x):
        training = self.bn.training if self.mode is None else self.mode
        mean, variance = self.bn.running_mean, self.bn.running_var
        return self.after(F.batch_norm(x, mean, variance, training=training))


@pytest.mark.parametrize("training", [False, True, None])
def test_update_bn_leaves_buffers_used_without_layer(training):
    model, data = Functional(training), images()
    before = own_state(model)
    result = update_bn(model, data)
    assert (result.written, result.unreached) == (
        {"after.running_mean", "after.running_var"},
        ("bn",),
    )
    assert changed(model, before) == {f"after.{name}" for name in STATISTICS}
    inputs = [F.batch_norm(x, before["bn.running_mean"].clone(), before["bn.running_var"].clone(),
                           training=bool(training)) for x in data]  # fmt: skip
    assert_statistics(model.after, torch.cat(inputs))


class Scaled(nn.Module):
    """Divides by running statistics before its layer is called, as fused layers do."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.bn.running_var.fill_(4.0)

    def forward(self, x):
        x = x / self.bn.running_var.sqrt()[:, None, None]
        return self.bn(x) / self.bn.running_var.sqrt()[:, None, None]


def test_update_bn_shows_old_statistics_during_pass():
    model, data = nn.Sequential(Scaled(), nn.BatchNorm2d(3)), images()
    update_bn(model, data)
    assert_statistics(model[0].bn, torch.cat(data) / 2)
    assert_statistics(model[1], torch.cat([F.batch_norm(x / 2, None, None, training=True) / 2
                                           for x in data]))  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("training", [True, False])
def test_update_bn_recomputes_scripted_layer(training):
    plain = Block()
    part = torch.jit.script(copy.deepcopy(plain))
    model = nn.Sequential(part, nn.BatchNorm2d(3)).train(training)
    expected, data = nn.Sequential(plain, nn.BatchNorm2d(3)), images((5, 3, 4))
    result = update_bn(model, data)
    assert result.layers == update_bn(expected, data).layers == 2
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    assert part.training == part.bn.training == training


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_update_bn_leaves_and_names_traced_layers(caplog):
    part = torch.jit.trace(Block().eval(), images()[0])
    model = nn.Sequential(part, nn.BatchNorm2d(3)).train()
    before = own_state(model)
    result = update_bn(model, images())
    assert (result.layers, result.unreached) == (1, ("0.bn",))
    assert changed(model, before) == {f"1.{name}" for name in STATISTICS}
    assert part.training
    assert "0.bn" in caplog.text


# What else a model keeps


class Following(nn.Module):
    """A momentum encoder: with each batch the teacher follows the student."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.teacher = copy.deepcopy(self.student)

    @torch.no_grad()
    def follow(self):
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data = slow.data * 0.9 + (fast.data + 1) * 0.1

    def forward(self, x):
        self.follow()
        return self.student(x), self.teacher(x)


def test_update_bn_keeps_weights_of_momentum_teacher():
    model, data = Following(), images()
    before = own_state(model)
    update_bn(model, data)
    layers = ("student.1", "teacher.1")
    assert changed(model, before) == {f"{n}.{name}" for n in layers for name in STATISTICS}
    with torch.no_grad():
        assert_statistics(model.student[1], torch.cat([model.student[0](x) for x in data]))


class Merging(nn.Module):
    """As loralib's layers: evaluation mode merges the factors, training mode unmerges them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.a, self.b = nn.Parameter(torch.randn(3, 1)), nn.Parameter(torch.randn(1, 3))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.a @ self.b).data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.weight if self.merged else self.weight + self.a @ self.b
        return torch.einsum("oc,nchw->nohw", weight, x)


@pytest.mark.parametrize("training", [True, False])
def test_update_bn_neither_merges_nor_unmerges_lora(training):
    model, data = nn.Sequential(Merging(), nn.BatchNorm2d(3)).train(training), images()
    before, part = own_state(model), model[0]
    update_bn(model, data)
    assert changed(model, before) == {f"1.{name}" for name in STATISTICS}
    assert (part.merged, part.training) == (not training, training)
    with torch.no_grad():
        assert_statistics(model[1], torch.cat([part(x) for x in data]))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_merges_lora_in_any_template_mode(tmp_path, training):
    def make(seed):
        torch.manual_seed(seed)
        return nn.Sequential(Merging(), nn.Flatten(), nn.Linear(48, 2))

    trained, (x,) = make(0), images((64,))
    labels = (x.mean((1, 2, 3)) > 1).long()
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    (result,) = evaluate([tmp_path / "a.pt"], make(1).train(training), [(x, labels)])
    with torch.no_grad():
        expected = F.cross_entropy(trained(x), labels).item()
    assert result.metrics["nll"] == pytest.approx(expected, rel=1e-5)


class Recurrent(nn.Module):
    """Keeps its state in a buffer, in attributes and in a list, from one batch to the next."""

    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.zeros(3), persistent=False)
        self.register_buffer("observed", torch.zeros(()))
        self.cell, self.history, self.count = None, [], torch.zeros(2)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        self.hidden = 0.5 * self.hidden + x.mean((0, 2, 3))
        self.observed.copy_(torch.maximum(self.observed, x.max()))
        self.count += 1
        self.history.append(self.hidden)
        self.cell, self.new = (self.hidden, self.hidden), self.hidden
        return self.bn(x + self.hidden[:, None, None])


@pytest.mark.parametrize("fails", [False, True])
def test_update_bn_restores_recurrent_state(fails):
    model, data = Recurrent(), images()
    hidden = model.hidden
    before = copy.deepcopy(model)
    if fails:
        with pytest.raises(BatchNormError):
            update_bn(model, [*data, data[0] * torch.inf])
    else:
        update_bn(model, data)
    assert model.hidden is hidden
    assert not model.hidden.any()
    assert not model.count.any()
    assert (model.observed, model.cell, model.history) == (0, None, [])
    assert vars(model).keys() == vars(before).keys()


# Writing


@pytest.mark.parametrize("count", [1, 2])
def test_recompute_changes_no_layer_on_failed_write(count):
    models = [nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(3))) for _ in range(count)]
    with torch.inference_mode():
        models[-1][2].running_var = torch.ones(3)  # which nobody may write to outside that mode
    before = [own_state(model) for model in models]
    with pytest.raises(BatchNormError, match=r"2\.running_var cannot be written"):
        recompute(models, images(), Runtime(torch.device("cpu")))
    assert not any(changed(m, b) for m, b in zip(models, before, strict=True))


def test_update_bn_changes_no_layer_on_overflow():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3).to(torch.float16))
    before = own_state(model)
    with pytest.raises(BatchNormError, match=r"1\.running_var is too large for float16"):
        update_bn(model, images(), forward=lambda m, x: (m[0](x), m[1](x.half() * 1e3)))
    assert not changed(model, before)
