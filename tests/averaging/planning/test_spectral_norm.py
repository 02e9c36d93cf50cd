"""Layers under spectral norm: their vectors are those of the averaged weight."""

import logging

import pytest
import torch
from helpers import same_bits, save_states
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as hook

from ckptavg import average, open_run
from ckptavg.averaging.planning import spectral_norm
from ckptavg.averaging.planning.modules import Modules
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import DTYPES, Tensor
from ckptavg.inspection.verify import Verifier

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "square": lambda: nn.Linear(6, 6),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 2),
    "embedding": lambda: nn.Embedding(9, 4),
}


def trained(make, norm, count=3):
    """States of a layer whose weights move, and whose vectors follow as in training."""
    torch.manual_seed(0)
    layer = norm(make())
    states = []
    for _ in range(count):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        layer.train()
        for _ in range(20):
            _ = layer(torch.zeros(shaped(layer), dtype=torch.long if is_table(layer) else None))
        states.append({name: value.clone() for name, value in layer.state_dict().items()})
    return layer, states


def is_table(layer):
    return isinstance(layer, nn.Embedding)


def shaped(layer):
    """The extent of an input."""
    if is_table(layer):
        return (1,)
    images = isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    return (1, layer.in_channels, 4, 4) if images else (1, layer.in_features)


def norm_of(layer):
    """The largest singular value of the weight that a layer computes with."""
    layer.eval()
    layer(torch.zeros(shaped(layer), dtype=torch.long if is_table(layer) else None))
    weight = layer.weight.detach().double()
    dimension = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    return torch.linalg.matrix_norm(weight.movedim(dimension, 0).flatten(1), 2).item()


@pytest.mark.parametrize("norm", [hook, parametrizations.spectral_norm])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_spectral_norm_of_averaged_layer_is_1(tmp_path, make, norm):
    layer, states = trained(make, norm)
    got = average(open_run(save_states(tmp_path, states)[0].parent))
    layer.load_state_dict(got)
    assert norm_of(layer) == pytest.approx(1, abs=1e-6)
    raw = [name for name in got if name.endswith(("_orig", "original"))]
    mean = torch.stack([state[raw[0]].double() for state in states]).mean(0).float()
    assert torch.equal(got[raw[0]], mean)


@pytest.mark.parametrize("norm", [hook, parametrizations.spectral_norm])
def test_spectral_norm_ignores_sign_of_vectors(tmp_path, norm):
    _, states = trained(LAYERS["linear"], norm)
    last = states[-1]
    vectors = [name for name in last if name.endswith(("_u", "_v"))]
    mirrored = last | {name: -last[name] for name in vectors}
    got = average(open_run(save_states(tmp_path, [mirrored, last])[0].parent))
    assert all(same_bits(got[name], value) for name, value in last.items())


def test_spectral_norm_keeps_vectors_of_one_checkpoint(tmp_path):
    _, states = trained(LAYERS["linear"], hook)
    got = average(open_run(save_states(tmp_path, states)[0].parent).last(1))
    assert all(same_bits(got[name], value) for name, value in states[-1].items())


@pytest.mark.parametrize(
    "names",
    [
        ("weight", "u0", "sv0"),  # as in BigGAN, with u of the shape (1, n)
        ("conv.module.weight_bar", "conv.module.weight_u", "conv.module.weight_v"),
        ("weight", "sn_u", "sn_sigma"),
    ],
)
def test_spectral_norm_knows_other_implementations(tmp_path, names):
    weight, u, other = names
    rng = torch.Generator().manual_seed(0)
    states = []
    for sign in (1, -1, 1):
        state = {weight: torch.randn(5, 8, generator=rng), u: torch.randn(1, 5, generator=rng)}
        state[other] = torch.randn(8 if other.endswith("v") else 1, generator=rng)
        states.append({name: v if name == weight else sign * v for name, v in state.items()})
    got = average(open_run(save_states(tmp_path, states)[0].parent))
    left, _, _ = torch.linalg.svd(got[weight].double())
    cosine = (left[:, 0] @ got[u].double().flatten()).abs()
    assert cosine.item() == pytest.approx(1, abs=1e-6)
    assert got[u].shape == (1, 5)


@pytest.mark.parametrize(
    "state",
    [
        {"weight_g": torch.randn(4, 1), "weight_v": torch.randn(4, 6)},  # weight norm
        {"weight": torch.randn(4, 6), "u": torch.randn(4)},  # biases of attention
        {"weight": torch.randn(4, 6), "u": torch.randn(4), "v": torch.randn(4)},
        {"q.weight": torch.randn(4, 6), "pos_u": torch.randn(4), "pos_v": torch.randn(6)},
    ],
)
def test_spectral_norm_leaves_other_u_and_v_to_averaging(tmp_path, state):
    states = [state, {name: value + 1 for name, value in state.items()}]
    got = average(open_run(save_states(tmp_path, states)[0].parent))
    assert all(torch.allclose(got[name], value + 0.5, atol=1e-6) for name, value in state.items())


def test_spectral_norm_vectors_are_noted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    _, states = trained(LAYERS["linear"], hook)
    average(open_run(save_states(tmp_path, states)[0].parent))
    assert "spectral norm are not averaged" in caplog.text
    assert "weight_u, weight_v" in caplog.text


def test_spectral_norm_vectors_are_hashed_and_converted(tmp_path):
    _, states = trained(LAYERS["convolution"], hook)
    run = open_run(save_states(tmp_path, states)[0].parent)
    (tmp_path / "out").mkdir()
    out = average(run, out=tmp_path / "out" / "swa.pt", dtype="float16", digests=True)
    expected = average(run, dtype="float16")
    found = torch.load(out, weights_only=True)["state_dict"]
    assert all(same_bits(found[name], value) for name, value in expected.items())
    assert all(finding.state == "same" for finding in Verifier().verify(open_checkpoint(out)))


@given(
    height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-200, 1.0, 1e200]),
)  # fmt: skip
@settings(deadline=None, max_examples=50)
def test_iterate_vectors_gives_largest_singular_value(height, width, seed, scale):
    rng = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(height, width, generator=rng, dtype=torch.float64)
    start = torch.randn(height, generator=rng)
    vectors = spectral_norm.iterate_vectors(weight, [start], weight + scale, 1000)
    value = vectors[0] @ weight.double() @ vectors[1]
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(weight.double(), 2).item(), 1e-3)
    assert all(v.norm().item() == pytest.approx(1, abs=1e-12) for v in vectors)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_iterate_vectors_is_none_for_zero_or_nonfinite_weight(value):
    weight = torch.full((3, 4), value)
    assert spectral_norm.iterate_vectors(weight, [torch.ones(3)], torch.ones(3, 4), 9) is None


def test_limit_steps_bounds_work_on_many_layers():
    assert spectral_norm.limit_steps([(8, 8)] * 20) == 1000
    assert spectral_norm.limit_steps([(8, 8)] * 100_000) == 20


def test_find_layers_takes_linear_time():
    tensor = Tensor(DTYPES["float32"], (3,), ())
    hostile = {"_" * 2000 + f"u{i}x": tensor for i in range(2000)}
    assert spectral_norm.find_layers(Modules(hostile)) == []
