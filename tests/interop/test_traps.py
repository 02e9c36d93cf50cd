"""What lies in run directories besides the run, and what names and numbers can mislead into."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from click.testing import CliRunner
from helpers import names, save, save_weight
from layouts import (
    LAYOUTS,
    BeforeZip,
    Classifier,
    Composer,
    Lightning,
    Net,
    Timm,
    TorchvisionReferences,
    Ultralytics,
    copied,
    loaded,
)
from torch import nn

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import MismatchError, RunError


def command(*args) -> str:
    """What a command says, notes included."""
    done = CliRunner().invoke(main, [str(a) for a in args])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS if not layout.refused], ids=lambda layout: layout.name
)
def test_inspect_lists_checkpoints_and_files_left_out(layout, written):
    path = written(layout).path
    shown = command("inspect", path)
    assert f"{len(layout.checkpoints)} checkpoints in order" in shown
    places = [shown.index(f"\n{name} ") for name in layout.checkpoints]
    assert places == sorted(places)
    assert layout.key or "(the file)" in shown
    result = json.loads(command("inspect", path, "--json", "-q"))
    for left_out in result["left_out"]:
        assert left_out["why"] in shown
        assert shown.count(left_out["path"].rpartition("/")[2]) >= 1
    assert {c["key"] for c in result["checkpoints"]} == {layout.key}


# Outputs of ours among the inputs


@pytest.mark.parametrize("name", ["average.safetensors", "average.pt", "average.ckpt"])
def test_output_in_run_directory_is_left_out(name, written, tmp_path):
    before = written(Lightning())
    for checkpoint in before.path.iterdir():
        (tmp_path / checkpoint.name).write_bytes(checkpoint.read_bytes())
    average(open_run(tmp_path), out=tmp_path / name)
    run = open_run(tmp_path)
    assert names(run) == list(Lightning.checkpoints)
    assert (tmp_path / name, "an average that ckptavg wrote") in run.left_out


def test_output_of_bare_weights_is_left_out(tmp_path):
    for i in (1, 2):
        save_weight(tmp_path / f"{i}.pth", i)
    average(open_run(tmp_path), out=tmp_path / "3.pth")
    run = open_run(tmp_path)
    assert names(run) == ["1.pth", "2.pth"]
    assert run.left_out == ((tmp_path / "3.pth", "an average that ckptavg wrote"),)


# A model that calls its network `module`, as DDP does


@pytest.fixture
def classifiers(tmp_path):
    """Two checkpoints of such a model, as bare state dicts."""
    states = []
    for i in (1, 2):
        model = Classifier()
        states.append(copied(model.state_dict()))
        save(tmp_path / f"{i}.pth", states[-1])
    return tmp_path, states


def test_module_prefix_is_kept_in_layout_of_inputs(classifiers):
    path, states = classifiers
    out = average(open_run(path), out=path / "average.pth")
    back = loaded(Classifier(), torch.load(out))
    mean = (states[0]["module.head.bias"].double() + states[1]["module.head.bias"]) / 2
    assert torch.equal(back["module.head.bias"], mean.float())


def test_module_prefix_is_dropped_in_memory(classifiers):
    path, _ = classifiers
    Net().load_state_dict(average(open_run(path)))


def test_module_prefix_dropped_is_noted(classifiers):
    path, _ = classifiers
    said = command("average", path, "-o", path / "average.safetensors")
    assert "'module.' in front of every name" in said


@pytest.mark.parametrize("wrapped", [Net(), torch.compile(Net()), nn.DataParallel(Net())])
def test_module_prefix_is_noted_only_in_doubt(wrapped, tmp_path):
    save(tmp_path / "1.pth", wrapped.state_dict())
    (checkpoint,) = open_run(tmp_path)
    assert len(checkpoint.notes) == isinstance(wrapped, nn.DataParallel)


def test_composer_output_keeps_module_prefix(written, tmp_path):
    layout = Composer()
    out = average(open_run(written(layout).path), out=tmp_path / layout.output)
    assert all(name.startswith("module.") for name in torch.load(out)["state"]["model"])


# Several networks in one directory


@pytest.fixture
def gan(tmp_path):
    for i in (1, 2, 10):
        save(tmp_path / f"G_{i}.pth", {"decoder.weight": torch.full((2,), float(i))})
        save(tmp_path / f"D_{i}.pth", {"critic.weight": torch.full((3,), float(i))})
    return tmp_path


def test_two_networks_are_refused_with_a_glob(gan):
    with pytest.raises(
        RunError, match=r"'D_\*.pth', 'G_\*.pth'. Select one with `glob='D_\*.pth'`"
    ):
        average(open_run(gan))


@pytest.mark.parametrize("pattern", ["D_*.pth", "G_*.pth"])
def test_two_networks_are_selected_by_suggested_glob(gan, pattern):
    assert len(open_run(gan, glob=pattern)) == 3
    average(open_run(gan, glob=pattern))


def test_inspect_reports_two_networks(gan):
    said = command("inspect", gan)
    assert "different networks" in said
    assert "D_*.pth" in said
    assert "G_*.pth" in said


def test_two_networks_with_equal_names_are_refused(tmp_path):
    for i in (1, 2):
        save(tmp_path / f"netG_{i}.pth", nn.Sequential(nn.Linear(2, 3)).state_dict())
        save(tmp_path / f"netD_{i}.pth", nn.Sequential(nn.Linear(2, 1)).state_dict())
    (tmp_path / "netD_1.pth").unlink()  # so that they are not two series of the same steps
    with pytest.raises(MismatchError, match=r"`glob='netD_\*\.pth'` or `glob='netG_\*\.pth'`"):
        average(open_run(tmp_path))


# Copies of another kind beside the run


def diffusion_run(directory):
    """As diffusion trainers write it: raw weights, EMA and optimizer, each in files of its own."""
    for i in (10000, 20000):
        save_weight(directory / f"model{i:06d}.pt", i)
        save_weight(directory / f"ema_0.9999_{i:06d}.pt", i + 1)
        state = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
        torch.save(state, directory / f"opt{i:06d}.pt")
    return directory


def test_ema_files_are_left_out(tmp_path):
    run = open_run(diffusion_run(tmp_path))
    assert names(run) == ["model010000.pt", "model020000.pt"]
    assert any("ema_0.9999_010000.pt" in note and "EMA" in note for note in run.notes)


def test_ema_files_can_be_selected_by_glob(tmp_path):
    run = open_run(diffusion_run(tmp_path), glob="ema_*")
    assert [c.step for c in run] == [10000, 20000]


@pytest.mark.parametrize("name", ["tmp.pth.tar", "recovery_tmp.pth.tar"])
def test_temporary_files_are_left_out(name, tmp_path):
    for i in (1, 2):
        save_weight(tmp_path / f"checkpoint-{i}.pth.tar", i)
    whole = (tmp_path / "checkpoint-2.pth.tar").read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    run = open_run(tmp_path)
    assert names(run) == ["checkpoint-1.pth.tar", "checkpoint-2.pth.tar"]
    assert run.left_out == ((tmp_path / name, "a temporary file, by its name"),)


@pytest.mark.parametrize("name", ["averaged.pt", "avg_5.pt", "model_ema.pt", "init.pt"])
def test_left_out_names_are_opened_without_a_run(name, tmp_path):
    save_weight(tmp_path / name, 1)
    save_weight(tmp_path / "other.pt", 2)
    assert len(open_run(tmp_path)) == 2
    assert len(open_run(tmp_path / name)) == 1


def test_repeats_include_files_with_training_state(tmp_path):
    for i in (1, 2):
        save_weight(tmp_path / f"{i}epoch.pth", float(i))
    state = {"model": {"w": torch.tensor([2.0])}, "optimizer": {"state": torch.rand(5)}}
    torch.save(state, tmp_path / "checkpoint.pth")
    run = open_run(tmp_path)
    assert run.left_out == ((tmp_path / "checkpoint.pth", "repeats 2epoch.pth"),)


# Numbers


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("form", ["epoch_{}.pt", "epoch_{:04d}.pt", "{}.pt", "model-{:02d}.pt"])
def test_step_order_holds_for_padded_and_plain_numbers(first, form, tmp_path):
    for i in range(first, first + 11):
        save_weight(tmp_path / form.format(i), i)
    assert [c.step for c in open_run(tmp_path)] == list(range(first, first + 11))


def test_step_order_holds_for_mixed_padding(tmp_path):
    for name in ("epoch_08", "epoch_9", "epoch_10", "epoch_0011"):
        save_weight(tmp_path / f"{name}.pt", len(name))
    assert [c.step for c in open_run(tmp_path)] == [8, 9, 10, 11]


# One tool each


def test_key_selects_ema_of_torchvision_run(written):
    layout = TorchvisionReferences()
    run = written(layout)
    saved = [torch.load(run.path / n, weights_only=False)["model_ema"] for n in layout.checkpoints]
    mean = sum(state["module.head.bias"].double() for state in saved) / 3
    opened = open_run(run.path, key="model_ema")
    assert names(opened) == list(layout.checkpoints)
    assert torch.equal(average(opened)["head.bias"], mean.float())


def test_best_of_timm_run_goes_by_metric_and_mode(written):
    run = open_run(written(Timm()).path)
    assert names(run.best(1, "metric", "max")) == ["checkpoint-2.pth.tar"]
    assert names(run.best(1, "metric", "min")) == ["checkpoint-1.pth.tar"]


def test_pickled_module_is_read_without_its_class(written):
    run = open_run(written(Ultralytics()).path)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("their_tasks")
    assert {t.dtype.name for c in run for t in c.tensors.values()} == {"float16", "int64"}
    assert "model.1.running_mean" in next(iter(run)).tensors


def test_repeats_of_legacy_torch_files_are_left_out(written):
    run = open_run(written(BeforeZip()).path)
    ((path, why),) = run.left_out
    assert (path.name, why) == ("latest.pth", "repeats epoch_11.pth")
