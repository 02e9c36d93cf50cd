"""Which entry of a file holds the weights, and what its tensors are called without wrappers."""

from __future__ import annotations

import argparse
import itertools
import re
import types
from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptavg.errors import CheckpointError, NoWeightsError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.wrappers import bare_names


@pytest.fixture
def opened(tmp_path):
    """Save something and open it."""

    def save_and_open(value, key=None):
        torch.save(value, tmp_path / "checkpoint.pt")
        return open_checkpoint(tmp_path / "checkpoint.pt", key)

    return save_and_open


@pytest.fixture
def refused(tmp_path, refusal):
    """Save something that cannot be opened; the line that says why."""

    def save_and_refuse(value, key=None):
        torch.save(value, tmp_path / "checkpoint.pt")
        return refusal(tmp_path / "checkpoint.pt", key)

    return save_and_refuse


class StateDict(OrderedDict):
    """A state dict of a library's own class."""


class Config(dict):
    """Settings of a library's own class."""


def weights(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2) for name in names or ("layer.weight", "layer.bias")}


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.rand(4, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


# ---------------------------------------------------------------------------------------- the entry


IN_ORDER = ["state_dict", "model_state_dict", "model", "module", "net", "weights"]


@pytest.mark.parametrize("name", IN_ORDER)
def test_known_entry_is_found_beside_optimizer_and_numbers(opened, name):
    module, optimizer = trained()
    state = {"epoch": 3, name: module.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint = opened(state)
    assert checkpoint.key == name
    assert set(checkpoint.tensors) == set(module.state_dict())
    assert checkpoint.notes == ()


@pytest.mark.parametrize(("name", "other"), [*itertools.pairwise(IN_ORDER)])
def test_known_entry_first_in_order_wins(opened, name, other):
    assert opened({other: weights("b"), name: weights("a")}).key == name
    assert opened({other: weights("b"), name: {"lr": 0.1}}).key == other


def test_bare_state_dict_has_empty_key(opened):
    module, _ = trained()
    checkpoint = opened(module.state_dict())
    assert checkpoint.key == ""
    assert list(checkpoint.tensors) == list(module.state_dict())


def test_bare_state_dict_values_are_noted(opened):
    checkpoint = opened(weights("a") | {"epoch": 3, "class_names": ["x"]})
    assert list(checkpoint.tensors) == ["a"]
    assert any("2 values" in note and "class_names" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("state.model", "a"),
        ("state.ema", "b"),
        ("dotted.name", "c"),
        ("dotted.name.inner", "d"),
        ("args.model", "e"),
        ("", "f"),
    ],
)
def test_key_is_dotted_path(opened, key, expected):
    tree = {
        "state": {"model": weights("a"), "ema": weights("b")},
        "dotted.name": weights("c") | {"inner": weights("d")},
        "args": argparse.Namespace(model=weights("e")),
        "f": torch.zeros(1),
    }
    checkpoint = opened(tree, key)
    assert checkpoint.key == key
    assert list(checkpoint.tensors) == [expected]


@pytest.mark.parametrize("key", ["model.missing", "modell", "model.a", "epoch", "."])
def test_key_unknown_is_error_listing_entries(refused, key):
    text = refused({"model": weights("a"), "epoch": 3}, key)
    assert repr(key) in text
    assert "model: 1 tensors" in text


def test_averages_without_network_suggest_key(refused):
    text = refused({"epoch": 1, "ema1": weights("a"), "swa": {"core": weights("a", "b", "c")}})
    assert "ema1: 1 tensors" in text
    assert "swa: 3 tensors" in text
    assert "epoch: 0 tensors" in text
    assert "`key='ema1'`" in text or "`key='swa.core'`" in text


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("ema", weights()),
        ("model_ema", OrderedDict(weights())),
        ("state_dict_ema", weights()),
        ("ema", {"decay": 0.99, "shadow": weights()}),
        ("ema_state", {"shadow_params": [torch.zeros(2), torch.zeros(3)]}),
    ],
    ids=["ema", "model_ema", "state_dict_ema", "shadow", "shadow_params"],
)
def test_ema_copy_is_noted_and_not_taken(opened, name, copy):
    checkpoint = opened({"model": weights("a"), name: copy})
    assert (checkpoint.key, list(checkpoint.tensors)) == ("model", ["a"])
    assert len(checkpoint.notes) == 1
    assert name in checkpoint.notes[0]


def test_optimizer_is_refused(opened):
    with pytest.raises(NoWeightsError, match="optimizer"):
        opened(trained()[1].state_dict())


@pytest.mark.parametrize(
    "value",
    [
        {"optimizer": trained()[1].state_dict(), "epoch": 3},
        {"optim_g": trained()[1].state_dict(), "optim_d": trained()[1].state_dict()},
        {"rng": {"cpu": torch.get_rng_state(), "cuda": [torch.get_rng_state()]}, "step": 3},
    ],
    ids=["optimizer", "optimizers", "rng"],
)
def test_training_state_without_weights_is_refused(opened, value):
    with pytest.raises(NoWeightsError, match="state of a training and no weights"):
        opened(value)


@pytest.mark.parametrize(
    "value",
    [{}, {"epoch": 1}, [1, 2], "text", None, argparse.Namespace(lr=0.1), {"model": {}}],
    ids=repr,
)
def test_file_without_tensors_is_refused(opened, value):
    with pytest.raises(NoWeightsError):
        opened(value)


@pytest.mark.parametrize(
    "value",
    [[torch.zeros(2)], torch.zeros(2), {1: torch.zeros(2)}],
    ids=["list", "one", "numbered"],
)
def test_unnamed_tensors_are_refused(refused, value):
    refused(value)


def test_pickled_module_and_its_entries_are_read(opened):
    tree = {"model": nn.Linear(2, 3), "epoch": 2}
    assert set(opened(tree).tensors) == {"weight", "bias"}
    assert set(opened(tree, "model._parameters").tensors) == {"weight", "bias"}
    assert set(opened(nn.Linear(2, 3), "_parameters").tensors) == {"weight", "bias"}


def test_refused_tensors_have_bare_names(opened):
    sparse = torch.eye(3).to_sparse()
    checkpoint = opened({"module.a": torch.zeros(2), "module.mask": sparse})
    assert list(checkpoint.tensors) == ["a"]
    assert list(checkpoint.refused) == ["mask"]


def test_refused_tensor_without_wrapper_keeps_other_wrappers(opened):
    sparse = torch.eye(3).to_sparse()
    checkpoint = opened({"module.a": torch.zeros(2), "mask": sparse})
    assert list(checkpoint.tensors) == ["module.a"]


# ---------------------------------------------------------------------------------------- the names

WRAPPED = {
    "none": ({"a.weight": "a.weight"}),
    "DDP": {"module.a.weight": "a.weight", "module.b": "b"},
    "compile": {"_orig_mod.a.weight": "a.weight"},
    "FSDP": {"_fsdp_wrapped_module.a": "a"},
    "activation checkpointing": {"_checkpoint_wrapped_module.a": "a"},
    "DDP of compile": {"module._orig_mod.a": "a", "module._orig_mod.b": "b"},
    "compile of DDP": {"_orig_mod.module.a": "a"},
    "twice": {"module.module.a": "a"},
    "inside": {
        "layers.0._checkpoint_wrapped_module.w": "layers.0.w",
        "layers.1._fsdp_wrapped_module._orig_mod.w": "layers.1.w",
        "head.weight": "head.weight",
    },
    "module inside a name is the model's own": {"encoder.module.w": "encoder.module.w"},
    "not every name bears it": {"module.a": "module.a", "b": "b"},
    "not every name bears it below": {"module.module.a": "module.a", "module.b": "b"},
    "compile in front of some is inside a name": {"_orig_mod.a": "a", "b": "b"},
    "a name that only begins like it": {"modules.a": "modules.a"},
    "names that would collide": {"x.a": "x.a", "x._orig_mod.a": "x._orig_mod.a"},
    "nothing would be left": {"module.": "module."},
    "AveragedModel": {"n_averaged": None, "module.a": "a", "module.b": "b"},
    "AveragedModel of DDP": {"n_averaged": None, "module.module.a": "a"},
    "AveragedModel of compile": {"n_averaged": None, "module._orig_mod.a": "a"},
    "DDP of AveragedModel": {"module.n_averaged": None, "module.module.a": "a"},
    "compile of AveragedModel": {"_orig_mod.n_averaged": None, "_orig_mod.module.a": "a"},
    "a counter without a wrapper is the model's own": {"n_averaged": "n_averaged", "a": "a"},
    "a counter of a layer": {"module.swa.n_averaged": "swa.n_averaged", "module.a": "a"},
}


@pytest.mark.parametrize("names", WRAPPED.values(), ids=WRAPPED)
def test_bare_names_drop_wrappers_of_every_tensor(names):
    assert bare_names(list(names)) == {k: v for k, v in names.items() if v is not None}


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


WRAPPERS = {
    "AveragedModel": lambda: AveragedModel(small()),
    "DataParallel": lambda: nn.DataParallel(small()),
    "compile": lambda: torch.compile(small()),
    "AveragedModel of compile": lambda: AveragedModel(torch.compile(small())),
    "compile of AveragedModel": lambda: torch.compile(AveragedModel(small())),
    "DataParallel of AveragedModel": lambda: nn.DataParallel(AveragedModel(small())),
}


@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=WRAPPERS)
def test_torch_wrapper_state_gets_bare_names(opened, wrapped):
    state = wrapped().state_dict()
    checkpoint = opened(state)
    assert list(checkpoint.tensors) == list(small().state_dict())
    assert {checkpoint.stored_names[n] for n in checkpoint.tensors} <= set(state)


def test_stored_names_are_names_in_file(opened):
    checkpoint = opened({"module.a": torch.zeros(2), "module.b": torch.zeros(3)})
    assert checkpoint.stored_names == {"a": "module.a", "b": "module.b"}


def test_no_weights_error_is_checkpoint_error():
    assert issubclass(NoWeightsError, CheckpointError)


# ------------------------------------------------------------------------------------ other classes


def test_state_dict_of_own_class_is_read(opened):
    state = StateDict(nn.Linear(2, 2).state_dict())
    saved = Config(epoch=3, state_dict=state, config=Config(lr=0.1), same=[state])
    for value, key in ((state, ""), ({"model": state}, "model"), (saved, "state_dict")):
        checkpoint = opened(value)
        assert checkpoint.key == key
        assert list(checkpoint.tensors) == ["weight", "bias"]
    assert checkpoint.record.epoch == 3
    assert opened(saved, "same.0").tensors.keys() == checkpoint.tensors.keys()


def test_state_dict_of_own_class_may_hold_arrays(opened):
    state = StateDict((name, tensor.numpy()) for name, tensor in weights().items())
    assert list(opened(state).tensors) == list(weights())


@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace, UserDict])
def test_key_suggested_for_object_is_valid(opened, refused, kind):
    value = kind(trained=weights(), epoch=1)
    key = re.search(r"`key='(\S+)'`", refused(value))[1]
    assert list(opened(value, key).tensors) == list(weights())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("state_dct", "Did you mean state_dict or state_dict_ema?"),
        ("STATE_DICT", "Did you mean state_dict?"),
        ("ema", "Did you mean state_dict_ema?"),
        ("model", "Did you mean train.model?"),
        ("train.modle", "Did you mean train.model or train?"),
        ("optimizr", "Choose one by `key`."),
        ("epoch", "Choose another one by `key`."),
    ],
)
def test_key_mistyped_suggests_near_ones(tmp_path, key, meant):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    state = {"w": torch.ones(2)}
    saved = {"state_dict": state, "state_dict_ema": dict(state), "train": {"model": dict(state)}}
    torch.save({**saved, "optimizer": optimizer, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.pt", key)
    assert caught.value.remedy == meant


def test_key_of_optimizer_is_refused(refused):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    told = refused({"net": model.state_dict(), "optim": state}, "optim")
    assert "the entry 'optim' is an optimizer's state, not weights. Did you mean net?" in told
    several = {"epoch": 1, "optimizer_states": [state]}
    assert "is an optimizer's state, not weights. Choose" in refused(several, "optimizer_states")
