"""Runs of random tensors: every type and layout, ties, extreme values, and coefficients."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COMPLEX = [torch.complex64, torch.complex128]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def random_values(rng, dtype, shape):
    """Random values, zeros of both signs, denormals and huge ones among them."""
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, shape).astype(bool))
    if not dtype.is_floating_point and not dtype.is_complex:
        info = torch.iinfo(dtype)
        drawn = rng.integers(info.min, info.max, shape, dtype=np.int64, endpoint=True)
        return torch.from_numpy(np.asarray(drawn)).to(dtype)
    if dtype.is_complex:
        return torch.complex(*(random_values(rng, dtype.to_real(), shape) for _ in range(2)))
    info = torch.finfo(dtype)
    scales = np.array([1.0, 0.0, -0.0, info.smallest_normal, info.max])
    scale = rng.choice(scales, shape, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    return torch.from_numpy(np.asarray(rng.uniform(-1, 1, shape) * scale)).to(dtype)


def lay_out(tensor, layout):
    """Give the same values other strides and offsets in their storage."""
    if layout == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and tensor.ndim and tensor.numel():
        room = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), dtype=tensor.dtype)
        view = room[..., 2 : 2 + 2 * tensor.shape[-1] : 2]
        return view.copy_(tensor)
    if layout == "expanded" and tensor.ndim and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    return tensor


@st.composite
def coefficient_vectors(draw, count):
    """All alike; or any numbers, zero and negative ones too, with a positive sum."""
    kind = draw(st.sampled_from(["uniform", "positive", "signed"]))
    if kind == "uniform":
        return [1.0] * count
    low = 0.0 if kind == "positive" else -2.0
    found = [draw(st.floats(low, 3, allow_subnormal=False)) for _ in range(count)]
    if math.fsum(found) < 1e-3:
        found[draw(st.integers(0, count - 1))] += 10.0
    return found


@st.composite
def runs(draw):
    """The states of a run, and coefficients for it."""
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = st.sampled_from(["plain", "plain", "transposed", "sliced", "expanded"])
    kinds = st.sampled_from([FLOATS, FLOATS, COMPLEX, INTEGERS])
    states = [{} for _ in range(count)]
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
        dtypes = draw(kinds)
        mixed = dtypes is not INTEGERS and draw(st.booleans())
        one = draw(st.sampled_from(dtypes))
        for state in states:
            dtype = draw(st.sampled_from(dtypes)) if mixed else one
            tensor = random_values(rng, dtype, shape)
            state[f"t{i}"] = lay_out(tensor, draw(layouts))
            if draw(st.integers(0, 3)):
                state[f"t{i}.tied"] = state[f"t{i}"]
            else:
                state[f"t{i}.tied"] = random_values(rng, dtype, shape)
    return states, draw(coefficient_vectors(count))
