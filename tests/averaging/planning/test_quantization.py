"""Packed weights under any name are refused, and tables of integers are not."""

import json

import pytest
import torch
from helpers import same_bits, save, save_states
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptavg import average, open_run
from ckptavg.errors import UnsupportedTensorError


def integers(shape, dtype, seed):
    """Random integers of a type's whole range."""
    count = torch.Size(shape).numel() * dtype.itemsize
    rng = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count,), generator=rng, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def floats(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1


def quant_state(seed):
    text = json.dumps({"blocksize": 64, "quant_type": "nf4", "seed": seed})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


FORMATS = {
    "mlx": lambda s: {
        "q.weight": integers((8, 8), torch.uint32, s),
        "q.scales": floats((8, 2), s), "q.biases": floats((8, 2), s),
    },
    "quanto": lambda s: {
        "q.weight._data": integers((8, 64), torch.int8, s), "q.weight._scale": floats((8, 1), s),
    },
    "bitsandbytes": lambda s: {
        "q.weight": integers((256, 1), torch.uint8, s), "q.weight.absmax": floats((8,), s),
        "q.weight.quant_map": floats((16,), 0),
        "q.weight.quant_state.bitsandbytes__nf4": quant_state(s),
    },
    "bitsandbytes stored as bfloat16": lambda s: {
        "q.weight": (integers((256,), torch.uint8, s) & 0x3F).view(torch.bfloat16)[:, None],
        "q.weight.absmax": floats((8,), s), "q.weight.quant_map": floats((16,), 0),
        "q.weight.quant_state.bitsandbytes__nf4": quant_state(s),
    },
    "LLM.int8": lambda s: {
        "q.weight": integers((8, 16), torch.int8, s), "q.SCB": floats((8,), s),
    },
    "GPTQ": lambda s: {
        "q.qweight": integers((4, 16), torch.int32, s),
        "q.qzeros": integers((2, 2), torch.int32, s), "q.scales": floats((2, 16), s),
        "q.g_idx": torch.arange(32, dtype=torch.int32) // 16,
    },
    "HQQ": lambda s: {
        "q.W_q": integers((16, 64), torch.uint8, s),
        "q.scale": floats((1, 64), s), "q.zero": floats((1, 64), s),
    },
    "EETQ": lambda s: {
        "q.qweight": integers((16, 8), torch.int8, s), "q.weight_scales": floats((8,), s),
    },
    "AQLM": lambda s: {
        "q.codes": integers((8, 4, 1), torch.int16, s),
        "q.codebooks": floats((1, 256, 1, 8), s), "q.scales": floats((8, 1, 1, 1), s),
    },
    "VPTQ": lambda s: {
        "q.indices": integers((1, 8, 4), torch.int32, s),
        "q.centroids": floats((1, 256, 4), s), "q.weight_scale": floats((16,), s),
    },
    "torchao, flattened": lambda s: {
        "q.weight:qdata": integers((8, 16), torch.int8, s), "q.weight:scale": floats((8, 1), s),
    },
    "compressed-tensors": lambda s: {
        "q.weight_packed": integers((8, 2), torch.int32, s), "q.weight_scale": floats((8, 1), s),
    },
    "one scale per tensor": lambda s: {
        "q.kernel_int8": integers((8, 16), torch.int8, s), "q.kernel_scale": floats((), s),
    },
    "experts": lambda s: {
        "mlp.down_proj_blocks": integers((2, 4, 16), torch.uint8, s),
        "mlp.down_proj_scales": floats((2, 4), s),
    },
    "look-up tables": lambda s: {
        "q.packed": integers((4, 16), torch.int32, s), "q.lookup_table": floats((16, 16), s),
    },
    "Marlin": lambda s: {
        "q.B": integers((4, 64), torch.int32, s), "q.s": floats((2, 32), s),
        "q.workspace": torch.zeros(16, dtype=torch.int32),
    },
    "QuIP": lambda s: {
        "q.Qidxs": integers((16, 8), torch.int16, s), "q.Wscale": floats((), s),
        "q.SU": floats((64,), s), "q.SV": floats((16,), s),
    },
    "ExLlama": lambda s: {
        "q.trellis": integers((2, 2, 48), torch.int16, s),
        "q.suh": floats((32,), s), "q.svh": floats((32,), s),
    },
    "affine": lambda s: {
        "q.q": integers((8, 16), torch.int32, s), "q.delta": floats((8, 1), s),
    },
    "step sizes": lambda s: {
        "q.packed": integers((8, 16), torch.uint8, s), "q.step_size": floats((8, 1), s),
    },
    "wide integers": lambda s: {
        "q.weight_int": integers((8, 16), torch.int64, s), "q.scale": floats((8,), s),
    },
    "wide integers in groups": lambda s: {
        "q.codes": integers((8, 16), torch.int64, s), "q.scale": floats((8, 4), s),
    },
    "bytes in a row with a scale": lambda s: {
        "q.flat_int8": integers((64,), torch.int8, s), "q.flat_scale": floats((1,), s),
    },
    "scales within the bytes": lambda s: {"q.weight": integers((8, 34), torch.uint8, s)},
}  # fmt: skip


def run_of(directory, make, count=2):
    norm = [{"norm.weight": floats((8,), 100 + i)} for i in range(count)]
    states = [make(i) | norm[i] for i in range(count)]
    return open_run(save_states(directory, states, ".safetensors")[0].parent), states


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_quantized_weights_are_refused_in_any_format(tmp_path, make):
    run, _ = run_of(tmp_path, make)
    with pytest.raises(UnsupportedTensorError, match="quantized weights") as caught:
        average(run)
    assert caught.value.exit_code == 1
    assert "before quantization" in caught.value.remedy


@pytest.mark.parametrize("make", FORMATS.values(), ids=FORMATS)
def test_quantized_weights_remedy_excludes_them_with_scales(tmp_path, make):
    run, states = run_of(tmp_path, make)
    with pytest.raises(UnsupportedTensorError) as caught:
        average(run)
    got = average(run, exclude=caught.value.remedy.split("'")[1])
    packed = [name for name in states[-1] if name != "norm.weight"]
    assert all(same_bits(got[name], states[-1][name]) for name in packed)
    assert not torch.equal(got["norm.weight"], states[-1]["norm.weight"])


def test_quantized_weights_need_their_scales_excluded(tmp_path):
    run, _ = run_of(tmp_path, FORMATS["mlx"])
    with pytest.raises(UnsupportedTensorError, match="quantized"):
        average(run, exclude="q.weight")


@given(
    shape=st.lists(st.integers(4, 9), min_size=2, max_size=3),
    dtype=st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32]),
    names=st.sampled_from([("codes", "scale"), ("w_packed", "w_absmax"), ("_data", "_scale_inv")]),
    groups=st.integers(1, 4),
)
@settings(deadline=None, max_examples=25)
def test_quantized_weights_are_known_by_row_scales(tmp_path_factory, shape, dtype, names, groups):
    packed, scale = names
    run, _ = run_of(
        tmp_path_factory.mktemp("run"),
        lambda s: {
            f"a.b.{packed}": integers(shape, dtype, s),
            f"a.b.{scale}": floats((shape[0], groups) if groups < shape[1] else (shape[0],), s),
        },
    )
    with pytest.raises(UnsupportedTensorError, match="quantized"):
        average(run)


INDEX = torch.arange(2401).reshape(49, 49)
TABLES = {
    "positions beside a temperature": lambda s: {
        "attn.relative_position_index": INDEX, "attn.logit_scale": floats((3, 1, 1), s),
    },
    "a table beside its learnt scale": lambda s: {
        "hash_table": INDEX.int(), "hash_table_scale": floats((49,), s),
    },
    "bytes beside a learnt scale": lambda s: {
        "emb.codes": integers((9, 9), torch.uint8, 0), "emb.codes_scale": floats((9,), s),
    },
    "counters of tokens": lambda s: {
        "emb.token_counts": torch.arange(64) * s, "emb.scale": floats((64,), s),
    },
    "counters of batches": lambda s: {
        "bn.num_batches_tracked": torch.tensor(s), "bn.scale": floats((64,), s),
    },
    "a queue of labels": lambda s: {
        "queue_labels": integers((64, 1), torch.int64, s), "logit_scale": floats((), s),
        "queue_ptr": torch.tensor([s]),
    },
    "tokens of a queue": lambda s: {
        "text_queue": integers((16, 8), torch.int32, s), "logit_scale": floats((), s),
    },
    "zero points of channels": lambda s: {
        "act.zero_point": torch.arange(32, dtype=torch.int32) + s, "act.scale": floats((32,), s),
    },
    "zero points of groups": lambda s: {
        "act.zero_point": torch.arange(32, dtype=torch.int32).reshape(8, 4) + s,
        "act.scale": floats((8, 4), s),
    },
    "counters of tokens by groups": lambda s: {
        "emb.token_counts": torch.arange(64, dtype=torch.int32) * s, "emb.scale": floats((8,), s),
    },
    "edges": lambda s: {
        "graph.edge_index": integers((2, 30), torch.int64, s),
        "graph.edge_scale": floats((30,), s), "graph.weight": floats((8, 8), s),
    },
    "tokens of experts": lambda s: {
        "moe.tokens_per_expert": integers((4, 16), torch.int64, s),
        "moe.expert_scale": floats((16,), s), "moe.weight": floats((16, 8), s),
    },
    "bits of a grid": lambda s: {
        "grid.density_bits": integers((64,), torch.uint8, s), "grid.scale": floats((1,), s),
    },
    "a generator's state": lambda s: {
        "rng_state": integers((64,), torch.uint8, s), "scale": floats((), s),
    },
    "neighbours": lambda s: {"graph.neighbours": integers((32, 4), torch.int32, s)},
    "dropped positions": lambda s: {
        "drop.mask": integers((8, 8), torch.uint8, s) > 100, "drop.scale": floats((8,), s),
    },
}  # fmt: skip


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_integer_tables_come_from_the_last_checkpoint(tmp_path, make):
    run, states = run_of(tmp_path, make)
    got = average(run)
    whole = [name for name, value in states[-1].items() if not value.is_floating_point()]
    assert all(same_bits(got[name], states[-1][name]) for name in whole)
    assert not torch.equal(got["norm.weight"], states[-1]["norm.weight"])


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config.json", {"quantization_config": {"quant_method": "spqr"}}),
        ("config.json", {"quantization": {"group_size": 64, "bits": 4}}),
        ("quantize_config.json", {"bits": 4}),
        ("quant_config.json", {"w_bit": 4}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}),
    ],
)
def test_quantization_config_beside_weights_is_refused(tmp_path, name, config):
    for step in (1, 2):
        save(tmp_path / f"checkpoint-{step}" / "model.safetensors", {"w": floats((4,), step)})
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
        (tmp_path / f"checkpoint-{step}" / name).write_text(json.dumps(config))
    with pytest.raises(UnsupportedTensorError, match=f"quantized weights: .* in {name} says so"):
        average(open_run(tmp_path))


@pytest.mark.parametrize(
    "text", ['{"quantization_config": null}', '{"quantization": true}', "[]", "{", "{}"]
)
def test_quantization_config_without_content_is_ignored(tmp_path, text):
    for step in (1, 2):
        save(tmp_path / f"step_{step}.safetensors", {"w": floats((4,), step)})
    (tmp_path / "config.json").write_text(text)
    average(open_run(tmp_path))


@pytest.mark.parametrize(
    ("entries", "refused"),
    [
        ({"quantization_format": "int4"}, True),
        ({"_quantization_metadata": '{"layers": {}}'}, True),
        ({"quant_method": "none"}, False),
        ({"ss_quantization": "int8"}, False),
        ({"quantity": "7"}, False),
    ],
)
def test_quantization_in_header_is_refused(tmp_path, entries, refused):
    for step in (1, 2):
        save_file({"w": floats((4,), step)}, tmp_path / f"step_{step}.safetensors", entries)
    if refused:
        with pytest.raises(UnsupportedTensorError, match=r"quantized weights: .* in its header"):
            average(open_run(tmp_path))
    else:
        average(open_run(tmp_path))


def test_quantization_check_reads_few_bytes_of_large_tables(tmp_path, monkeypatch):
    from helpers import counted_reads

    table = torch.arange(1_000_000, dtype=torch.int32).reshape(1000, 1000)
    paths = save_states(
        tmp_path, [{"t.index": table, "t.scale": floats((1000,), i)} for i in (1, 2)]
    )
    run = open_run(tmp_path)
    read = counted_reads(monkeypatch)
    from ckptavg.averaging.plan import plan_average

    plan_average(run)
    assert len(paths) == 2
    assert 0 < sum(read.values()) < 200_000
