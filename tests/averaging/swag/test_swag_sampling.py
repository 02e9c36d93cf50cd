"""Samples of SWAG beside the covariance of the paper and the formula of the published code."""

import math

import pytest
import torch
from helpers import counted_reads, opened, same_bits

from ckptavg.averaging import stream as streaming
from ckptavg.averaging.compute import compute_state_dicts
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.swag.gaussian_noise import GaussianNoise, draw_normals
from ckptavg.averaging.swag.sampling import plan_samples, sample_coefficients
from ckptavg.averaging.swag.specification import Swag
from ckptavg.errors import RunError

# Three checkpoints of two weights: mean (3, 4), variances (8/3, 8).
WORKED = [(1.0, 2.0), (3.0, 2.0), (5.0, 8.0)]
COVARIANCE = [[31 / 12, 2.0], [2.0, 8.0]]


def states(count=6, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(70, 31, generator=generator)
    found = []
    for _ in range(count):
        move = 0.01 * torch.randn(70, 31, generator=generator)
        bias = torch.randn(5, generator=generator)
        found.append({"weight": (base + move).to(dtype), "bias": bias.to(dtype)})
    return found


def sampled(checkpoints, swag, dtype="keep"):
    return compute_state_dicts(plan_samples(plan_average(checkpoints, dtype=dtype), swag))


def deviations_of(rows, rank):
    """D as the published code collects it: each model less the running mean, the last columns."""
    mean, kept = torch.zeros_like(rows[0]), []
    for n, row in enumerate(rows):
        mean = mean * n / (n + 1.0) + row / (n + 1.0)
        kept.append(row - mean)
        if n + 1 > rank:
            kept = kept[1:]
    return torch.stack(kept) if kept else torch.empty(0, len(rows[0]), dtype=rows.dtype)


def sample_by_formula(rows, swag, low_rank_normals, diagonal_normals):
    """The full-rank sample of the published code, with K as the number of columns there are."""
    mean, square_mean = rows.mean(0), (rows**2).mean(0)
    variance = torch.clamp(square_mean - mean**2, 1e-30)
    noise = variance.sqrt() * diagonal_normals
    if swag.rank:
        columns = deviations_of(rows, swag.rank)
        noise = noise + columns.T @ low_rank_normals / (len(columns) - 1) ** 0.5
    return mean + swag.covariance_scale**0.5 * noise


# The covariance


def test_samples_have_worked_covariance(tmp_path):
    weights = [{"w": torch.tensor(row, dtype=torch.float64)} for row in WORKED]
    found = sampled(opened(tmp_path, weights), Swag(samples=8000))
    values = torch.stack([state["w"] for state in found])
    expected = torch.tensor(COVARIANCE, dtype=torch.float64)
    # A covariance of normal samples has the variance (Σᵢᵢ Σⱼⱼ + Σᵢⱼ²) / N.
    spread = torch.outer(expected.diag(), expected.diag()).add(expected**2).div(8000).sqrt()
    assert bool(((values.T.cov() - expected).abs() < 4 * spread).all())
    error = (expected.diag() / 8000).sqrt()
    assert bool(((values.mean(0) - torch.tensor([3.0, 4.0])).abs() < 4 * error).all())


def test_sample_coefficients_give_worked_low_rank_part():
    rows = torch.tensor(WORKED, dtype=torch.float64)
    swag = Swag(rank=3, scale=1.0)
    directions = []
    for axis in range(3):
        normals = [float(axis == column) for column in range(3)]
        coefficients = sample_coefficients(3, swag, normals)
        assert math.fsum(coefficients) == pytest.approx(1)
        directions.append(torch.tensor(coefficients, dtype=torch.float64) @ rows - rows.mean(0))
    factor = torch.stack(directions)
    # 2 Σ less the diagonal (8/3, 8).
    expected = torch.tensor([[2.5, 4.0], [4.0, 8.0]], dtype=torch.float64)
    assert torch.allclose(factor.T @ factor, expected)


def test_sample_coefficients_of_rank_zero_are_those_of_mean():
    assert sample_coefficients(4, Swag(rank=0), []) == [0.25] * 4


# The formula


@pytest.mark.parametrize("swag", [Swag(3), Swag(3, rank=4), Swag(3, rank=0), Swag(3, 5, 2.0, 9)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_samples_follow_published_formula(tmp_path, swag, dtype):
    weights = states(6, torch.float64)
    found = sampled(opened(tmp_path, weights), swag, dtype)
    for number, state in enumerate(found):
        key = f"swag/{swag.seed}/{number}"
        columns = swag.columns(6)
        for name, value in state.items():
            rows = torch.stack([weight[name].flatten() for weight in weights])
            diagonal = draw_normals(f"{key}/{name}/0", rows.shape[1])
            by_hand = sample_by_formula(rows, swag, draw_normals(key, columns), diagonal)
            expected = by_hand.reshape(value.shape).to(value.dtype)
            tolerance = {torch.float64: 1e-9, torch.float32: 2e-7}[value.dtype]
            assert torch.allclose(value, expected, rtol=tolerance, atol=1e-9)


def test_samples_of_offset_weights_keep_small_variances(tmp_path):
    # The squares of such weights lose all digits of the variance in float32, most in float64.
    weights = [{"w": torch.full((4,), 1e6 + 1e-3 * i, dtype=torch.float64)} for i in range(5)]
    found = sampled(opened(tmp_path, weights), Swag(samples=400, rank=0))
    spread = torch.stack([state["w"] for state in found]).std()
    assert float(spread) == pytest.approx(1e-3 * math.sqrt(2), rel=0.1)


def test_sample_of_scale_zero_is_average(tmp_path):
    checkpoints = opened(tmp_path, states(4))
    (sample,) = sampled(checkpoints, Swag(samples=1, scale=0.0))
    (average,) = compute_state_dicts([plan_average(checkpoints)])
    for name, value in average.items():
        assert torch.allclose(sample[name], value, rtol=0, atol=1e-7)


# Independent of how they are computed


def test_samples_are_independent_of_their_number(tmp_path):
    checkpoints = opened(tmp_path, states())
    few, many = sampled(checkpoints, Swag(2)), sampled(checkpoints, Swag(7))
    alone = [compute_state_dicts([plan])[0] for plan in plan_samples(
        plan_average(checkpoints), Swag(2))]  # fmt: skip
    for expected, *others in zip(few, many[:2], alone, strict=True):
        for other in others:
            assert all(same_bits(expected[name], other[name]) for name in expected)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("draw", [16, 100, 1 << 14])
def test_samples_are_independent_of_blocks(tmp_path, monkeypatch, block, draw):
    monkeypatch.setattr("ckptavg.averaging.swag.gaussian_noise._DRAW", draw)
    checkpoints = opened(tmp_path, states(3))
    whole = sampled(checkpoints, Swag(2))
    # All that a thread may hold are so many floats.
    monkeypatch.setattr(streaming, "_HELD", block * 6)
    for state, expected in zip(sampled(checkpoints, Swag(2)), whole, strict=True):
        assert all(same_bits(state[name], expected[name]) for name in expected)


def test_samples_of_views_are_those_of_plain_tensors(tmp_path):
    plain = states(3)
    views = [{name: value.T.contiguous().T for name, value in state.items() if name == "weight"}
             for state in plain]  # fmt: skip
    strided = sampled(opened(tmp_path / "views", views), Swag(2))
    contiguous = sampled(opened(tmp_path / "plain", plain), Swag(2))
    for one, other in zip(strided, contiguous, strict=True):
        assert same_bits(one["weight"], other["weight"])


def test_samples_share_one_read(tmp_path, monkeypatch):
    checkpoints = opened(tmp_path, states(4))
    plans = plan_samples(plan_average(checkpoints), Swag(9))
    reads = counted_reads(monkeypatch)
    compute_state_dicts(plans)
    once = dict(reads)
    reads.clear()
    compute_state_dicts([plan_average(checkpoints)])
    assert once == dict(reads)


def test_samples_beside_an_average_leave_its_bits(tmp_path):
    checkpoints = opened(tmp_path, states(4))
    planned = plan_average(checkpoints)
    (alone,) = compute_state_dicts([planned])
    fewer = plan_samples(plan_average(checkpoints[1:]), Swag(2))
    expected = compute_state_dicts(fewer)
    for more in ([], plan_samples(planned, Swag(2))):
        average, *others = compute_state_dicts([planned, *more, *fewer])
        assert all(same_bits(average[name], alone[name]) for name in alone)
        for state, sample in zip(others[-2:], expected, strict=True):
            assert all(same_bits(state[name], sample[name]) for name in sample)


# Kinds of tensors


def test_samples_keep_ties(tmp_path):
    weights = []
    for state in states(3):
        weights.append({"embedding": state["weight"], "head": state["weight"]})
    for state in sampled(opened(tmp_path, weights), Swag(2)):
        assert same_bits(state["embedding"], state["head"])


def test_samples_leave_statistics_buffers_and_masks(tmp_path):
    mask = torch.tensor([0.0, -torch.inf])
    weights = []
    for i in range(3):
        weights.append({
            "norm.weight": torch.full((3,), 1.0 + i),
            "norm.running_mean": torch.full((3,), 4.0 * i),
            "norm.running_var": torch.full((3,), 1.0 + i),
            "norm.num_batches_tracked": torch.tensor(i),
            "mask": mask, "empty": torch.empty(0), "scalar": torch.tensor(float(i)),
        })  # fmt: skip
    first, second = sampled(opened(tmp_path, weights), Swag(2))
    for state in (first, second):
        assert state["norm.running_mean"].tolist() == [4.0] * 3
        assert state["norm.running_var"].tolist() == [2.0] * 3
        assert state["norm.num_batches_tracked"] == 2
        assert state["mask"][1] == -torch.inf
    assert len({*first["norm.weight"].tolist(), *second["norm.weight"].tolist()}) == 6
    assert first["scalar"] != second["scalar"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_of_narrow_floats_are_rounded_once(tmp_path, dtype):
    narrow = states(4, dtype)
    wide = [{name: value.double() for name, value in state.items()} for state in narrow]
    low = sampled(opened(tmp_path / "narrow", narrow), Swag(2))
    high = sampled(opened(tmp_path / "wide", wide), Swag(2))
    for one, other in zip(low, high, strict=True):
        assert all(same_bits(one[name], other[name].to(dtype)) for name in one)


def test_samples_of_complex_numbers_are_those_of_their_parts(tmp_path):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(40, 2, generator=generator) for _ in range(3)]
    numbers = [{"w": torch.view_as_complex(part)} for part in parts]
    found = sampled(opened(tmp_path / "complex", numbers), Swag(2))
    plain = sampled(opened(tmp_path / "parts", [{"w": part} for part in parts]), Swag(2))
    for one, other in zip(found, plain, strict=True):
        assert same_bits(torch.view_as_real(one["w"]), other["w"])


def test_samples_need_two_checkpoints(tmp_path):
    (checkpoint,) = opened(tmp_path, states(1))
    with pytest.raises(RunError, match="needs at least two checkpoints and the selection has 1"):
        plan_samples(plan_average([checkpoint]), Swag())


# The noise


def test_noise_is_standard_normal():
    numbers = GaussianNoise("k", 1.0, 0.0).draw(0, 200_000, 200_000)
    assert float(numbers.mean()) == pytest.approx(0, abs=0.01)
    assert float(numbers.var()) == pytest.approx(1, abs=0.02)
    assert float((numbers**4).mean()) == pytest.approx(3, abs=0.1)
    # No two draws are alike.
    assert len(numbers.unique()) == len(numbers)
    assert float((numbers[:-1] * numbers[1:]).mean()) == pytest.approx(0, abs=0.01)


def test_noise_of_other_keys_is_independent():
    first = GaussianNoise("a", 1.0, 0.0).draw(0, 50_000, 50_000)
    second = GaussianNoise("b", 1.0, 0.0).draw(0, 50_000, 50_000)
    assert float((first * second).mean()) == pytest.approx(0, abs=0.02)


def test_noise_leaves_other_generators_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    GaussianNoise("a", 1.0, 0.0).draw(5, 10, 100)
    assert torch.equal(torch.rand(2), expected)
