"""Quantizers of quantization-aware training keep their ranges while data go through the model."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ckptavg

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (60,), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, conv, norm):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.act = conv, norm, nn.ReLU()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.act(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.head(x.mean((*range(2, x.dim()),)) if x.dim() > 2 else x))


KINDS = {
    "convolution": (lambda: nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d, X),
    "sequence": (lambda: nn.Conv1d(3, 8, 3), nn.BatchNorm1d, X.flatten(2)),
    "linear": (lambda: nn.Linear(192, 8), nn.BatchNorm1d, X.flatten(1)),
}


def prepared(kind, fused):
    torch.manual_seed(0)
    conv, norm, _ = KINDS[kind]
    net = Net(conv(), norm(8)).train()
    if fused:
        quantization.fuse_modules_qat(net, [["conv", "bn"]], inplace=True)
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=0)
    return quantization.prepare_qat(net, inplace=True)


def trained(kind, fused):
    net, x = prepared(kind, fused), KINDS[kind][2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    for part in range(0, 60, 12):
        optimizer.zero_grad()
        F.cross_entropy(net(x[part : part + 12]), Y[part : part + 12]).backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_update_bn_keeps_quantizer_ranges(kind, fused):
    net, x = trained(kind, fused), KINDS[kind][2]
    name, layer = next((n, m) for n, m in net.named_modules() if n.endswith("bn"))
    still, seen = copy.deepcopy(net).eval(), []
    still.apply(quantization.disable_observer)
    still.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        still(x)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = ckptavg.update_bn(net, list(zip(x.split(25), Y.split(25), strict=True)))
    values = seen[0].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), values.var(1), rtol=1e-5, atol=1e-6)
    kept = net.state_dict().keys() - result.written - {f"{name}.num_batches_tracked"}
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in kept)


def test_evaluate_keeps_quantizer_ranges(tmp_path):
    net = trained("convolution", fused=True)
    torch.save(net.state_dict(), tmp_path / "epoch_1.pt")
    data = list(zip((10 * X).split(20), Y.split(20), strict=True))  # far outside the ranges
    [result] = ckptavg.evaluate([tmp_path / "epoch_1.pt"], prepared("convolution", True), data)
    net.eval().apply(quantization.disable_observer)
    with torch.no_grad():
        expected = F.cross_entropy(net(10 * X).double(), Y)
    assert result.metrics["nll"] == pytest.approx(expected.item(), rel=1e-5)


def test_update_bn_lets_new_quantizer_find_range():
    net = prepared("convolution", fused=True)
    ckptavg.update_bn(net, [X])
    assert net.conv.bn.running_var.min() > 0
    assert bool(net.quant.activation_post_process.observer_enabled)
