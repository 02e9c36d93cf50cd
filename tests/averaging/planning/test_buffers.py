"""Float buffers that are no weights come from the last checkpoint, weights beside them do not."""

import logging

import pytest
import torch
from helpers import same_bits, save_states
from torch import nn
from torch.nn.utils import prune

from ckptavg import average, open_run


def averaged(directory, states, **options):
    return average(open_run(save_states(directory, states)[0].parent), **options)


def last_ones(got, states):
    """Names of the floats that are the last checkpoint's, though they differ between them."""
    return {
        name
        for name, value in states[-1].items()
        if value.is_floating_point() and same_bits(got[name], value)
    }


def random_states(shapes, count=3, **fixed):
    """States of float tensors of some shapes, no two alike."""
    rng = torch.Generator().manual_seed(0)
    return [
        {name: torch.rand(shape, generator=rng) + 0.01 for name, shape in shapes.items()} | fixed
        for _ in range(count)
    ]


def test_pruning_masks_come_from_the_last_checkpoint(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    states = []
    for _ in range(3):
        prune.l1_unstructured(network[0], "weight", amount=0.25)
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        with torch.no_grad():
            network[0].weight_orig += 0.1
    got = averaged(tmp_path, states)
    assert same_bits(got["0.weight_mask"], states[-1]["0.weight_mask"])
    mean = torch.stack([state["0.weight_orig"].double() for state in states]).mean(0)
    assert torch.equal(got["0.weight_orig"], mean.float())
    assert "buffers are not averaged but taken from the last checkpoint: 0.weight_mask" in (
        caplog.text
    )


@pytest.mark.parametrize(
    "names",
    [
        ("parametrizations.weight.original", "parametrizations.weight.0.mask"),
        ("conv.weight", "conv.mask"),
        ("conv.weight_orig", "conv.weight_keep"),
        ("wrapped.module.weight", "wrapped.weight_mask"),
    ],
)
def test_masks_are_known_by_their_values(tmp_path, names):
    weight, mask = names
    states = random_states({weight: (8, 8), mask: (8, 8)})
    hard = [state | {mask: (state[mask] > 0.5).float()} for state in states]
    assert last_ones(averaged(tmp_path / "hard", hard), hard) == {mask}
    assert last_ones(averaged(tmp_path / "soft", states), states) == set()


def test_masks_all_equal_are_not_noted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    states = random_states({"w": (3, 3)}, attn_mask=torch.ones(3, 3).tril())
    averaged(tmp_path, states)
    assert "not averaged" not in caplog.text


def test_mask_is_converted_to_dtype(tmp_path):
    states = random_states({"w": (3, 3)}, mask=torch.ones(3, 3).tril())
    got = averaged(tmp_path, states, dtype="float16")
    assert same_bits(got["mask"], torch.ones(3, 3).tril().half())


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*averaging_c")
def test_fake_quantizer_buffers_come_from_the_last(tmp_path):
    from torch.ao.quantization import FakeQuantize, HistogramObserver

    states = []
    for low, high in ((-1.0, 1.0), (0.0, 6.0)):
        fake = FakeQuantize(HistogramObserver)
        fake(torch.tensor([low, high]))
        states.append({f"act.{name}": value.clone() for name, value in fake.state_dict().items()})
    got = averaged(tmp_path, states)
    assert all(same_bits(got[name], value) for name, value in states[-1].items())


def test_scales_beside_zero_points_come_from_the_last(tmp_path):
    shapes = {
        "conv.weight": (32, 3), "conv.weight_scale": (32,), "conv.act_scale": (1,),
        "conv.x_min": (1,), "conv.x_max": (1,), "norm.scale": (32,), "norm.minimum": (1,),
        "head.scale": (7,),
    }  # fmt: skip
    states = random_states(shapes)
    for i, state in enumerate(states):
        state["conv.weight_zero_point"] = torch.arange(32, dtype=torch.int32) + i
        state["conv.act_zero_point"] = torch.tensor([i], dtype=torch.int32)
        state["head.zero_point"] = torch.tensor([i], dtype=torch.int32)
    assert last_ones(averaged(tmp_path, states), states) == {
        "conv.weight_scale", "conv.act_scale", "conv.x_min", "conv.x_max",
    }  # fmt: skip


def test_buffers_not_averaged_are_noted(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    zero = torch.tensor([3], dtype=torch.int32)
    states = [{"a.scale": torch.tensor([s]), "a.zero_point": zero} for s in (0.1, 0.2)]
    averaged(tmp_path, states)
    assert "buffers are not averaged but taken from the last checkpoint: a.scale" in caplog.text


def test_scale_and_float_zero_point_are_averaged(tmp_path):
    states = random_states({"act.scale": (1,), "act.zero_point": (1,), "clip.min": (1,),
                            "clip.max": (1,)})  # fmt: skip
    assert last_ones(averaged(tmp_path, states), states) == set()


@pytest.mark.parametrize(
    ("shapes", "kept"),
    [
        (
            {"cluster_size": (9,), "embed_avg": (4, 9), "embed": (4, 9)},
            {"cluster_size", "embed_avg"},
        ),
        (
            {"q.cluster_size": (2, 9), "q.embed_avg": (2, 9, 4), "q.embed": (2, 9, 4)},
            {"q.cluster_size", "q.embed_avg"},
        ),
        (
            {"_ema_cluster_size": (9,), "_ema_w": (9, 4), "_embedding.weight": (9, 4)},
            {"_ema_cluster_size", "_ema_w"},
        ),
        ({"k_elem": (9,), "k_sum": (9, 4), "k": (9, 4)}, {"k_elem", "k_sum"}),
        ({"counts": (9,), "weight": (4, 4)}, set()),
        ({"bias": (9,), "weight": (9, 4), "weight_ema": (9, 4)}, set()),
    ],
)
def test_codebook_counts_and_sums_come_from_the_last(tmp_path, shapes, kept):
    states = random_states(shapes)
    assert last_ones(averaged(tmp_path, states), states) == kept


def test_float_counters_come_from_the_last(tmp_path):
    names = ("bn.num_batches_tracked", "ema.num_updates", "step")
    states = [
        {name: torch.tensor(100.0 * i) for name in names}
        | {"norm.count": torch.tensor([0.5 * i]), "w": torch.tensor([1.0 * i])}
        for i in (1, 3)
    ]
    got = averaged(tmp_path, states)
    assert {name: got[name].item() for name in got} == dict.fromkeys(names, 300.0) | {
        "norm.count": 1.0, "w": 2.0,
    }  # fmt: skip
