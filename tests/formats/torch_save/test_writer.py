"""A torch.save output in its input's own layout: what loads the one loads the other."""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import types
import uuid
import zipfile
from collections import OrderedDict, defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ckptavg
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.formats import open_checkpoint
from ckptavg.formats.metric_names import is_metric
from ckptavg.formats.safe_pickle import allowlist
from ckptavg.formats.torch_save import writer
from ckptavg.models.runtime import Runtime


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def run_of(directory, make, suffix=".ckpt", count=3):
    """Checkpoints that ``make(model, epoch)`` gives."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(0)
    models = [model() for _ in range(count)]
    for epoch, one in enumerate(models):
        torch.save(make(one, epoch), directory / f"epoch_{epoch}{suffix}")
    return models


def averaged(directory, name, **options):
    out = directory.parent / name
    ckptavg.average(ckptavg.open_run(directory, **options), out=out)
    return torch.load(out, weights_only=False)


def mean(models, name):
    return sum(m.state_dict()[name].double() for m in models) / len(models)


def holds_the_mean(state, models, prefix="") -> bool:
    """Whether a state dict is the mean of the models', to float32's last bit."""
    floats = [n for n, t in models[0].state_dict().items() if t.is_floating_point()]
    return all(torch.equal(state[prefix + n], mean(models, n).float()) for n in floats)


def test_torch_save_keeps_entries_beside_weights(tmp_path):
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1, momentum=0.9)
    models = run_of(
        tmp_path / "run",
        lambda m, epoch: {
            "model": m.state_dict(),
            "epoch": epoch,
            "args": argparse.Namespace(lr=0.1, path=pathlib.Path("a/b"), names=["x", ("y", None)]),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": {"last_epoch": epoch},
            "scaler": {"scale": 1.0},
            "state": {"seen": torch.tensor(0.75), "at": 2},
        },
        suffix=".pth",
    )
    found = averaged(tmp_path / "run", "out.pth")
    assert list(found) == ["model", "epoch", "args", "state", "ckptavg"]
    assert found["epoch"] == 2
    assert found["args"] == argparse.Namespace(
        lr=0.1, path=pathlib.Path("a/b"), names=["x", ("y", None)]
    )
    assert found["state"] == {"seen": torch.tensor(0.75), "at": 2}
    assert list(found["model"]) == list(models[0].state_dict())
    assert holds_the_mean(found["model"], models)
    model().load_state_dict(found["model"])


def test_pt_output_has_input_layout_and_state_dict(tmp_path):
    models = run_of(
        tmp_path / "run",
        lambda m, epoch: {
            "model": {f"_orig_mod.{k}": v for k, v in m.state_dict().items()},
            "model_args": {"n_layer": 2, "bias": False},
            "iter_num": epoch,
            "args": argparse.Namespace(lr=0.1),
        },
        suffix=".pt",
    )
    averaged(tmp_path / "run", "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == ["model", "model_args", "iter_num", "ckptavg", "state_dict"]
    assert holds_the_mean(found["state_dict"], models)
    assert holds_the_mean(found["model"], models, prefix="_orig_mod.")
    for name, tensor in found["state_dict"].items():
        assert found["model"][f"_orig_mod.{name}"].data_ptr() == tensor.data_ptr()
    once = sum(t.nbytes for t in found["state_dict"].values())
    assert (tmp_path / "out.pt").stat().st_size < once + 20_000


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pth.tar"])
def test_torch_save_of_any_suffix_has_input_layout(tmp_path, suffix):
    models = run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "epoch": e})
    found = averaged(tmp_path / "run", f"out{suffix}")
    assert list(found) == ["model", "epoch", "ckptavg"]
    assert holds_the_mean(found["model"], models)


def test_pt_output_of_bare_state_dicts_is_noted(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    models = run_of(tmp_path / "run", lambda m, _: m.state_dict(), suffix=".pt")
    assert holds_the_mean(averaged(tmp_path / "run", "out.pt")["state_dict"], models)
    assert any("`out='OUT.pth'`" in record.getMessage() for record in caplog.records)


def test_torch_save_of_safetensors_has_state_dict(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    state = model().state_dict()
    save_file(state, tmp_path / "run" / "epoch_1.safetensors")
    found = averaged(tmp_path / "run", "out.ckpt")
    assert list(found) == ["state_dict", "ckptavg"]
    assert torch.equal(found["state_dict"]["0.weight"], state["0.weight"])


def test_bare_state_dict_stays_bare_with_provenance(tmp_path):
    models = run_of(tmp_path / "run", lambda m, _: m.state_dict(), suffix=".pth")
    found = averaged(tmp_path / "run", "out.pth")
    assert list(found) == list(models[0].state_dict())
    assert holds_the_mean(found, models)
    reopened = open_checkpoint(tmp_path / "out.pth")
    assert reopened.is_average
    assert len(reopened.provenance.inputs) == 3


def test_torch_save_average_in_run_is_left_out(tmp_path):
    for suffix, make in (
        (".ckpt", lambda m, e: {"state_dict": m.state_dict(), "epoch": e}),
        (".pth", lambda m, e: m.state_dict()),
        (".pt", lambda m, e: {"model": m.state_dict(), "epoch": e}),
    ):
        directory = tmp_path / suffix[1:]
        run_of(directory, make, suffix)
        ckptavg.average(ckptavg.open_run(directory), out=directory / f"epoch_9{suffix}")
        run = ckptavg.open_run(directory)
        assert [c.path.name for c in run] == [f"epoch_{i}{suffix}" for i in range(3)]
        assert (directory / f"epoch_9{suffix}", "an average that ckptavg wrote") in run.left_out


def test_torch_save_keeps_stored_names_and_n_averaged(tmp_path):
    def make(one, epoch):
        return {"model": one.state_dict(), "model_ema": AveragedModel(one).state_dict()}

    models = run_of(tmp_path / "run", make, suffix=".pth")
    found = averaged(tmp_path / "run", "out.pth", key="model_ema")
    assert "model" not in found  # the last checkpoint's, not the average's
    AveragedModel(model()).load_state_dict(found["model_ema"])
    assert holds_the_mean(found["model_ema"], models, prefix="module.")
    assert found["model_ema"]["n_averaged"] == 0


def test_torch_save_average_of_key_fills_state_dict_too(tmp_path):
    """Lightning's WeightAveraging keeps the weights as trained beside those that it loads."""
    models = [model() for _ in range(3)]
    states = iter(models)
    run_of(
        tmp_path / "run",
        lambda m, e: {
            "state_dict": m.state_dict(),
            "current_model_state": next(states).state_dict(),
        },
    )
    found = averaged(tmp_path / "run", "out.ckpt", key="current_model_state")
    assert holds_the_mean(found["current_model_state"], models)
    assert holds_the_mean(found["state_dict"], models)


def test_torch_save_drops_ema_of_last_checkpoint(tmp_path):
    """timm would load the EMA of the last checkpoint instead of the average."""
    run_of(
        tmp_path / "run",
        lambda m, e: {"state_dict": m.state_dict(), "state_dict_ema": model().state_dict()},
    )
    assert "state_dict_ema" not in averaged(tmp_path / "run", "out.ckpt")


def test_torch_save_replaces_nested_entry(tmp_path):
    models = run_of(
        tmp_path / "run",
        lambda m, e: {
            "state": {
                "model": m.state_dict(),
                "timestamp": {"batch": e},
                "optimizers": {"SGD": {"state": {}}},
            },
            "rng": [torch.get_rng_state()],
        },
        suffix=".pt",
    )
    found = averaged(tmp_path / "run", "out.pt")
    assert list(found) == ["state", "ckptavg", "state_dict"]
    assert list(found["state"]) == ["model", "timestamp"]
    assert holds_the_mean(found["state"]["model"], models)


def test_torch_save_names_dropped_entries(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    run_of(
        tmp_path / "run",
        lambda m, e: {
            "state_dict": m.state_dict(),
            "hyper_parameters": {"width": 3, "net": nn.ReLU()},
            "optimizer_states": [],
            "callbacks": {"ema": {"weights": model().state_dict()}},
        },
    )
    found = averaged(tmp_path / "run", "out.ckpt")
    assert found["hyper_parameters"] == {"width": 3}
    note = next(r.getMessage() for r in caplog.records if "not taken over" in r.getMessage())
    assert note.endswith("hyper_parameters.net, optimizer_states, callbacks")


def test_torch_save_keeps_options_named_as_training_state(tmp_path):
    given = {"optimizer": {"name": "adam"}, "scheduler": "cosine", "optim": [1]}
    run_of(
        tmp_path / "run",
        lambda m, e: {
            "state": {"model": m.state_dict(), "optimizers": {"a": 1}, "hparams": given},
            "hyper_parameters": given,
            "optimizer": "sgd",
            "lr_scheduler": {"last_epoch": e},
        },
    )
    found = averaged(tmp_path / "run", "out.ckpt")
    assert found["hyper_parameters"] == found["state"]["hparams"] == given
    assert found["optimizer"] == "sgd"
    assert set(found) == {"state", "hyper_parameters", "optimizer", "ckptavg"}
    assert set(found["state"]) == {"model", "hparams"}


def test_torch_save_keeps_small_tensors_among_values(tmp_path):
    given = {"width": 6, "class_weights": torch.tensor([1.0, 2.0, 3.0]), "turned": torch.eye(3).t()}
    run_of(
        tmp_path / "run",
        lambda m, e: {
            "model": m.state_dict(),
            "hyper_parameters": given | {"table": torch.zeros(1 << 15), "b": 1, "c": 2},
            "ema": {"decay": 0.9} | model().state_dict(),
            "shadow": [torch.zeros(2)],
            "prior": torch.tensor([0.5, 0.5]),
        },
    )
    found = averaged(tmp_path / "run", "out.ckpt")
    assert set(found) == {"model", "hyper_parameters", "prior", "ckptavg"}
    assert set(found["hyper_parameters"]) == {*given, "b", "c"}
    assert torch.equal(found["hyper_parameters"]["class_weights"], given["class_weights"])
    assert torch.equal(found["hyper_parameters"]["turned"], torch.eye(3))
    assert torch.equal(found["prior"], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize(
    "name",
    ["optimizer_G", "optimizerG_state_dict", "g_optimizer", "optim_g", "lr_sched", "sched",
     "warmup_scheduler", "schedulerG", "lr_schedule", "amp_scaler", "last_optimizer_state"],
)  # fmt: skip
def test_torch_save_drops_training_state_by_name(tmp_path, name):
    kept = {"optimizer_config": {"lr": 1}, "scheduler_args": {"a": 1}, "optimizer_history": [1]}
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), name: {"last": e}, **kept})
    assert set(averaged(tmp_path / "run", "out.ckpt")) == {"model", "ckptavg", *kept}


def test_torch_save_names_every_dropped_entry(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    others = {f"object_{i}": Unknown() for i in range(12)}
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), **others})
    averaged(tmp_path / "run", "out.ckpt")
    note = next(r.getMessage() for r in caplog.records if "not taken over" in r.getMessage())
    assert all(name in note for name in others)


def test_torch_save_writes_pickled_module_as_state_dict(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    models = run_of(tmp_path / "run", lambda m, e: {"model": m, "epoch": e}, suffix=".pt")
    found = averaged(tmp_path / "run", "out.pt")
    assert holds_the_mean(found["model"], models)
    assert holds_the_mean(found["state_dict"], models)
    assert any("pickled module" in record.getMessage() for record in caplog.records)


def test_torch_save_keeps_ties_under_stored_names(tmp_path):
    def make(one, _):
        state = {f"module.{k}": v for k, v in one.state_dict().items()}
        return {"net": state | {"module.tied": state["module.0.weight"]}}

    run_of(tmp_path / "run", make)
    found = averaged(tmp_path / "run", "out.ckpt")["net"]
    assert found["module.tied"].data_ptr() == found["module.0.weight"].data_ptr()


def test_torch_save_puts_base_tensors_into_entry(tmp_path):
    models = run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict()})
    torch.save({"model": {"head": torch.ones(2), **models[0].state_dict()}}, tmp_path / "base.pt")
    run, base = ckptavg.open_run(tmp_path / "run"), open_checkpoint(tmp_path / "base.pt")
    ckptavg.average(run, out=tmp_path / "out.ckpt", include="0.*", base=base)
    found = torch.load(tmp_path / "out.ckpt")["model"]
    assert torch.equal(found["head"], torch.ones(2))
    assert torch.equal(found["0.weight"], mean(models, "0.weight").float())
    assert torch.equal(found["1.weight"], models[0].state_dict()["1.weight"])


def test_torch_save_wraps_names_of_base_tensors(tmp_path):
    def make(one, _):
        return {"net": {f"module._orig_mod.{k}": v for k, v in one.state_dict().items()}}

    run_of(tmp_path / "run", make)
    torch.save({"head": torch.ones(2), **model().state_dict()}, tmp_path / "base.pt")
    run, base = ckptavg.open_run(tmp_path / "run"), open_checkpoint(tmp_path / "base.pt")
    ckptavg.average(run, out=tmp_path / "out.ckpt", include="0.*", base=base)
    found = torch.load(tmp_path / "out.ckpt")["net"]
    assert {name.removeprefix("module._orig_mod.") for name in found} == {"head", *base.tensors}
    assert all(name.startswith("module._orig_mod.") for name in found)


def test_torch_save_keeps_values_among_weights(tmp_path):
    run_of(tmp_path / "run", lambda m, e: {"net": {**m.state_dict(), "_extra_state": {"a": e}}})
    assert averaged(tmp_path / "run", "out.ckpt")["net"]["_extra_state"] == {"a": 2}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_update_checkpoint_keeps_torch_save_layout(tmp_path, suffix):
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "epoch": e}, suffix)
    ckptavg.average(ckptavg.open_run(tmp_path / "run"), out=tmp_path / f"swa{suffix}")
    swa = open_checkpoint(tmp_path / f"swa{suffix}")
    assert not swa.notes
    update_checkpoint(
        swa,
        tmp_path / f"bn{suffix}",
        StatisticsPass(model(), [torch.randn(8, 3)], Runtime(torch.device("cpu"))),
    )
    found, before = (torch.load(tmp_path / f"{n}{suffix}") for n in ("bn", "swa"))
    assert found["epoch"] == 2
    assert set(found) == set(before)
    for entry in {"model", "state_dict"} & set(found):
        assert torch.equal(found[entry]["0.weight"], before[entry]["0.weight"])
        assert not torch.equal(found[entry]["1.running_mean"], before[entry]["1.running_mean"])


HARMLESS = [
    None, True, 3, -(2**70), 0.5, float("inf"), "text", "\ud800", b"bytes", [1, [2]], (1, (2,)),
    {"a": {1: 2}, 3: 4, (1, "b"): None}, {1, 2}, OrderedDict(a=1), defaultdict(list, a=[1]),
    torch.Size([1, 2]), torch.float16, torch.device("cuda", 1), argparse.Namespace(a=1, b=[2]),
    types.SimpleNamespace(x=1.5), pathlib.PurePosixPath("a/b"), pathlib.Path("c"),
    pathlib.PureWindowsPath("c:/d"), datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
    datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    datetime.date(2021, 2, 3), datetime.time(4, 5), datetime.timedelta(days=1, seconds=2),
    uuid.UUID(int=5), torch.tensor(3), torch.tensor(True), torch.tensor(1 + 2j),
]  # fmt: skip


@pytest.mark.parametrize("value", HARMLESS, ids=lambda v: type(v).__name__)
def test_torch_save_keeps_harmless_values(tmp_path, value):
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "it": value, "l": [value]})
    found = averaged(tmp_path / "run", "out.ckpt")
    assert found["it"] == value
    assert found["l"] == [value]
    assert isinstance(found["it"], type(value)) or isinstance(value, (dict, torch.Size))


class Unknown:
    def __init__(self, **state):
        self.__dict__ |= state


class Executed:
    """Runs a command if it is ever unpickled as pickle means it."""

    def __reduce__(self):
        return os.system, ("touch /tmp/should-never-be-there",)


@pytest.mark.parametrize(
    "value",
    [Unknown(a=1), Executed(), torch.zeros(1 << 15), [torch.zeros(2)],
     os.system, Unknown, [1, Unknown()], (Executed(),),
     {"only": Executed()}, argparse.Namespace(a=Unknown()), nn.ReLU(), frozenset([1]),
     types.SimpleNamespace(a=Executed())],
)  # fmt: skip
def test_torch_save_drops_other_objects(tmp_path, value):
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "it": value, "n": 1})
    found = averaged(tmp_path / "run", "out.ckpt")
    assert set(found) == {"model", "n", "ckptavg"}
    assert b"Unknown" not in (tmp_path / "out.ckpt").read_bytes()
    assert b"system" not in (tmp_path / "out.ckpt").read_bytes()


def test_torch_save_drops_cycles_and_keeps_sharing(tmp_path):
    circle: list = []
    circle.append(circle)
    wide: list = [0]
    for _ in range(60):
        wide = [wide, wide]
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "c": circle, "w": wide})
    found = averaged(tmp_path / "run", "out.ckpt")
    assert "c" not in found
    assert found["w"][0] is found["w"][1]


@pytest.mark.parametrize("name", ["__reduce_ex__", "__getstate__", "__dict__", "__class__"])
def test_torch_save_drops_attributes_a_pickler_calls(tmp_path, name):
    class Pickled:
        def __reduce__(self):
            return argparse.Namespace, (), {name: {"a": 1}}

    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "it": Pickled(), "n": 1})
    assert set(averaged(tmp_path / "run", "out.ckpt")) == {"model", "n", "ckptavg"}


def test_torch_save_drops_too_deep_chain(tmp_path):
    links: list = [{"end": 1}]
    for _ in range(400):
        links.append({"next": links[-1]})

    def make(one, _):
        return {"links": [*links[40::40], Unknown()], "model": one.state_dict(), "x": links[-1]}

    run_of(tmp_path / "run", make)
    found = averaged(tmp_path / "run", "out.ckpt")
    assert set(found) == {"model", "ckptavg"}


def test_torch_save_stores_scalars_once_and_limits_them(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_MOST_VALUES", 3)
    loss = torch.arange(5.0)

    def make(one, _):
        few = {"a": loss[0], "b": loss[0], "c": loss[1]}
        return {"net": {"w": one[0].weight.detach()}, "few": few, "many": dict(enumerate(loss))}

    run_of(tmp_path / "run", make)
    found = averaged(tmp_path / "run", "out.ckpt")
    assert found["few"] == {"a": torch.tensor(0.0), "b": torch.tensor(0.0), "c": torch.tensor(1.0)}
    assert "many" not in found
    with zipfile.ZipFile(tmp_path / "out.ckpt") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1 + 3


def test_torch_save_drops_optimizer_of_any_name(tmp_path):
    optimizers = [torch.optim.SGD(model().parameters(), lr=0.1) for _ in range(2)]
    state = {"opt_g": optimizers[0].state_dict(), "both": [o.state_dict() for o in optimizers]}
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), "n": 1, **state})
    assert set(averaged(tmp_path / "run", "out.ckpt")) == {"model", "n", "ckptavg"}


MEASURED = {
    "ImageNet example": {"arch": "resnet18", "best_acc1": 71.5, "loss": torch.tensor(0.5)},
    "a dict of metrics": {"width": 8, "metrics": {"val": {"acc": 0.5, "mAP50": 0.25}, "n": 10}},
    "some of a dict": {"meta": {"iter": 3, "hook_msgs": {"best_score": 0.5, "best_ckpt": "a.pth"}}},
    "camel case": {"num_classes": 10, "valLoss": 0.5, "bestEpoch": 3},
    "Lightning": {
        "hyper_parameters": {"loss_weight": 0.5, "accuracy": 3},
        "callbacks": {
            "ModelCheckpoint": {"monitor": "x", "best_model_score": torch.tensor(0.5)},
            "Other": {"seen": 7},
        },
    },
}
KEPT = {
    "ImageNet example": {"arch": "resnet18"},
    "a dict of metrics": {"width": 8},
    "some of a dict": {"meta": {"iter": 3, "hook_msgs": {"best_ckpt": "a.pth"}}},
    "camel case": {"num_classes": 10, "bestEpoch": 3},
    "Lightning": {
        "hyper_parameters": {"loss_weight": 0.5, "accuracy": 3},
        "callbacks": {"Other": {"seen": 7}},
    },
}
NAMED = {
    "ImageNet example": "best_acc1, loss",
    "a dict of metrics": "metrics",
    "some of a dict": "meta.hook_msgs.best_score",
    "camel case": "valLoss",
    "Lightning": "callbacks.ModelCheckpoint",
}


@pytest.mark.parametrize("trainer", MEASURED)
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_torch_save_drops_metrics_of_input(tmp_path, caplog, trainer, suffix):
    caplog.set_level("INFO", "ckptavg")
    run_of(
        tmp_path / "run", lambda m, e: {"model": m.state_dict(), "epoch": e, **MEASURED[trainer]}
    )
    found = averaged(tmp_path / "run", f"out{suffix}")
    weights = ("model", "state_dict", "ckptavg")
    beside = {name: value for name, value in found.items() if name not in weights}
    assert beside == {"epoch": 2, **KEPT[trainer]}
    assert not any(map(is_metric, open_checkpoint(tmp_path / f"out{suffix}").record.metrics))
    notes = [r.getMessage() for r in caplog.records]
    assert f"measured on the last checkpoint, so not taken over: {NAMED[trainer]}" in notes


def test_torch_save_drops_metrics_beside_random_state(tmp_path):
    beside = {"torch_rng": torch.get_rng_state(), "val_acc": 0.5, "train_loss_epoch": 0.25}
    head = {"score": torch.tensor(3.0), "weight": torch.ones(200, 200)}
    run_of(tmp_path / "run", lambda m, e: {"net": {**m.state_dict(), **head}, "ep": e, **beside})
    found = averaged(tmp_path / "run", "out.pth")
    assert set(found) == {"net", "ep", "torch_rng", "ckptavg"}
    assert found["net"]["score"] == 3


def test_torch_save_drops_changing_number(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    run_of(
        tmp_path / "run",
        lambda m, e: {
            "train": {"model": m.state_dict(), "ep": e, "va": e / 7, "wd": 0.05},
            "log": {"a": torch.tensor(e / 3), "steps": 40 * e, "temperature": 0.5**e},
            "cfg": {"p_drop": 0.1},
        },
    )
    found = averaged(tmp_path / "run", "out.pth")
    assert found["train"].keys() == {"model", "ep", "wd"}
    assert found["log"].keys() == {"steps", "temperature"}
    assert found["cfg"] == {"p_drop": 0.1}
    (note,) = (r.getMessage() for r in caplog.records if "so not taken over" in r.getMessage())
    assert note == "measured on the last checkpoint, so not taken over: train.va, log.a"


@pytest.mark.parametrize("name", ["hmean", "metrics.val.total", "eval_iou_epoch", "valTop1"])
def test_is_metric_accepts_measured_names(name):
    assert is_metric(name)


@pytest.mark.parametrize(
    "name", ["val_interval", "best_loss_epoch", "acc_steps", "config.val.acc", "val_split", "lr"]
)
def test_is_metric_rejects_settings_and_clocks(name):
    assert not is_metric(name)


def test_torch_save_keeps_history_and_weights_named_as_metrics(tmp_path):
    beside = {"val_losses": [0.5, 0.25], "log": [{"acc": 0.5}], "head": {"score": torch.ones(2)}}
    run_of(tmp_path / "run", lambda m, e: {"model": m.state_dict(), **beside})
    found = averaged(tmp_path / "run", "out.pth")
    assert found["val_losses"] == [0.5, 0.25]
    assert found["log"] == [{"acc": 0.5}]


def keys():
    names = st.text(max_size=3).filter(lambda name: not is_metric(name))
    return st.one_of(names, st.integers(), st.booleans(), st.none(), st.floats())


def values():
    scalars = keys() | st.binary(max_size=4)
    return st.recursive(
        scalars,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(keys(), inner, min_size=1, max_size=3),
        ),
        max_leaves=12,
    )


@given(values())
def test_carry_over_keeps_plain_values(value):
    carry_over = allowlist.CarryOver(key="model", plain=True, tensor=lambda *_: None, replaced={})
    kept = carry_over.filter_entries({"it": value})
    assert repr(kept) == repr({"it": value})
    assert not carry_over.dropped
