"""Adapters that are one file each: their products averaged exactly, or a note that they are not."""

import json
import logging

import pytest
import torch
from helpers import same_bits, save
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selecting import combinations

from ckptavg import average, open_run

SPELLINGS = {
    "kohya": ("lora_unet_q.lora_down.weight", "lora_unet_q.lora_up.weight"),
    "diffusers": ("unet.q.lora_A.weight", "unet.q.lora_B.weight"),
    "diffusers before PEFT": ("unet.q.lora.down.weight", "unet.q.lora.up.weight"),
    "attention processors": (
        "unet.q.processor.to_q_lora.down.weight", "unet.q.processor.to_q_lora.up.weight",
    ),
    "x-flux": (
        "double_blocks.0.processor.proj_lora1.down.weight",
        "double_blocks.0.processor.proj_lora1.up.weight",
    ),
}  # fmt: skip
STACKED, INEXACT = (
    "merged exactly by stacking",
    "means of factors are not the mean of their product",
)


def factors(names, seed, first=(4, 16), second=(8, 4), dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(zip(names, (first, second), strict=True))
    return {name: torch.randn(shape, generator=rng, dtype=dtype) for name, shape in shapes.items()}


def write(directory, states, metadata=None):
    for i, state in enumerate(states, 1):
        directory.mkdir(parents=True, exist_ok=True)
        save_file(state, directory / f"style-{i:06d}.safetensors", metadata)
    return open_run(directory)


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def product(state, names, alpha=None):
    """What an adapter adds to the weight, as those compute it who load such a file."""
    first, second = (state[name].double() for name in names)
    rank = first.shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    return scale * (second.flatten(1) @ first.flatten(1))


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    return caplog


@combinations(weights=[None, [1, 2, 5], [0, 3, 1], [-1, 2, 2]], spelling=SPELLINGS)
def test_adapter_file_of_any_spelling_is_averaged_exactly(tmp_path, notes, weights, spelling):
    names = SPELLINGS[spelling]
    states = [factors(names, i, dtype=torch.float64) for i in range(3)]
    got = average(write(tmp_path, states), weights=weights)
    used = weights or [1, 1, 1]
    mean = sum(w * product(s, names) for w, s in zip(used, states, strict=True)) / sum(used)
    torch.testing.assert_close(product(got, names), mean, rtol=1e-13, atol=1e-13)
    assert got[names[0]].shape == (4 * sum(w != 0 for w in used), 16)
    assert STACKED in notes.text
    assert INEXACT not in notes.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_adapter_file_alpha_grows_with_rank(tmp_path, dtype):
    names = SPELLINGS["kohya"]
    alpha = torch.tensor(3, dtype=dtype)
    states = [factors(names, i) | {"lora_unet_q.alpha": alpha} for i in range(3)]
    metadata = {
        "ss_network_dim": "4", "ss_network_alpha": "3.0", "ss_network_module": "networks.lora",
        "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "1", "dropout": "None"}),
        "ss_steps": "300",
    }  # fmt: skip
    run = write(tmp_path / "run", states, metadata)
    out = average(run, out=tmp_path / "swa.safetensors", digests=True)
    got, header = load_file(out), header_of(out)
    assert same_bits(got["lora_unet_q.alpha"], torch.tensor(9, dtype=dtype))
    mean = sum(product(state, names, 3) for state in states) / 3
    torch.testing.assert_close(product(got, names, 9), mean, rtol=1e-6, atol=1e-6)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("12", "9.0")
    assert json.loads(header["ss_network_args"]) == {
        "conv_dim": "6", "conv_alpha": "3", "dropout": "None",
    }  # fmt: skip
    assert header["ss_steps"] == "300"
    assert header["ss_network_module"] == "networks.lora"


@pytest.mark.parametrize(
    ("alpha", "dtype", "expected"),
    [
        (33.25, torch.bfloat16, torch.float32),
        (1.5, torch.bfloat16, torch.bfloat16),
        (40000.0, torch.float16, torch.float32),
        (100, torch.int8, torch.float32),
    ],
)
def test_adapter_file_alpha_is_widened_if_inexact(tmp_path, alpha, dtype, expected):
    names = SPELLINGS["kohya"]
    own = {"lora_unet_q.alpha": torch.tensor(alpha, dtype=dtype)}
    got = average(write(tmp_path, [factors(names, i) | own for i in range(3)]))
    assert same_bits(got["lora_unet_q.alpha"], torch.tensor(3 * alpha, dtype=expected))


def test_adapter_file_stacks_convolutions_and_averages_diffs(tmp_path):
    names = SPELLINGS["kohya"]
    states = []
    for i in (1, 2):
        state = factors(names, i, (4, 3, 3, 3), (8, 4, 1, 1), torch.float64)
        states.append(state | {"lora_unet_norm.diff": torch.full((5,), float(i))})
    got = average(write(tmp_path, states))
    mean = (product(states[0], names) + product(states[1], names)) / 2
    torch.testing.assert_close(product(got, names), mean, rtol=1e-13, atol=1e-13)
    assert got["lora_unet_norm.diff"].tolist() == [1.5] * 5


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, lambda r, a: a / r), ({"use_rslora": True}, lambda r, a: a / r**0.5)],
)
def test_adapter_file_header_keeps_the_scale(tmp_path, settings, scale):
    names = SPELLINGS["diffusers"]
    states = [factors(names, i, dtype=torch.float64) for i in range(4)]
    config = {"r": 4, "lora_alpha": 32, "rank_pattern": {"k": 2}, "alpha_pattern": {"k": 8}}
    told = {f"unet.{name}": value for name, value in (config | settings).items()}
    run = write(tmp_path / "run", states, {"lora_adapter_metadata": json.dumps(told)})
    out = average(run, out=tmp_path / "swa.safetensors")
    got, header = load_file(out), json.loads(header_of(out)["lora_adapter_metadata"])
    before, after = scale(4, 32), scale(header["unet.r"], header["unet.lora_alpha"])
    mean = sum(before * product(state, names) for state in states) / 4
    torch.testing.assert_close(after * product(got, names), mean, rtol=1e-12, atol=1e-12)
    assert header["unet.r"] == 16
    assert header["unet.rank_pattern"] == {"k": 8}
    own = scale(8, header["unet.alpha_pattern"]["k"])
    assert own == pytest.approx(scale(2, 8))


@given(
    rank=st.integers(1, 4), height=st.integers(1, 6), width=st.integers(1, 6),
    weights=st.lists(st.integers(0, 5), min_size=2, max_size=4).filter(lambda w: sum(w) > 0),
    names=st.sampled_from(list(SPELLINGS.values())),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_adapter_file_average_is_exact_at_any_rank_and_weights(
    tmp_path_factory, rank, height, width, weights, names
):
    shapes = (rank, width), (height, rank)
    states = [factors(names, i, *shapes, torch.float64) for i in range(len(weights))]
    got = average(write(tmp_path_factory.mktemp("run"), states), weights=weights)
    mean = sum(w * product(s, names) for w, s in zip(weights, states, strict=True)) / sum(weights)
    torch.testing.assert_close(product(got, names), mean, rtol=1e-12, atol=1e-12)


KOHYA = SPELLINGS["kohya"]


@pytest.mark.parametrize(
    "further",
    [
        {"lora_unet_q.lora_mid.weight": torch.ones(4, 4, 3, 3)},
        {"lora_unet_q.dora_scale": torch.ones(8, 1)},
        {"lora_unet_k.hada_w1_a": torch.ones(8, 4), "lora_unet_k.hada_w1_b": torch.ones(4, 16)},
        {"lora_unet_k.lokr_w1": torch.ones(2, 2), "lora_unet_k.lokr_w2": torch.ones(4, 8)},
        {"lora_unet_k.oft_blocks": torch.ones(4, 4)},
        {"unet.conv.weight": torch.ones(4, 4)},
    ],
    ids=lambda further: next(iter(further)),
)
def test_adapter_file_with_other_tensors_is_noted_as_inexact(tmp_path, notes, further):
    states = [{n: t + i for n, t in (factors(KOHYA, 0) | further).items()} for i in (0, 2)]
    got = average(write(tmp_path, states))
    assert INEXACT in notes.text
    assert all(torch.allclose(got[name], value + 1) for name, value in states[0].items())


@pytest.mark.parametrize(
    "names",
    [
        ("unet.k.hada_w1_a", "unet.k.hada_w1_b"),
        ("layers.0.q_proj.lora_a.weight", "layers.0.q_proj.lora_b.weight"),  # torchtune
        ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"),
        ("q.lora_A.default.weight", "q.lora_B.default.weight"),
        ("q.lora_A", "q.lora_B"),  # loralib
        ("q.loraA.weight", "q.loraB.weight"),
        ("q.parametrizations.weight.0.A", "q.parametrizations.weight.0.B"),
    ],
)
@pytest.mark.parametrize("base", [{}, {"q.weight": torch.ones(8, 16)}], ids=["alone", "in a model"])
def test_adapter_file_without_its_scale_is_noted_as_inexact(tmp_path, notes, names, base):
    states = [factors(names, i) | base for i in (1, 2)]
    got = average(write(tmp_path, states))
    assert INEXACT in notes.text
    assert all(got[name].shape == states[0][name].shape for name in names)
    notes.clear()
    average(open_run(tmp_path).last(1))
    assert INEXACT not in notes.text


@pytest.mark.parametrize(
    ("change", "metadata", "options"),
    [
        ({"lora_unet_q.alpha": torch.tensor(2.0)}, {}, {}),
        ({}, {"rank": "4"}, {}),
        ({}, {"lora_adapter_metadata": '{"unet.r": 4}'}, {}),
        ({}, {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "use_dora": true}'}, {}),
        ({}, {"lora_adapter_metadata": "[["}, {}),
        ({}, {}, {"exclude": "*alpha"}),
    ],
    ids=["another alpha", "another rank", "rank alone", "DoRA", "no JSON", "a pattern"],
)  # fmt: skip
def test_adapter_file_with_unclear_scale_is_noted_as_inexact(
    tmp_path, notes, change, metadata, options
):
    states = [factors(KOHYA, i) | {"lora_unet_q.alpha": torch.tensor(4.0)} for i in (1, 2)]
    got = average(write(tmp_path, [states[0] | change, states[1]], metadata), **options)
    assert INEXACT in notes.text
    assert got[KOHYA[0]].shape == (4, 16)


@pytest.mark.parametrize(
    "names",
    [("flora.weight", "explora.weight"), ("s4.A", "s4.B"), ("a", "b"), ("net.up", "net.down")],
)
def test_adapter_file_note_spares_similar_names(tmp_path, notes, names):
    states = [factors(names, i, (4, 4), (4, 4)) for i in (1, 2)]
    average(write(tmp_path, states))
    assert INEXACT not in notes.text


def test_adapter_file_of_torch_is_stacked(tmp_path):
    states = [factors(KOHYA, i) for i in (1, 2)]
    for i, state in enumerate(states):
        save(tmp_path / f"epoch_{i}.pt", state)
    got = average(open_run(tmp_path))
    assert torch.equal(got[KOHYA[0]], torch.cat([state[KOHYA[0]] for state in states]))
    assert torch.equal(got[KOHYA[1]], torch.cat([state[KOHYA[1]] for state in states], 1) / 2)
