"""Several networks in one file: each is averaged, and stands in the output where it stood."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import ckptavg
from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.network_entries import is_average

STEPS = (1, 2, 6)


def network(value: float, size: int = 3, prefix: str = "") -> dict[str, torch.Tensor]:
    weight, bias = torch.full((size, 2), value), torch.full((size,), -value)
    return {f"{prefix}weight": weight, f"{prefix}bias": bias}


def is_mean(state, size: int = 3, prefix: str = "", scale: float = 1.0) -> bool:
    """Whether a state dict is what ``network`` gives for the mean of the steps."""
    mean = network(scale * sum(STEPS) / len(STEPS), size, prefix)
    return all(torch.equal(state[name], tensor) for name, tensor in mean.items())


@pytest.fixture
def averaged(tmp_path):
    """Save a run of what a function gives for each step; the file that its average is."""

    def average(make, name="out.pth", key=None):
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        for step in STEPS:
            torch.save(make(float(step)), run / f"step_{step}.pt")
        ckptavg.average(ckptavg.open_run(run, key=key), out=tmp_path / name)
        return tmp_path / name

    return average


def saved(tmp_path, value, key=None):
    torch.save(value, tmp_path / "checkpoint.pt")
    return open_checkpoint(tmp_path / "checkpoint.pt", key)


def two(value: float) -> dict[str, object]:
    return {"encoder": network(value), "decoder": network(10 * value, 4), "epoch": 3}


# --------------------------------------------------------------------------------------- the output


def test_networks_are_averaged_into_their_own_entries(averaged):
    average = torch.load(averaged(two), weights_only=True)
    assert list(average) == ["encoder", "decoder", "epoch", "ckptavg"]
    assert is_mean(average["encoder"])
    assert is_mean(average["decoder"], 4, scale=10)


def test_networks_in_pt_file_have_state_dict_besides(averaged):
    average = torch.load(averaged(two, "out.pt"), weights_only=True)
    assert is_mean(average["state_dict"], prefix="encoder.")
    assert is_mean(average["state_dict"], 4, prefix="decoder.", scale=10)
    assert is_mean(average["encoder"])


def test_networks_in_safetensors_have_dotted_names(averaged):
    with safe_open(averaged(two, "out.safetensors"), "pt") as file:
        average = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(average) == 4
    assert is_mean(average, prefix="encoder.")
    assert is_mean(average, 4, prefix="decoder.", scale=10)


def test_networks_of_average_open_as_inputs(averaged, tmp_path):
    reopened = open_checkpoint(averaged(two))
    original = open_checkpoint(tmp_path / "run" / "step_1.pt")
    assert reopened.is_average
    assert reopened.networks == original.networks == ("encoder", "decoder")
    assert list(reopened.tensors) == list(original.tensors)


def test_networks_are_picked_by_key(averaged):
    average = torch.load(averaged(two, key="decoder"), weights_only=True)
    assert is_mean(average["decoder"], 4, scale=10)
    assert "encoder" not in average


def test_networks_of_gan_exclude_optimizers_and_averages(averaged, tmp_path):
    def gan(value):
        module = nn.Linear(2, 3)
        optimizer = torch.optim.Adam(module.parameters())
        module(torch.rand(1, 2)).sum().backward()
        optimizer.step()
        return {
            "G": network(value),
            "D": network(2 * value, 5),
            "G_ema": network(0.5),
            "optim_G": optimizer.state_dict(),
            "D_opt": optimizer.state_dict(),
            "log_alpha": torch.tensor(0.25),
            "rng": {"cpu": torch.get_rng_state()},
        }

    average = torch.load(averaged(gan), weights_only=True)
    assert list(average) == ["G", "D", "log_alpha", "ckptavg"]
    assert is_mean(average["G"])
    assert is_mean(average["D"], 5, scale=2)
    notes = open_checkpoint(tmp_path / "run" / "step_1.pt").notes
    assert notes[0].startswith("2 networks, each averaged at its own place: G, D")
    assert "left out as running averages: G_ema" in notes[1]


NESTED = {
    "below one entry": lambda a, b: {"models": {"enc": a, "dec": b}, "step": 3},
    "with a trainer each": lambda a, b: {"G": {"model": a, "lr": 0.1}, "D": {"model": b}},
    "under a known name": lambda a, b: {"state_dict": {"actor": a, "critic": b}},
    "in a list": lambda a, b: [a, b],
    "in a list below an entry": lambda a, b: {"members": [a, b, None]},
    "by numbers": lambda a, b: {0: a, 1: b},
    "one in the other": lambda a, b: {**a, "head": b},
    "one in the other, known": lambda a, b: {"model": {**a, "head": b}, "epoch": 1},
    "teacher and student": lambda a, b: {"student": a, "teacher": b, "args": {"lr": 0.1}},
    "a tuple": lambda a, b: (a, {"net": b}),
}


def leaves(value, path=""):
    """The tensors of a tree, by path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, (list, tuple)) else pairs
    return {p: t for name, part in pairs for p, t in leaves(part, f"{path}/{name}").items()}


@pytest.mark.parametrize("nest", NESTED.values(), ids=NESTED)
def test_networks_are_averaged_in_any_nesting(averaged, nest):
    average = torch.load(averaged(lambda v: nest(network(v), network(5 * v, 4))))
    expected = nest(network(3.0), network(15.0, 4))
    assert isinstance(average, type(expected))
    state, mean = leaves(average), leaves(expected)
    assert list(state) == list(mean)
    assert all(torch.equal(state[path], mean[path]) for path in mean)


def test_networks_lose_wrappers_but_keep_them_in_output(averaged, tmp_path):
    def wrapped(value):
        return {"actor": network(value, prefix="module."), "critic": network(value, 4)}

    average = torch.load(averaged(wrapped), weights_only=True)
    assert is_mean(average["actor"], prefix="module.")
    names = list(open_checkpoint(tmp_path / "run" / "step_1.pt").tensors)
    assert names == ["actor.weight", "actor.bias", "critic.weight", "critic.bias"]


def test_networks_sharing_tensor_are_tied_in_output(averaged):
    def tied(value):
        shared = network(value)
        return {"encoder": shared, "decoder": {"embed": shared["weight"], **network(value, 4)}}

    average = torch.load(averaged(tied), weights_only=True)
    assert torch.equal(average["decoder"]["embed"], average["encoder"]["weight"])
    assert average["decoder"]["embed"].data_ptr() == average["encoder"]["weight"].data_ptr()


def test_networks_may_be_pickled_modules(averaged):
    def modules(value):
        encoder, decoder = nn.Linear(2, 3), nn.Linear(2, 4)
        encoder.load_state_dict(network(value))
        decoder.load_state_dict(network(value, 4))
        return {"encoder": encoder, "decoder": decoder}

    average = torch.load(averaged(modules), weights_only=True)
    assert is_mean(average["encoder"])
    assert is_mean(average["decoder"], 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_networks_of_dcp_keep_their_places(tmp_path):
    for step in STEPS:
        dcp.save(
            {"generator": network(float(step)), "critic": network(2.0 * step, 4), "step": step},
            checkpoint_id=tmp_path / "run" / f"step_{step}",
        )
    run = ckptavg.open_run(tmp_path / "run")
    assert run.checkpoints[0].networks == ("generator", "critic")
    ckptavg.average(run, out=tmp_path / "average")
    state = {"generator": network(0.0), "critic": network(0.0, 4)}
    dcp.load(state, checkpoint_id=tmp_path / "average")
    assert is_mean(state["generator"])
    assert is_mean(state["critic"], 4, scale=2)


# -------------------------------------------------------------------------------------- the opening


def test_networks_are_noted_and_record_is_read(tmp_path):
    optimizer = {"state": {}, "param_groups": [{"lr": 0.5}]}
    checkpoint = saved(tmp_path, two(1.0) | {"optimizer": optimizer, "global_step": 70})
    assert (checkpoint.step, checkpoint.record.epoch, checkpoint.record.lr) == (70, 3, 0.5)
    assert checkpoint.entries == ("encoder", "decoder")
    assert checkpoint.other_entries == ("epoch", "optimizer", "global_step")
    (note,) = checkpoint.notes
    assert note == (
        "2 networks, each averaged at its own place: encoder, decoder (`key` picks one)"
    )


def test_networks_keep_weights_called_ema(tmp_path):
    state = {"ema.decay": torch.ones(2), "gate": {"ema": torch.ones(3)}}
    checkpoint = saved(tmp_path, {"a": state, "b": network(1.0)})
    assert list(checkpoint.tensors)[:2] == ["a.ema.decay", "a.gate.ema"]
    assert len(checkpoint.notes) == 1


def test_network_alone_keeps_its_names(tmp_path):
    checkpoint = saved(tmp_path, {"generator": network(1.0), "losses": {"g": torch.ones(5)}})
    assert (checkpoint.key, checkpoint.networks) == ("generator", ())
    assert list(checkpoint.tensors) == ["weight", "bias"]


def test_networks_beside_known_entry_are_noted(tmp_path):
    checkpoint = saved(tmp_path, {"model": network(1.0), "discriminator": network(2.0, 4)})
    assert (checkpoint.key, checkpoint.networks) == ("model", ())
    (note,) = checkpoint.notes
    assert note == "weights are taken from 'model'; others are in discriminator (see `key`)"


def test_networks_may_lie_in_entry_of_key(tmp_path):
    state = {"nets": {"a": network(1.0), "b": network(2.0)}, "model": network(3.0)}
    checkpoint = saved(tmp_path, state, key="nets")
    assert (checkpoint.key, checkpoint.networks) == ("nets", ("a", "b"))
    assert list(checkpoint.tensors) == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_networks_missing_from_checkpoint_are_error(tmp_path):
    torch.save(two(1.0), tmp_path / "step_1.pt")
    torch.save(network(1.0), tmp_path / "step_2.pt")
    opened = [open_checkpoint(tmp_path / f"step_{step}.pt") for step in (1, 2)]
    with pytest.raises(CheckpointError, match=r"encoder, decoder against .*the file itself.*`key`"):
        ckptavg.average(opened)


def test_networks_with_clashing_names_require_key(tmp_path):
    state = {"a": {"b.weight": torch.ones(2)}, "a.b": {"weight": torch.ones(2)}}
    with pytest.raises(CheckpointError, match="Name the entry by `key`"):
        saved(tmp_path, state)


@pytest.mark.parametrize("name", ["ema", "G_ema", "modelEMA", "netG_EMA", "swa_model", "avg.net"])
def test_is_average_recognizes_words_of_names(name):
    assert is_average(name)


@pytest.mark.parametrize("name", ["semantic", "schema", "gemaker", "mean_net", "savg1x"])
def test_is_average_ignores_words_within_others(name):
    assert not is_average(name)


@pytest.mark.parametrize(
    "name", ["momentum_encoder", "exp_encoder", "log_prob_net", "random_projection", "upscaler"]
)
def test_networks_may_have_training_words_in_names(tmp_path, name):
    checkpoint = saved(tmp_path, {"encoder": network(1.0), name: network(2.0, 4)})
    assert checkpoint.networks == ("encoder", name)


@pytest.mark.parametrize(
    "name", ["grads", "gradDict", "momentum_buffer", "exp_avg_sq", "optim_momentum", "grad_scaler"]
)
def test_networks_exclude_training_state_per_parameter(tmp_path, name):
    checkpoint = saved(tmp_path, {"encoder": network(1.0), name: network(2.0)})
    assert (checkpoint.key, checkpoint.networks) == ("encoder", ())


names = st.sampled_from(["a", "b", "net_c"])
scalars = st.sampled_from([None, 1, 0.5, "x"])
trees = st.dictionaries(names, scalars | st.integers(1, 3).map(torch.ones), max_size=3)
for _ in range(2):
    trees = st.dictionaries(names, scalars | st.integers(1, 3).map(torch.ones) | trees, max_size=3)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_open_checkpoint_keeps_every_nested_tensor(tmp_path_factory, tree):
    held = {path[1:].replace("/", ".") for path in leaves(tree)}
    path = tmp_path_factory.mktemp("tree")
    if not held:
        return
    checkpoint = saved(path, tree)
    prefix = f"{checkpoint.key}." if checkpoint.key else ""
    assert {f"{prefix}{name}" for name in checkpoint.stored_names.values()} == held
