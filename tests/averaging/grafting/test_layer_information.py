"""Information in a layer's weights beside the worked value and numpy's histogram."""

import math

import numpy as np
import pytest
import torch
from helpers import opened

from ckptavg.averaging.grafting.information import measure_information
from ckptavg.errors import NonFiniteError


def measured(directory, value, measure="entropy", bins=10):
    (checkpoint,) = opened(directory, [{"w": value}])
    return measure_information(checkpoint.tensors["w"], checkpoint, "w", measure, bins)


def entropy_by_numpy(values, bins):
    """Entropy of numpy's histogram, whose last bin is closed."""
    counts, _ = np.histogram(values.double().flatten().numpy(), bins)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 1, 2, 3], 1.3862944), ([0, 0, 0, 3], 0.5623351), ([5, 5, 5], 0.0), ([7], 0.0)],
)
def test_entropy_has_worked_value(tmp_path, values, expected):
    assert measured(tmp_path, torch.tensor(values).float()) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("bins", [2, 10, 33])
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (41, 17), (70_001,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_entropy_is_that_of_numpy(tmp_path, bins, shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert measured(tmp_path, values, bins=bins) == pytest.approx(
        entropy_by_numpy(values, bins), rel=1e-12
    )


def test_entropy_of_view_is_that_of_its_values(tmp_path):
    values = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    view = values.T.contiguous().T[:, ::2]
    assert measured(tmp_path, view) == pytest.approx(entropy_by_numpy(view, 10))


def test_entropy_of_complex_numbers_is_that_of_their_parts(tmp_path):
    values = torch.randn(50, 2, generator=torch.Generator().manual_seed(1))
    found = measured(tmp_path, torch.view_as_complex(values))
    assert found == pytest.approx(entropy_by_numpy(values, 10))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40_000])
def test_l1_norm_is_sum_of_absolute_values(tmp_path, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(1))
    expected = math.fsum(abs(value) for value in values.tolist())
    assert measured(tmp_path, values, "l1") == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_information_of_non_finite_values_is_refused(tmp_path, value):
    with pytest.raises(NonFiniteError, match=r"w is not finite in .*epoch"):
        measured(tmp_path, torch.tensor([1.0, value]))
