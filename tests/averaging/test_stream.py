"""The engine against sums by hand: the same bits whatever the blocks, threads and layouts."""

import math
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import average_by_hand, opened, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import COMPLEX, FLOATS, runs
from small_cuts import CUTS, cut_small

from ckptavg.averaging import stream as stream_module
from ckptavg.averaging.planning.tensor_plan import Rules, make_plan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import start_threads, stream
from ckptavg.errors import CheckpointError, NonFiniteError
from ckptavg.outputs.sinks import MemorySink


def widest(dtypes):
    """The narrowest type that holds the values of all."""
    kinds = set(dtypes)
    if kinds == {torch.float16, torch.bfloat16}:
        return torch.float32
    return max(kinds, key=lambda dtype: dtype.itemsize)


def compute(checkpoints, coefficients, rules=None, **options):
    """A plan's state dict and what the stream noticed."""
    plan = make_plan(checkpoints, coefficients, rules or Rules())
    sink = MemorySink(plan.outputs)
    keep = options.pop("keep_nonfinite", False)
    (result,) = stream([Job(plan.tensors, sink, keep)], **options).results
    return sink.state_dict, result


@settings(derandomize=True, deadline=None, max_examples=250)
@given(run=runs(), **CUTS)
def test_stream_equals_sums_by_hand_in_every_bit(run, block, strided_block, task, threads):
    states, coefficients = run
    with cut_small(strided_block=strided_block, task=task) as directory:
        checkpoints = opened(directory, states)
        found, _ = compute(
            checkpoints, coefficients, keep_nonfinite=True, block=block, threads=threads
        )
    assert list(found) == list(states[-1])
    for name, tensor in found.items():
        tensors = [state[name] for state in states]
        used = [t.dtype for a, t in zip(coefficients, tensors, strict=True) if a != 0]
        expected = average_by_hand(tensors, coefficients, widest(used))
        assert same_bits(tensor, expected), f"{name}: {tensor} is not {expected}"


def big_run(directory):
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "long": torch.randn(300_001, generator=generator),
            "rows": torch.randn(300, 400, generator=generator).t(),
            "short": torch.randn(7, generator=generator).bfloat16(),
        }
        for _ in range(3)
    ]
    return states, opened(directory, states)


@pytest.mark.parametrize("threads", [None, 1, 4])
@pytest.mark.parametrize("block", [999, stream_module.BLOCK, 10**7])
def test_stream_bits_do_not_depend_on_blocks_or_threads(tmp_path, monkeypatch, block, threads):
    monkeypatch.setattr(stream_module, "TASK", 50_000)
    monkeypatch.setattr(stream_module, "STRIDED_BLOCK", 7_777)
    states, checkpoints = big_run(tmp_path)
    found, _ = compute(checkpoints, [0.3, 0.5, 0.1], block=block, threads=threads)
    for name, tensor in found.items():
        terms = [a * s[name].double().numpy() for a, s in zip([0.3, 0.5, 0.1], states, strict=True)]
        mean = ((terms[0] + terms[1]) + terms[2]) / math.fsum([0.3, 0.5, 0.1])
        assert same_bits(tensor, torch.from_numpy(mean).to(tensor.dtype)), name


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(0, 2**32))
def test_stream_rounds_float32_mean_once(count, seed):
    """In [1, 2) sums are exact in float64: the float32 nearest to the true mean must come out."""
    rng = np.random.default_rng(seed)
    states = [{"w": torch.from_numpy(rng.uniform(1, 2, 20).astype("f4"))} for _ in range(count)]
    with tempfile.TemporaryDirectory() as directory:
        found, _ = compute(opened(Path(directory), states), [1.0] * count)
    for i, value in enumerate(found["w"].tolist()):
        exact = sum(Fraction(s["w"][i].item()) for s in states) / count
        neighbours = [float(np.nextafter(np.float32(value), np.float32(end))) for end in (0, 4)]
        error = abs(Fraction(value) - exact)
        assert all(error <= abs(Fraction(neighbour) - exact) for neighbour in neighbours)


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX])
def test_stream_keeps_bits_of_one_checkpoint(tmp_path, dtype):
    tensor = torch.randn(40, dtype=dtype)
    for coefficient in (1.0, 2.0, 0.25):
        found, _ = compute(opened(tmp_path, [{"w": tensor}]), [coefficient])
        assert same_bits(found["w"], tensor)


@pytest.mark.parametrize("dtype", FLOATS)
def test_stream_keeps_signed_zeros_and_denormals(tmp_path, dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tensor = torch.tensor([-0.0, 0.0, smallest, -smallest], dtype=torch.float64).to(dtype)
    assert tensor[2] > 0
    found, _ = compute(opened(tmp_path, [{"w": tensor}] * 3), [1.0] * 3)
    assert same_bits(found["w"], tensor)


def test_stream_keeps_denormals_in_a_flushing_process(tmp_path):
    tensor = torch.tensor([1e-40, 5e-324], dtype=torch.float64)
    states = [{"w": tensor, "f": tensor.float()}] * 3
    checkpoints = opened(tmp_path, states)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        found, _ = compute(checkpoints, [1.0, 2.0, 0.5], threads=2)
        flushed = (torch.tensor(1e-310, dtype=torch.float64) * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushed, "the calling thread flushes as before"
    assert found["w"].tolist() == tensor.tolist()
    assert found["f"].tolist() == tensor.float().tolist()


@pytest.mark.parametrize(
    "mode", [lambda: torch.device("meta"), torch.inference_mode], ids=["device", "inference"]
)
def test_stream_gives_ordinary_tensors_in_any_torch_mode(tmp_path, mode):
    tied = torch.tensor([1.5, -2.0])
    states = [{"w": tied * n, "v": tied, "u": tied, "s": torch.tensor(n)} for n in (1.0, 2.0)]
    checkpoints = opened(tmp_path, states)
    expected, _ = compute(checkpoints, [1.0, 1.0])
    with mode():
        found, _ = compute(checkpoints, [1.0, 1.0])
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.is_inference() for tensor in found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stream_sums_do_not_overflow_on_the_way(tmp_path, dtype):
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([largest, -largest]).to(dtype)
    found, _ = compute(opened(tmp_path, [{"w": tensor}] * 16), [1.0] * 16)
    assert same_bits(found["w"], tensor)


def test_stream_keeps_small_terms_beside_large_ones(tmp_path):
    states = [{"w": torch.tensor([x])} for x in (1e8, 1.0, -1e8, 1.0)]
    found, _ = compute(opened(tmp_path, states), [1.0] * 4)
    assert found["w"].item() == 0.5


def test_stream_does_not_read_coefficient_0(tmp_path):
    states = [{"w": torch.tensor([x])} for x in (math.nan, 1.0, math.inf, 2.0)]
    checkpoints = opened(tmp_path, states)
    (tmp_path / "epoch_1.pt").unlink()
    found, _ = compute(checkpoints, [0.0, 1.0, 0.0, 1.0])
    assert found["w"].item() == 1.5


# What is not finite


def one_weight(directory, *columns, dtype=torch.float32):
    return opened(directory, [{"w": torch.tensor(c, dtype=dtype)} for c in columns])


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("columns", "culprit", "kind"),
    [
        ([[1, 2], [1, NAN], [1, 2]], 2, "NaN"),
        ([[1, 2], [1, 2], [1, INF]], 3, "infinite"),
        ([[1, -INF], [1, 2], [1, -INF]], 1, "infinite"),
        ([[1, INF], [1, INF], [1, -INF]], 1, "infinite"),
        ([[1, -INF], [1, INF], [1, -INF]], 1, "infinite"),
        ([[1, INF], [1, NAN], [1, INF]], 1, "infinite"),
        ([[1, NAN], [1, 2], [1, 3]], 1, "NaN"),
    ],
)
def test_nonfinite_error_names_tensor_and_checkpoint(tmp_path, dtype, columns, culprit, kind):
    checkpoints = one_weight(tmp_path, *columns, dtype=dtype)
    with pytest.raises(NonFiniteError, match=rf"w is {kind} in .*epoch_{culprit}\.pt.*keep"):
        compute(checkpoints, [1.0] * 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("coefficients", [[1.0, 1.0, 1.0], [-1.0, 2.0, 1.0], [0.2, 0.0, 0.8]])
def test_nonfinite_mask_same_in_all_checkpoints_stays(tmp_path, dtype, coefficients):
    mask = [1.0, -INF, INF, NAN]
    found, result = compute(one_weight(tmp_path, *[mask] * 3, dtype=dtype), coefficients)
    assert same_bits(found["w"], torch.tensor(mask, dtype=dtype))
    assert result.nonfinite == set()


@pytest.mark.parametrize("dtype", COMPLEX)
def test_nonfinite_mask_of_complex_is_compared_by_part(tmp_path, dtype):
    checkpoints = one_weight(tmp_path, [complex(1, -INF)], [complex(3, -INF)], dtype=dtype)
    found, _ = compute(checkpoints, [1.0, 1.0])
    assert (found["w"].real.item(), found["w"].imag.item()) == (2.0, -INF)
    with pytest.raises(NonFiniteError, match=r"w is infinite in .*epoch_1\.pt"):
        compute(one_weight(tmp_path, [complex(1, -INF)], [complex(1, 2)], dtype=dtype), [1.0, 1.0])


def test_nonfinite_mask_does_not_hide_an_error(tmp_path):
    with pytest.raises(NonFiniteError, match=r"w is NaN in .*epoch_2\.pt"):
        compute(one_weight(tmp_path, [-INF, 1.0], [-INF, NAN]), [1.0, 1.0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_keep_nonfinite_keeps_and_reports_values(tmp_path, dtype):
    columns = [[1, 2, INF, INF, -INF], [3, NAN, 1, -INF, -INF]]
    found, result = compute(
        one_weight(tmp_path, *columns, dtype=dtype), [1.0, 1.0], keep_nonfinite=True
    )
    assert same_bits(found["w"], torch.tensor([2, NAN, INF, NAN, -INF], dtype=dtype))
    assert result.nonfinite == {"w"}


def test_dtype_overflow_suggests_a_wider_type(tmp_path):
    checkpoints = one_weight(tmp_path, [1.0, 7e4], [1.0, 7e4])
    with pytest.raises(NonFiniteError, match=r"w is too large for float16.*`dtype=.float32.`"):
        compute(checkpoints, [1.0, 1.0], Rules(dtype="float16"))
    found, result = compute(checkpoints, [1.0, 1.0], Rules(dtype="float16"), keep_nonfinite=True)
    assert found["w"].tolist() == [1.0, INF]
    assert result.nonfinite == {"w"}


def test_nonfinite_mask_survives_a_narrower_dtype(tmp_path):
    found, _ = compute(
        one_weight(tmp_path, [-INF, 1], [-INF, 3]), [1.0, 1.0], Rules(dtype="float16")
    )
    assert same_bits(found["w"], torch.tensor([-INF, 2], dtype=torch.float16))


def test_float64_overflow_is_an_error(tmp_path):
    with pytest.raises(NonFiniteError, match="w is too large for float64"):
        compute(one_weight(tmp_path, [1.7e308], [1.7e308], dtype=torch.float64), [1.0, 1.0])


# Integers


def test_differing_integers_are_reported_by_name(tmp_path):
    states = [
        {
            "same": torch.arange(100),
            "one": torch.arange(100) + (torch.arange(100) == 77) * (i == 1),
            "flag": torch.tensor(i == 0),
            "w": torch.tensor([float(i)]),
        }
        for i in range(3)
    ]
    found, result = compute(opened(tmp_path, states), [1.0] * 3, block=10)
    assert result.differing == {"one", "flag"}
    assert all(same_bits(found[name], states[-1][name]) for name in ("same", "one", "flag"))


def test_differing_integers_of_two_widths_go_by_value(tmp_path):
    states = [
        {"same": torch.tensor([5], dtype=dtype), "other": torch.tensor([value], dtype=dtype)}
        for dtype, value in ((torch.int32, 5), (torch.int64, 6))
    ]
    found, result = compute(opened(tmp_path, states), [1.0, 1.0])
    assert same_bits(found["other"], torch.tensor([6]))
    assert result.differing == {"other"}


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int8", "bool"])
def test_differing_integers_are_reported_in_any_dtype(tmp_path, dtype):
    states = [
        {
            "same": torch.ones(3, dtype=getattr(torch, dtype)),
            "other": torch.full((3,), i, dtype=getattr(torch, dtype)),
        }
        for i in (0, 1)
    ]
    found, result = compute(opened(tmp_path, states), [1.0, 1.0])
    assert found["other"].tolist() == [1, 1, 1]
    assert result.differing == {"other"}


def test_differing_integers_are_compared_beyond_ties_of_the_last(tmp_path):
    shared = torch.ones(3, dtype=torch.int64)
    loose = {"same": torch.ones(3, dtype=torch.int64), "other": torch.zeros(3, dtype=torch.int64)}
    states = [loose, {"same": shared, "other": shared}]
    _, result = compute(opened(tmp_path, states), [1.0, 1.0])
    assert result.differing == {"other"}


# Progress and failure


def test_progress_rises_to_bytes_of_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "TASK", 5000)
    _, checkpoints = big_run(tmp_path)
    calls = []
    compute(checkpoints, [1.0] * 3, progress=lambda *call: calls.append(call))
    total = 3 * (4 * 300_001 + 4 * 300 * 400 + 2 * 7)
    done = [d for d, _ in calls]
    assert {of for _, of in calls} == {total}
    assert done[0] == 0
    assert done[-1] == total
    assert done == sorted(done)
    assert len(done) > 3


def test_progress_is_called_from_the_calling_thread(tmp_path):
    _, checkpoints = big_run(tmp_path)
    callers = set()
    compute(checkpoints, [1.0] * 3, progress=lambda *_: callers.add(threading.current_thread()))
    assert callers == {threading.current_thread()}


def test_stream_reads_tied_tensors_once(tmp_path):
    weight = torch.ones(10)
    checkpoints = opened(tmp_path, [{"a": weight, "b": weight}] * 2)
    calls = []
    compute(checkpoints, [1.0, 1.0], progress=lambda *call: calls.append(call))
    assert calls[-1] == (80, 80)


def test_stream_leaves_no_thread_after_a_failure(tmp_path):
    checkpoints = one_weight(tmp_path, [1.0], [NAN])
    before = threading.active_count()
    with pytest.raises(NonFiniteError):
        compute(checkpoints, [1.0, 1.0], threads=3)
    assert threading.active_count() == before


def test_stream_error_names_a_truncated_file(tmp_path):
    checkpoints = opened(tmp_path, [{"w": torch.ones(1000)}] * 2)
    with open(tmp_path / "epoch_2.pt", "r+b") as file:
        file.truncate(2000)
    with pytest.raises(CheckpointError, match=r"epoch_2\.pt ends before"):
        compute(checkpoints, [1.0, 1.0])


def test_stream_error_names_a_removed_file(tmp_path):
    checkpoints = opened(tmp_path, [{"w": torch.ones(10)}] * 2)
    (tmp_path / "epoch_1.pt").unlink()
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt cannot be read"):
        compute(checkpoints, [1.0, 1.0])


def test_start_threads_waits_for_work_after_an_interrupt(monkeypatch):
    usual, signals, ended = ThreadPoolExecutor.shutdown, [KeyboardInterrupt], []

    def interrupted(pool, *args, **options):
        if signals:
            raise signals.pop()
        usual(pool, *args, **options)

    def work():
        time.sleep(0.1)
        ended.append(True)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", interrupted)
    with pytest.raises(KeyboardInterrupt), start_threads(1) as pool:
        pool.submit(work)
    assert ended
