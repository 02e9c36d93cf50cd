"""Adapters written by hand: their mean, computed by hand. PEFT's own are in tests/interop."""

import logging
import math

import pytest
import torch
from adapters import HEAD, A, B, factors, write_adapters
from helpers import average_by_hand, same_bits, save

from ckptavg import average, open_run
from ckptavg.averaging.stream import stream
from ckptavg.errors import CheckpointError, UnsupportedTensorError


def product(state, scale):
    return scale * state[B].double() @ state[A].double()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("weights", [[1, 1, 1], [1, 2, 5], [0, 3, 1], [-1, 2, 2]])
def test_lora_average_is_mean_of_products(tmp_path, suffix, weights):
    states = [factors(i, torch.float64) for i in range(3)]
    got = average(open_run(write_adapters(tmp_path, states, suffix)), weights=weights)
    count = sum(w != 0 for w in weights)
    mean = sum(w * product(s, 2) for w, s in zip(weights, states, strict=True)) / sum(weights)
    torch.testing.assert_close(product(got, 2 / count), mean, rtol=1e-14, atol=1e-14)
    head = average_by_hand([s[HEAD] for s in states], weights, torch.float64)
    assert same_bits(got[HEAD], head)


def test_lora_average_stacks_transposed_factors(tmp_path):
    """As a view of another memory order, which a .bin file keeps."""
    states = [{n: t.t().contiguous().t() for n, t in factors(i).items()} for i in range(2)]
    got = average(open_run(write_adapters(tmp_path, states, ".bin")))
    assert torch.equal(got[A], torch.cat([s[A] for s in states]))
    assert torch.equal(got[B], torch.cat([s[B] for s in states], 1))


def test_lora_average_of_one_adapter_is_itself(tmp_path):
    state = factors(0)
    got = average(open_run(write_adapters(tmp_path, [state])))
    assert all(same_bits(got[name], value) for name, value in state.items())


def test_lora_average_rounds_once(tmp_path):
    states = [factors(i, torch.bfloat16) for i in range(3)]
    got = average(
        open_run(write_adapters(tmp_path, states)), weights=[0.1, 0.2, 0.4], dtype="float16"
    )
    divisor = math.fsum([0.1, 0.2, 0.4]) / 3
    exact = [w * s[B].double() / divisor for w, s in zip([0.1, 0.2, 0.4], states, strict=True)]
    assert same_bits(got[B], torch.cat(exact, 1).half())
    assert same_bits(got[A], torch.cat([s[A] for s in states]).half())


@pytest.mark.parametrize("weights", [None, [1, 2, 3]])
def test_lora_progress_counts_bytes_once(tmp_path, weights):
    from ckptavg.averaging.compute import compute_state_dicts
    from ckptavg.averaging.plan import plan_average

    states = [factors(i) for i in range(3)]
    planned = plan_average(open_run(write_adapters(tmp_path, states)), weights=weights)
    calls = []
    compute_state_dicts([planned], progress=lambda *call: calls.append(call))
    total = sum(t.nbytes for s in states for t in s.values())
    assert calls[-1] == (total, total)


def test_lora_bits_do_not_depend_on_blocks_or_threads(tmp_path):
    from ckptavg.averaging.plan import plan_average
    from ckptavg.averaging.read_groups import Job
    from ckptavg.outputs.sinks import MemorySink

    generator = torch.Generator().manual_seed(0)
    states = [
        {A: torch.randn(40, 3000, generator=generator), B: torch.randn(2000, 40)} for _ in range(4)
    ]
    run = open_run(write_adapters(tmp_path, states, r=40))
    plan = plan_average(run, weights=[1, 2, 3, 4]).plan
    results = []
    for block, threads in [(1 << 15, 1), (1 << 21, 4)]:
        sink = MemorySink(plan.outputs)
        stream([Job(plan.tensors, sink)], block=block, threads=threads)
        results.append(sink.state_dict)
    assert all(same_bits(results[0][name], results[1][name]) for name in (A, B))
    blocks = [w * s[B].double() / 2.5 for w, s in zip([1, 2, 3, 4], states, strict=True)]
    assert torch.equal(results[0][B], torch.cat(blocks, 1).float())


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"peft_type": None}, "of type a NoneType"),
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"init_lora_weights": "corda"}, "started by corda"),
    ],
)
def test_lora_average_refuses_other_kinds_of_adapter(tmp_path, config, why):
    with pytest.raises(UnsupportedTensorError, match=why):
        average(open_run(write_adapters(tmp_path, [factors(0)], **config)))


@pytest.mark.parametrize(
    "config", [{"r": None}, {"r": "2"}, {"r": 0}, {"lora_alpha": None}, {"rank_pattern": [1]},
               {"rank_pattern": {"l": 1.5}}, {"alpha_pattern": {"l": "x"}}],
)  # fmt: skip
def test_adapter_config_without_numbers_is_refused(tmp_path, config):
    with pytest.raises(CheckpointError, match=r"adapter_config.json has no whole ranks"):
        average(open_run(write_adapters(tmp_path, [factors(0)], **config)))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_adapter_config_without_object_is_refused(tmp_path, text):
    run = write_adapters(tmp_path, [factors(0)])
    (run / "step_1" / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config.json"):
        open_run(run)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({A: torch.ones(2, 5)}, "two matrices"),
        ({A: torch.ones(2, 5), B: torch.ones(3, 2, dtype=torch.int8)}, "two matrices"),
        ({HEAD: torch.ones(3, 3)}, "has no A and B"),
        (factors(0) | {"m.l.lora_magnitude_vector": torch.ones(3)}, "lora_magnitude_vector"),
    ],
)
def test_lora_factors_not_whole_are_refused(tmp_path, state, why):
    with pytest.raises(UnsupportedTensorError, match=why):
        average(open_run(write_adapters(tmp_path, [state])))


def test_lora_of_different_bases_is_noted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    run = write_adapters(tmp_path, [factors(0), factors(1)], base_model_name_or_path="one/base")
    path = run / "step_1" / "adapter_config.json"
    path.write_text(path.read_text().replace("one/", "other/"))
    average(open_run(run))
    assert "different base models: one/base, other/base" in caplog.text


def test_lora_layers_in_a_whole_model_are_noted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    for i in (1, 2):
        names = {"l.base_layer.weight": (3, 5), "l.lora_A.default.weight": (2, 5),
                 "l.lora_B.default.weight": (3, 2)}  # fmt: skip
        save(tmp_path / f"{i}.pt", {name: torch.randn(shape) for name, shape in names.items()})
    average(open_run(tmp_path))
    assert "is not the mean of BA" in caplog.text
    caplog.clear()
    average(open_run(tmp_path).last(1))
    assert "BA" not in caplog.text
