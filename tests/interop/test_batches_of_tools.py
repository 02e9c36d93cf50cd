"""Batches and data sets as torchvision, transformers and datasets give them."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ckptavg import evaluate, update_bn


class Mlp(nn.Module):
    """Takes `x`, as a tensor or by keyword."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.bn(self.fc(x)).relu())


@pytest.fixture
def rows():
    """Features and classes of 100 samples."""
    g = torch.Generator().manual_seed(1)
    y = torch.randint(4, (100,), generator=g)
    return torch.randn(100, 6, generator=g) + y[:, None], y


@pytest.mark.parametrize("form", ["torch", None])
@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_datasets_dataset_is_read_as_samples(tmp_path, rows, form, stream):
    datasets = pytest.importorskip("datasets")
    x, y = rows
    table = datasets.Dataset.from_dict({"x": x.tolist(), "labels": y.tolist()}).with_format(form)
    data = table.to_iterable_dataset() if stream else table
    model = Mlp()
    result = update_bn(model, data, batch_size=32)
    seen = model.fc(x).detach().double()
    assert (result.samples, result.batches) == (100, 4)
    assert torch.allclose(model.bn.running_mean.double(), seen.mean(0), atol=1e-6)
    assert torch.allclose(model.bn.running_var.double(), seen.var(0), rtol=1e-5)
    torch.save(model.state_dict(), tmp_path / "mlp.pt")
    (scored,) = evaluate([tmp_path / "mlp.pt"], Mlp(), data, batch_size=32)
    with torch.inference_mode():
        expected = nn.functional.cross_entropy(model.eval()(x), y)
    assert scored.metrics["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert scored.metrics["n"] == 100


def test_torchvision_detector_gets_a_list_of_images():
    models = pytest.importorskip("torchvision.models.detection")
    model = models.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    target = {"boxes": torch.tensor([[1.0, 1, 20, 20]]), "labels": torch.tensor([1])}
    samples = [(torch.rand(3, 64 + 8 * i, 80), target) for i in range(5)]
    loader = DataLoader(samples, 2, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    result = update_bn(model, loader)
    assert (result.samples, result.batches, result.unreached) == (5, 3, ())


def test_transformers_batches_go_by_name():
    """As samples, in another order, or as a batch of transformers' own class."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
    )
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 3
    found = []
    for data in (
        [{"pixel_values": images[i], "labels": int(labels[i]), "path": "a"} for i in range(8)],
        [transformers.BatchFeature({"pixel_values": images, "labels": labels})],
    ):
        torch.manual_seed(0)
        model = transformers.ResNetForImageClassification(config)
        assert update_bn(model, data, batch_size=8).samples == 8
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.allclose(value.float(), found[1][name].float(), atol=1e-5), name
