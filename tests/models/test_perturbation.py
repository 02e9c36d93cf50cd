"""Random directions in weight space, and steps along them."""

import copy
import math

import pytest
import torch
from norm_network import Net
from torch import nn

from ckptavg.errors import ModelError
from ckptavg.models import perturbation
from ckptavg.models.perturbation import Direction, Perturbation


def moved(model, seed, number, distance):
    """A copy of a module, moved along a direction."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        Perturbation(Direction(seed, number), distance).apply(copied)
    return copied


def difference(model, other):
    """All parameters' differences as a vector."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    parts = [torch.view_as_real(d) if d.is_complex() else d for d in ((b - a) for a, b in pairs)]
    return torch.cat([part.detach().double().flatten() for part in parts])


def test_direction_has_length_one():
    model = Net().double()
    for number in range(5):
        vector = difference(model, moved(model, 0, number, 1.0))
        assert float(vector.norm()) == pytest.approx(1, abs=1e-9)


def test_direction_is_the_same_for_any_weights_and_distance():
    torch.manual_seed(0)
    one, other = Net().double(), Net().double()
    first = difference(one, moved(one, 3, 1, 2.0)) / 2
    second = difference(other, moved(other, 3, 1, -0.5)) / -0.5
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_direction_depends_on_seed_and_number():
    model = Net().double()
    vectors = [difference(model, moved(model, *key, 1.0)) for key in ((0, 0), (0, 1), (1, 0))]
    cosines = [float(vectors[a] @ vectors[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert all(abs(cosine) < 0.7 for cosine in cosines)


def test_directions_are_uniform_on_the_sphere():
    # On the sphere in n dimensions each coordinate has mean 0 and variance 1/n, its fourth power
    # the mean 3/(n(n+2)); coordinates of different tensors do not correlate.
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1, bias=False)).double()
    vectors = torch.stack([difference(model, moved(model, 0, i, 1.0)) for i in range(4000)])
    n = vectors.shape[1]
    assert n == 4
    assert vectors.mean(0).abs().max() < 4 / math.sqrt(4000 * n)
    torch.testing.assert_close(
        vectors.T @ vectors / 4000, torch.eye(n).double() / n, rtol=0, atol=0.02
    )
    torch.testing.assert_close(
        vectors.pow(4).mean(0), torch.full((n,), 3 / (n * (n + 2))).double(), rtol=0, atol=0.012
    )


def test_direction_does_not_move_buffers():
    model = Net()
    other = moved(model, 0, 0, 5.0)
    for (name, value), (_, after) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(value, after), name
    for (name, value), (_, after) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert not torch.equal(value, after), name


def test_direction_ignores_wrappers_of_names():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    model = Net().double()
    plain = difference(model, moved(model, 0, 2, 1.0))
    wrapped = Wrapped(model)
    assert torch.equal(plain, difference(wrapped, moved(wrapped, 0, 2, 1.0)))


def test_direction_counts_tied_parameters_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    other = moved(model.double(), 0, 0, 1.0)
    assert other["a"].weight is other["b"].weight
    assert float(difference(model, other).norm()) == pytest.approx(1)


def linear_of(values):
    """A layer without bias that has given weights, of any type."""
    layer = nn.Linear(5, 4, bias=False)
    layer.weight = nn.Parameter(values)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_perturbation_rounds_once(dtype):
    values = torch.randn(4, 5, dtype=dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = moved(linear_of(values.to(wide)), 0, 0, 0.3)
    rounded = moved(linear_of(values), 0, 0, 0.3)
    assert rounded.weight.dtype == dtype
    assert torch.equal(exact.weight.to(dtype), rounded.weight)


def test_perturbation_keeps_the_layout_of_memory():
    model = nn.Conv2d(3, 8, 3).double().to(memory_format=torch.channels_last)
    other = moved(model, 0, 0, 1.0)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    contiguous = nn.Conv2d(3, 8, 3).double()
    contiguous.load_state_dict(model.state_dict())
    assert torch.equal(other.weight, moved(contiguous, 0, 0, 1.0).weight)


def test_perturbation_of_distance_0_changes_nothing():
    model = Net()
    assert not difference(model, moved(model, 0, 0, 0.0)).any()


def test_perturbation_draws_a_large_tensor_in_parts(monkeypatch):
    model = nn.Linear(40, 40).double()
    monkeypatch.setattr(perturbation, "_DRAW", 64)
    perturbation._compute_norm.cache_clear()
    parts = [len(part) for part in Direction(0, 0).draw("weight", 1600)]
    assert parts == [64] * 25
    vector = difference(model, moved(model, 0, 0, 1.0))
    assert float(vector.norm()) == pytest.approx(1)
    assert vector.abs().min() > 0
    perturbation._compute_norm.cache_clear()


def test_perturbation_refuses_a_module_without_parameters():
    with pytest.raises(ModelError, match="no floating-point parameters"):
        Perturbation(Direction(0, 0), 1.0).apply(nn.Flatten())


def test_perturbations_together_are_those_of_each_alone(monkeypatch):
    torch.manual_seed(0)
    models = [Net() for _ in range(4)]
    steps = [
        Perturbation(Direction(0, number), distance)
        for number, distance in ((0, 1.0), (1, 2.0), (0, -3.0), (1, 0.0))
    ]
    alone = [copy.deepcopy(model) for model in models]
    for model, step in zip(alone, steps, strict=True):
        step.apply(model)
    drawn = []
    draw = Direction.draw

    def counted(self, name, count):
        drawn.append((self.number, name))
        return draw(self, name, count)

    monkeypatch.setattr(Direction, "draw", counted)
    perturbation.apply_together(zip(models, steps, strict=True))
    for together, single in zip(models, alone, strict=True):
        for a, b in zip(together.parameters(), single.parameters(), strict=True):
            assert torch.equal(a, b)
    # The norms are known from before.
    assert len(drawn) == len(set(drawn)) == 2 * len(list(Net().parameters()))
