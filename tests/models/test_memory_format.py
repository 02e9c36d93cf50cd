"""Channels as the last axis in memory, where models bear it."""

import copy

import pytest
import torch
from helpers import save
from torch import nn

from ckptavg import evaluate, update_bn
from ckptavg.batchnorm import update
from ckptavg.errors import EvaluationError
from ckptavg.models.memory_format import MemoryFormat

CPU = torch.device("cpu")


class Viewing(nn.Module):
    """Flattens by a view, as older code does, which wants the usual memory format."""

    def __init__(self, *, video=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 25, 6)
        if video:
            self.other = nn.Conv3d(3, 4, 3)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head(x.view(len(x), -1))


def batches(count=3, size=7):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 5, 5, generator=generator), torch.arange(size) % 6)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("device", "scoring", "fast"),
    [("cuda", False, True), ("cuda", True, True), ("cpu", True, True), ("cpu", False, False),
     ("mps", True, False)],
)  # fmt: skip
def test_memory_format_depends_on_device_and_use(device, scoring, fast):
    def form(model):
        return MemoryFormat(model, torch.device(device), scoring=scoring).format

    wanted = torch.channels_last if fast else torch.preserve_format
    assert form(nn.Sequential(nn.Conv2d(3, 4, 3))) is wanted
    assert form(nn.Linear(3, 4)) is torch.preserve_format
    assert form(nn.LazyConv2d(4, 3)) is torch.preserve_format


def test_memory_format_places_scored_model_channels_last():
    conv = nn.Conv2d(3, 4, 3)
    MemoryFormat(conv, CPU, scoring=False).place(conv)
    assert conv.weight.is_contiguous()
    MemoryFormat(conv, CPU, scoring=True).place(conv)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_memory_format_changes_image_convolutions_only():
    model = Viewing(video=True)
    model.table = nn.Parameter(torch.randn(1, 2, 3, 4))
    MemoryFormat(model, CPU, scoring=True).place(model)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.other.weight.is_contiguous()
    assert model.table.is_contiguous()


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluate_scores_model_that_views_activations(tmp_path, compiled):
    torch.manual_seed(0)
    models = [Viewing().eval() for _ in range(3)]
    paths = [
        save(tmp_path / f"{i}.safetensors", model.state_dict()) for i, model in enumerate(models)
    ]
    template = torch.compile(Viewing(), backend="eager") if compiled else Viewing()
    for model, result in zip(models, evaluate(paths, template, batches()), strict=True):
        with torch.no_grad():
            logits = torch.cat([model(x).double() for x, _ in batches()])
        nll = nn.functional.cross_entropy(logits, torch.cat([y for _, y in batches()]))
        assert result.metrics["nll"] == pytest.approx(float(nll), rel=1e-6)


def test_update_bn_counts_batches_once_for_viewing_model(monkeypatch):
    class Scoring(MemoryFormat):
        def __init__(self, model, device, *, scoring):
            super().__init__(model, device, scoring=not scoring)

    model = Viewing()
    expected = copy.deepcopy(model)
    update_bn(expected, batches())
    monkeypatch.setattr(update, "MemoryFormat", Scoring)
    update_bn(model, batches())
    assert model.conv.weight.is_contiguous()
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-7)


def test_memory_format_raises_other_errors_at_once():
    def attempt(batch):
        calls.append(batch)
        raise RuntimeError("shapes cannot be multiplied")

    calls, conv = [], nn.Conv2d(3, 4, 3)
    told = r"fails on a batch of float32 of 1 × 3 × 5 × 5: RuntimeError: shapes cannot be mult"
    with pytest.raises(EvaluationError, match=told):
        MemoryFormat(conv, CPU, scoring=True).run(attempt, conv, torch.zeros(1, 3, 5, 5))
    assert len(calls) == 1
